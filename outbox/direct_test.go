package outbox_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// blind is a relay that looks at the tables on its own so seldom that what arrives has come directly, or by a wake-up.
func blind(ob *outbox.Outbox) outbox.RelayConfig {
	return outbox.RelayConfig{Outbox: ob, PollInterval: time.Hour, LeaseTTL: 30 * time.Second}
}

// insertSQL inserts as a client that wakes nobody.
func insertSQL(ctx context.Context, db interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}, data string,
) (id int64, err error) {
	err = db.QueryRow(ctx, `insert into postrider.postrider_outbox (topic, data) values ('sql', $1) returning id`, []byte(data)).Scan(&id)
	return id, err
}

func data(b *broker) (all []string) {
	for _, m := range b.copy() {
		if m.Topic == "sql" {
			all = append(all, string(m.Data))
		} else {
			all = append(all, m.ID)
		}
	}
	return all
}

func wantData(t *testing.T, b *broker, want ...string) {
	t.Helper()
	postridertest.Eventually(t, func() error {
		if got := data(b); !slices.Equal(got, want) {
			return fmt.Errorf("accepted %q, want %q", got, want)
		}
		return nil
	})
}

// What a DB has committed goes without a look at the tables, is looked at later and does not go twice, not even to a relay that
// comes after.
func TestDirect(t *testing.T) {
	t.Parallel()
	for name, publish := range waysToPublish {
		if strings.HasPrefix(name, "in the caller") {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool, ob := setup(t)
			b := &broker{}
			_, stop := start(t, pool, b, blind(ob))
			var want []string
			send := func(n int) {
				msgs := messages(n)
				for i, m := range msgs {
					m.ID = fmt.Sprintf("%d.%d", len(want), i)
				}
				want = append(want, ids(msgs)...)
				if err := publish(t.Context(), pool, ob, msgs); err != nil {
					t.Fatal(err)
				}
				clear(msgs[0].Data) // it is its caller's again
				wantIDs(t, b, want...)
			}
			for i := range 20 {
				send(1 + i%3)
			}
			stop()
			start(t, pool, b, blind(ob))
			send(1)
			if b.repeated > 0 {
				t.Errorf("%d messages were sent again", b.repeated)
			}
			for _, m := range b.copy() {
				if m.Data[0] == 0 {
					t.Fatalf("%s was sent as its caller changed it later", m.ID)
				}
			}
		})
	}
}

// A message that was committed before and is not sent, of whatever writer, is not overtaken; nor is one that is not committed waited for.
func TestDirectOvertakesNothing(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx := t.Context()
	b := &broker{}
	start(t, pool, b, blind(ob))
	db := ob.On(pool)
	put := func(id string) {
		t.Helper()
		if err := db.Publish(ctx, message(id, "")); err != nil {
			t.Fatal(err)
		}
	}
	put("1")
	wantData(t, b, "1")
	if _, err := insertSQL(ctx, pool, "2"); err != nil {
		t.Fatal(err)
	}
	put("3")
	wantData(t, b, "1", "2", "3")

	open, err := pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Rollback(ctx)
	if _, err := insertSQL(ctx, open, "late"); err != nil {
		t.Fatal(err)
	}
	put("4")
	wantData(t, b, "1", "2", "3", "4")
	if err := open.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	put("5")
	wantData(t, b, "1", "2", "3", "4", "late", "5")
}

// What is published after Pause has returned is not sent, as it would be before the relay looks again.
func TestDirectPause(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx := t.Context()
	b := &broker{}
	start(t, pool, b, blind(ob))
	put := func(id string) {
		t.Helper()
		if err := ob.On(pool).Publish(ctx, message(id, "")); err != nil {
			t.Fatal(err)
		}
	}
	put("1")
	wantData(t, b, "1")
	if err := ob.Pause(ctx, pool, outbox.Action{By: "test", Why: "to see"}); err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		put(fmt.Sprint("paused ", i))
	}
	if got := b.ids(); len(got) != 1 {
		t.Fatalf("%q were sent while the outbox was paused", got)
	}
}

// held keeps looks at the tables from beginning while it is shut.
type held struct {
	mu   sync.Mutex
	shut chan struct{} // nil: it is open
	came bool          // a look waits
}

func (h *held) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	if strings.Contains(data.SQL, "pg_current_snapshot()::text, last_value") {
		h.wait()
	}
	return ctx
}

func (h *held) TraceBatchStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceBatchStartData) context.Context {
	for _, q := range data.Batch.QueuedQueries {
		if strings.Contains(q.SQL, "pg_visible_in_snapshot") {
			h.wait()
		}
	}
	return ctx
}

func (*held) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData)     {}
func (*held) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}
func (*held) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData)     {}

func (h *held) wait() {
	h.mu.Lock()
	shut := h.shut
	h.came = h.came || shut != nil
	h.mu.Unlock()
	if shut != nil {
		<-shut
	}
}

func (h *held) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.shut, h.came = make(chan struct{}), false
}

