package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// noteTerms has the database note what becomes of the relay's row.
func noteTerms(t testing.TB, pool *pgxpool.Pool) {
	t.Helper()
	_, err := pool.Exec(t.Context(), `
		create table terms (n bigserial primary key, fence bigint, owner text, seen xid8);
		create function note_term() returns trigger language plpgsql as $$ begin
			insert into terms (fence, owner, seen) values (new.fence, new.owner, pg_snapshot_xmax(new.prev));
			return new;
		end $$;
		create trigger note_term after update on postrider.postrider_outbox_relay for each row execute function note_term()`)
	if err != nil {
		t.Fatal(err)
	}
}

// wantTerms checks that each term followed another, had one owner, and began with the cursor of the one before.
func wantTerms(t testing.TB, pool *pgxpool.Pool) {
	t.Helper()
	wantRows(t, pool, `(select fence, lag(fence, 1, fence) over (order by n) as before from terms) as t where fence < before`, 0)
	wantRows(t, pool, `(select seen, lag(seen, 1, seen) over (order by n) as before from terms) as t where seen < before`, 0)
	wantRows(t, pool, `(select fence from terms group by fence having count(distinct owner) > 1) as t`, 0)
}

// slowLine is a network that may keep what is sent for later, and be silent about it.
type slowLine struct {
	mu   sync.Mutex
	held bool
	kept []func()
}

func (l *slowLine) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	return &slowConn{conn, l}, err
}

// do does something to the network now, or later if it holds things back.
func (l *slowLine) do(thing func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held {
		l.kept = append(l.kept, thing)
		return
	}
	thing()
}

func (l *slowLine) hold() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held = true
}

func (l *slowLine) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held = false
	for _, thing := range l.kept {
		thing()
	}
	l.kept = nil
}

type slowConn struct {
	net.Conn

	line *slowLine
}

func (c *slowConn) Write(b []byte) (n int, err error) {
	n, b = len(b), append([]byte(nil), b...)
	c.line.do(func() { _, err = c.Conn.Write(b) })
	return n, err
}

func (c *slowConn) Close() error {
	c.line.do(func() { _ = c.Conn.Close() })
	return nil
}

// The cursor of a relay reaches the database long after its lease, when its successor has written its own.
func TestLateCursorIsFenced(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	noteTerms(t, pool)
	var line slowLine
	defer line.release()
	held := make(chan struct{})
	b := &broker{}
	late := &trap{point: beforeCursor, nth: 3, next: b, snap: func() { line.hold(); close(held) }}
	name := "late " + postrider.NewID()
	doomed := clonePool(t, pool, func(cfg *pgxpool.Config) {
		cfg.ConnConfig.DialFunc, cfg.ConnConfig.Tracer = line.dial, late
		cfg.ConnConfig.RuntimeParams["application_name"] = name
	})
	leads := func(r *outbox.Relay) {
		t.Helper()
		postridertest.Eventually(t, func() error {
			if !r.Stats().Leading {
				return errors.New("it does not lead")
			}
			return nil
		})
	}
	first, stopFirst := start(t, doomed, late, quick(ob))
	leads(first)
	second, _ := start(t, pool, b, quick(ob))
	n := 0
	more := func() {
		publish(t, pool, ob, message(fmt.Sprint(n), "k"))
		n++
		postridertest.Eventually(t, func() error {
			if len(b.ids()) < n {
				return errors.New("not sent")
			}
			return nil
		})
	}
	for holding := false; !holding; {
		more()
		select {
		case <-held:
			holding = true
		default:
		}
	}
	leads(second)
	for range 5 {
		more()
	}
	const movedOn = `(select from terms where fence > 1 and seen > (select max(seen) from terms where fence = 1) limit 1) as t`
	wantRows(t, pool, movedOn, 1)
	line.release()
	stopFirst()
	wantRows(t, pool, `pg_stat_activity where application_name = '`+name+`' and state <> 'idle'`, 0) // the late statement is over
	wantTerms(t, pool)
}