func (h *held) open() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.shut != nil {
		close(h.shut)
		h.shut = nil
	}
}

func (h *held) waits() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.came
}

// A message goes directly while looks at the tables are held up. One that was due at that moment holds up the relay, so it may
// take more than one attempt.
func TestDirectNeedsNoLook(t *testing.T) {
	t.Parallel()
	base, ob := setup(t)
	h := &held{}
	pool := clonePool(t, base, func(cfg *pgxpool.Config) { cfg.ConnConfig.Tracer = h })
	b := &broker{}
	start(t, pool, b, blind(ob))
	t.Cleanup(h.open)
	accepted := func(id string) bool { return slices.Contains(b.ids(), id) }
	deadline := time.Now().Add(30 * time.Second)
	for n := 0; ; n++ {
		id := fmt.Sprint(n)
		h.close()
		if err := ob.On(pool).Publish(t.Context(), message(id, "")); err != nil {
			t.Fatal(err)
		}
		direct := false
		postridertest.Eventually(t, func() error {
			if direct = accepted(id); !direct && !h.waits() {
				return fmt.Errorf("message %s does not come, and nobody looks for it", id)
			}
			return nil
		})
		h.open()
		if direct {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("none of %d messages went without a look at the tables", n+1)
		}
		postridertest.Eventually(t, func() error {
			if !accepted(id) {
				return fmt.Errorf("message %s does not come", id)
			}
			return nil
		})
	}
}

// The proof run of the direct way: writers whose messages go with the COMMIT, beside others, on the pool of two relays, all of
// whose connections are cut again and again, while the broker is away now and then and the ring is truncated. Each transaction
// takes a lock for its key before anything else, under which the ledger is written, so that its order is that of the commits.
func TestProofDirect(t *testing.T) {
	t.Parallel()
	base, ob := proofSetup(t)
	pool, crash := relayPool(t, base)
	crashes, refusals := 0, 0
	rnd := rand.New(rand.NewPCG(3, 3))
	b := &broker{}
	b.before = func([]*postrider.Message) error {
		if rnd.IntN(40) > 0 {
			return nil
		}
		refusals++
		return postrider.Errorf(postrider.Unavailable, "away")
	}
	b.after = func([]*postrider.Message) {
		if rnd.IntN(60) == 0 {
			crashes++
			crash()
		}
	}
	cfg := outbox.RelayConfig{
		Outbox: ob, BatchSize: 50, LeaseTTL: 1500 * time.Millisecond, PollInterval: 20 * time.Millisecond, Retain: 250 * time.Millisecond,
	}
	start(t, pool, b, cfg)
	start(t, pool, b, cfg)

	ctx := t.Context()
	write := func(tx pgx.Tx, rnd *rand.Rand, id string) error {
		key := rnd.IntN(proofKeys)
		if _, err := tx.Exec(ctx, `select pg_advisory_xact_lock(77, $1)`, key); err != nil {
			return err
		}
		for i := range 1 + rnd.IntN(3) {
			m := message(fmt.Sprint(id, "-", i), fmt.Sprint("key", key))
			if _, err := tx.Exec(ctx, `insert into ledger (key, id) values ($1, $2)`, m.Key(), m.ID); err != nil {
				return err
			}
			if err := ob.In(tx).Publish(ctx, m); err != nil {
				return err
			}
		}
		if _, err := tx.Exec(ctx, `select pg_sleep($1)`, rnd.ExpFloat64()*float64(rnd.IntN(10))/1000); err != nil || rnd.IntN(8) > 0 {
			return err
		}
		return errOnPurpose
	}
	var wg sync.WaitGroup
	for w := range 6 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 4))
			for i := range 200 {
				id := fmt.Sprint(w, "-", i)
				fn := func(tx pgx.Tx) error { return write(tx, rnd, id) }
				if rnd.IntN(4) == 0 {
					_ = pgx.BeginFunc(ctx, pool, fn) // the ledger knows how it ended
				} else {
					_ = pgx.BeginFunc(ctx, ob.On(pool), fn)
				}
			}
		})
	}
	wg.Wait()
	b.set(func(b *broker) { b.before, b.after = nil, nil })

	want := ledger(t, base)
	committed := 0
	for _, ids := range want {
		committed += len(ids)
	}
	postridertest.Eventually(t, func() error {
		if n := len(b.ids()); n < committed {
			return fmt.Errorf("%d of %d messages sent", n, committed)
		}
		return nil
	})
	lost, ghosts, wrongOrder := audit(b.copy(), want)
	if lost > 0 || ghosts > 0 || len(wrongOrder) > 0 {
		t.Errorf("%d lost, %d that were rolled back, order broken of %q", lost, ghosts, wrongOrder)
	}
	if crashes == 0 || refusals == 0 || committed < 500 {
		t.Errorf("%d crashes, %d refusals, %d committed: the test shows too little", crashes, refusals, committed)
	}
	t.Logf("%d committed, %d crashes, %d refusals, %d repeated", committed, crashes, refusals, b.repeated)
}
