package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"net"
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

func ids(msgs []*postrider.Message) []string {
	out := make([]string, len(msgs))
	for i, m := range msgs {
		out[i] = m.ID
	}
	return out
}

// clonePool returns a second pool on the same database.
func clonePool(t testing.TB, pool *pgxpool.Pool, change func(*pgxpool.Config)) *pgxpool.Pool {
	t.Helper()
	cfg := pool.Config()
	change(cfg)
	clone, err := pgxpool.NewWithConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(clone.Close)
	return clone
}

// relayPool returns a pool and a function that breaks its connections as a crash of the relay would.
func relayPool(t testing.TB, pool *pgxpool.Pool) (*pgxpool.Pool, func()) {
	name := "relay " + postrider.NewID()
	clone := clonePool(t, pool, func(cfg *pgxpool.Config) { cfg.ConnConfig.RuntimeParams["application_name"] = name })
	ctx := context.WithoutCancel(t.Context())
	return clone, func() {
		if _, err := pool.Exec(ctx, `select pg_terminate_backend(pid) from pg_stat_activity where application_name = $1`, name); err != nil {
			t.Error(err)
		}
	}
}

func wantRows(t testing.TB, pool *pgxpool.Pool, table string, want int) {
	t.Helper()
	postridertest.Eventually(t, func() error {
		var n int
		err := pool.QueryRow(t.Context(), `select count(*) from `+table).Scan(&n)
		if err == nil && n != want {
			err = fmt.Errorf("%s has %d rows, want %d", table, n, want)
		}
		return err
	})
}

func TestRestartRepeatsAndLosesNothing(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	b := &broker{}
	msgs := messages(40)
	for i := range 4 {
		_, stop := start(t, pool, b, quick(ob))
		publish(t, pool, ob, msgs[10*i:10*i+10]...)
		wantIDs(t, b, ids(msgs[:10*i+10])...)
		stop()
	}
	if b.repeated != 0 {
		t.Errorf("%d messages were sent again after an orderly stop", b.repeated)
	}
}

func TestCrashBetweenPublishAndCursor(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	relays, crash := relayPool(t, pool)
	crashes := 0
	b := &broker{}
	b.after = func([]*postrider.Message) {
		if crashes < 3 {
			crashes++
			crash()
		}
	}
	msgs := messages(120)
	publish(t, pool, ob, msgs...)
	cfg := quick(ob)
	cfg.BatchSize = 50
	start(t, relays, b, cfg)
	wantIDs(t, b, ids(msgs)...)
	if b.repeated == 0 {
		t.Error("nothing was sent again: no crash came before the cursor was written, the test shows nothing")
	}
}

func TestServerCrash(t *testing.T) {
	t.Parallel()
	server := postridertest.NewPostgres(t)
	pool := server.Pool()
	if err := outbox.Migrate(t.Context(), pool, ""); err != nil {
		t.Fatal(err)
	}
	ob, err := outbox.New(outbox.Config{Source: "//s"})
	if err != nil {
		t.Fatal(err)
	}
	b, msgs := &broker{}, messages(30)
	publish(t, pool, ob, msgs[:10]...)
	server.Stop()
	start(t, server.Pool(), b, quick(ob)) // begins while the server is away
	server.Start()
	wantIDs(t, b, ids(msgs[:10])...)
	server.Kill()
	server.Start()
	postridertest.Eventually(t, func() error { return pool.Ping(t.Context()) })
	publish(t, pool, ob, msgs[10:]...)
	wantIDs(t, b, ids(msgs)...)
}

func TestOneOfSeveralRelaysLeads(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	b := &broker{}
	first, stopFirst := start(t, pool, b, quick(ob))
	postridertest.Eventually(t, func() error {
		if !first.Stats().Leading {
			return errors.New("the only relay does not lead")
		}
		return nil
	})
	patient := quick(ob)
	patient.LeaseTTL = time.Hour // so that only a lease given back explains the change
	second, _ := start(t, pool, b, patient)
	msgs := messages(400)
	for i := range 20 {
		publish(t, pool, ob, msgs[10*i:10*i+10]...)
	}
	wantIDs(t, b, ids(msgs[:200])...)
	if second.Stats().Leading {
		t.Error("two relays lead")
	}
	stopFirst()
	publish(t, pool, ob, msgs[200:]...)
	wantIDs(t, b, ids(msgs)...)
	postridertest.Eventually(t, func() error { // the broker has a message a moment before the relay counts it
		if s := second.Stats(); !s.Leading || s.Published != 200 || first.Stats().Published != 200 {
			return fmt.Errorf("after the change: second %+v, first %+v", s, first.Stats())
		}
		return nil
	})
	if b.repeated != 0 {
		t.Errorf("%d messages were published twice", b.repeated)
	}
}

// cable is the network of a relay that can be cut: what it has open breaks and nothing new opens, so that the relay cannot even
// say good-bye.
type cable struct {
	mu    sync.Mutex
	cut   bool
	conns []net.Conn
}

func (c *cable) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cut {
		return nil, errors.New("the cable is cut")
	}
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err == nil {
		c.conns = append(c.conns, conn)
	}
	return conn, err
}

func (c *cable) Cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut = true
	for _, conn := range c.conns {
		conn.Close()
	}
}

func TestTakeOverFromADeadRelay(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	var network cable
	doomed := clonePool(t, pool, func(cfg *pgxpool.Config) { cfg.ConnConfig.DialFunc = network.dial })
	b, msgs := &broker{}, messages(20)
	first, stopFirst := start(t, doomed, b, quick(ob))
	publish(t, pool, ob, msgs[:10]...)
	wantIDs(t, b, ids(msgs[:10])...)
	second, _ := start(t, pool, b, quick(ob))
	network.Cut()
	publish(t, pool, ob, msgs[10:]...)
	wantIDs(t, b, ids(msgs)...)
	if !second.Stats().Leading {
		t.Error("the second relay does not lead")
	}
	postridertest.Eventually(t, func() error {
		if first.Stats().Leading {
			return errors.New("the relay without a network believes that it leads")
		}
		return nil
	})
	stopFirst()
}

func TestPublisherDownThenUp(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	b := &broker{before: func([]*postrider.Message) error { return postrider.Errorf(postrider.Unavailable, "no broker") }}
	msgs := messages(30)
	for _, m := range msgs {
		publish(t, pool, ob, m)
	}
	relay, _ := start(t, pool, b, quick(ob)) // after them: the depth is not exact about transactions that are open
	postridertest.Eventually(t, func() error {
		// Longer than the lease: the relay renews it while it cannot publish.
		if s := relay.Stats(); s.Lag < 2*time.Second || s.Depth != 30 || !s.Leading || s.Published != 0 {
			return fmt.Errorf("stats %+v, want a lag of 2 s and a depth of 30", s)
		}
		return nil
	})
	b.set(func(b *broker) { b.before = nil })
	wantIDs(t, b, ids(msgs)...)
	postridertest.Eventually(t, func() error {
		if s := relay.Stats(); s.Lag != 0 || s.Depth != 0 || s.Published != 30 || s.Dead != 0 {
			return fmt.Errorf("stats %+v, want all published and nothing waiting", s)
		}
		return nil
	})
	var fence int
	if err := pool.QueryRow(t.Context(), `select fence from postrider.postrider_outbox_relay`).Scan(&fence); err != nil || fence != 1 {
		t.Errorf("fence %d, %v: the lease was lost on the way", fence, err)
	}
}

func TestStopWhilePublisherIsDown(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	tried := make(chan struct{}, 100)
	b := &broker{before: func([]*postrider.Message) error {
		tried <- struct{}{}
		return postrider.Errorf(postrider.Unavailable, "no broker")
	}}
	publish(t, pool, ob, messages(3)...)
	_, stop := start(t, pool, b, outbox.RelayConfig{Outbox: ob, DrainTimeout: time.Hour})
	<-tried
	stop()
	b.set(func(b *broker) { b.before = nil })
	start(t, pool, b, outbox.RelayConfig{Outbox: ob}) // the lease was given back, or this would take 5 s
	wantIDs(t, b, "0", "1", "2")
}

func TestRefusedForGoodGoesToTheDead(t *testing.T) {
	t.Parallel()
	refusal := postrider.Permanent(errors.New("too large for the stream"))
	poison := func(m *postrider.Message) error {
		if strings.HasPrefix(m.ID, "poison") {
			return refusal
		}
		return nil
	}
	for name, configure := range map[string]func(*broker){
		"told by message": func(b *broker) { b.refuse = poison },
		"told by batch": func(b *broker) {
			b.before = func(batch []*postrider.Message) error {
				for _, m := range batch {
					if err := poison(m); err != nil {
						return err
					}
				}
				return nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool, ob := setup(t)
			b := &broker{}
			configure(b)
			publish(t, pool, ob, message("1", "k"), message("poison 1", "k"), message("2", "k"), message("poison 2", ""), message("3", ""))
			_, err := pool.Exec(t.Context(), `insert into postrider.postrider_outbox (topic, attributes) values ('bad.v1', '\xff')`)
			if err != nil {
				t.Fatal(err)
			}
			relay, stop := start(t, pool, b, quick(ob))
			wantIDs(t, b, "1", "2", "3")
			wantRows(t, pool, "postrider.postrider_outbox_dead where cause like '%too large for the stream%'", 2)
			wantRows(t, pool, "postrider.postrider_outbox_dead where cause like 'cloudevents protobuf format%' and topic = 'bad.v1'", 1)
			stop()
			if s := relay.Stats(); s.Dead != 3 || s.Published != 3 {
				t.Errorf("stats %+v, want 3 dead and 3 published", s)
			}

			// As the migration says: inserted again, they are sent.
			b.set(func(b *broker) { b.refuse, b.before = nil, nil })
			_, err = pool.Exec(t.Context(), `insert into postrider.postrider_outbox (topic, attributes, data)
				select topic, attributes, data from postrider.postrider_outbox_dead where cause like '%stream%' order by id`)
			if err != nil {
				t.Fatal(err)
			}
			start(t, pool, b, quick(ob))
			wantIDs(t, b, "1", "2", "3", "poison 1", "poison 2")
		})
	}
}

// A message accepted ahead of an earlier one of its key is sent once more behind it.
func TestPartialFailureKeepsTheOrderOfAKey(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	var mu sync.Mutex
	var sent []string // duplicates too
	failed := 0
	b := &broker{}
	b.refuse = func(m *postrider.Message) error {
		mu.Lock()
		defer mu.Unlock()
		if m.ID == "a1" && failed < 2 {
			failed++
			return postrider.Errorf(postrider.Unavailable, "later")
		}
		sent = append(sent, m.ID)
		return nil
	}
	publish(t, pool, ob, message("a1", "a"), message("b1", "b"), message("a2", "a"), message("x", ""), message("b2", "b"))
	start(t, pool, b, quick(ob))
	want := "b1 a2 x b2 a2 a1 a2"
	postridertest.Eventually(t, func() error {
		mu.Lock()
		defer mu.Unlock()
		if got := strings.Join(sent, " "); got != want {
			return fmt.Errorf("sent %s, want %s", got, want)
		}
		return nil
	})
}

func TestSQLWriters(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	_, err := pool.Exec(t.Context(), `insert into postrider.postrider_outbox (topic, data) values ('orders.placed.v1', '{"id":"ä"}')`)
	if err != nil {
		t.Fatal(err)
	}
	b := &broker{}
	start(t, pool, b, quick(ob))
	postridertest.Eventually(t, func() error {
		if len(b.ids()) != 1 {
			return errors.New("not sent")
		}
		return nil
	})
	m := b.accepted[0]
	if err := m.Validate(); err != nil {
		t.Error(err)
	}
	e, err := orderPlaced().Decode(m)
	if err != nil || e.Value.ID != "ä" || m.Source != "//shop/orders" || m.Type != "orders.placed.v1" || !strings.HasSuffix(m.ID, "-1") || m.Time.IsZero() {
		t.Errorf("got %+v %+v, %v", m, e.Value, err)
	}
}

func TestSchemasSideBySide(t *testing.T) {
	t.Parallel()
	pool, ctx := postridertest.Postgres(t), t.Context()
	var stop func() // of the last one
	for _, schema := range []string{"orders", "stock"} {
		if err := outbox.Migrate(ctx, pool, schema); err != nil {
			t.Fatal(err)
		}
		ob, err := outbox.New(outbox.Config{Source: "//" + schema, Schema: schema})
		if err != nil {
			t.Fatal(err)
		}
		b := &broker{}
		_, stop = start(t, pool, b, quick(ob))
		publish(t, pool, ob, message(schema, ""))
		wantIDs(t, b, schema)
	}
	stop()
	if err := outbox.MigrateDown(ctx, pool, "stock"); err != nil {
		t.Fatal(err)
	}
	sql, err := outbox.MigrateSQL("stock")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(ctx, sql); err != nil {
		t.Fatal(err)
	}
}

// Poolers in transaction mode allow these modes; the default one is in all other tests.
func TestQueryModes(t *testing.T) {
	t.Parallel()
	for _, mode := range []pgx.QueryExecMode{
		pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol,
	} {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			base, ob := setup(t)
			pool := clonePool(t, base, func(cfg *pgxpool.Config) { cfg.ConnConfig.DefaultQueryExecMode = mode })
			b := &broker{refuse: func(m *postrider.Message) error {
				if m.ID == "7" {
					return postrider.Permanent(errors.New("no"))
				}
				return nil
			}}
			publish(t, pool, ob, message("0", "k"))
			cfg := quick(ob)
			cfg.Retain = 200 * time.Millisecond
			_, stop := start(t, pool, b, cfg)
			publish(t, pool, ob, messages(8)[1:]...)
			wantIDs(t, b, "0", "1", "2", "3", "4", "5", "6")
			wantRows(t, pool, "postrider.postrider_outbox_dead", 1)
			wantRows(t, pool, "postrider.postrider_outbox", 0)
			stop()
		})
	}
}

func TestUnusableOutboxIsAnError(t *testing.T) {
	t.Parallel()
	pool := postridertest.Postgres(t)
	ob, err := outbox.New(outbox.Config{Source: "//s"})
	if err != nil {
		t.Fatal(err)
	}
	relay, err := outbox.NewRelay(pool, &broker{}, outbox.RelayConfig{Outbox: ob})
	if err != nil {
		t.Fatal(err)
	}
	if err := relay.Run(t.Context()); !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), "outbox.Migrate") {
		t.Errorf("Run without tables: %v", err)
	}
	if err := outbox.Migrate(t.Context(), pool, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), `alter sequence postrider.postrider_outbox_seq cache 32`); err != nil {
		t.Fatal(err)
	}
	if err := relay.Run(t.Context()); !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), "CACHE 1") {
		t.Errorf("Run with a cached sequence: %v", err)
	}
}

// A dump restored into another cluster: xids of the rows lie in its future, and the cursor sees what it should not.
func TestRestoredDump(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	b, ctx := &broker{}, t.Context()
	publish(t, pool, ob, message("from the future", ""))
	_, err := pool.Exec(ctx, `
		update postrider.postrider_outbox set xid = '99999999999'::text::xid8;
		update postrider.postrider_outbox_relay set system_id = 1, prev = '99999999990:99999999990:', floor = 70, last = 70`)
	if err != nil {
		t.Fatal(err)
	}
	start(t, pool, b, quick(ob))
	wantIDs(t, b, "from the future")
	publish(t, pool, ob, message("new", "k"))
	wantIDs(t, b, "from the future", "new")
}

func TestLargeMessagesComeInSmallPages(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	msgs := messages(25)
	for _, m := range msgs {
		m.Data = make([]byte, 1<<20-32<<10)
	}
	publish(t, pool, ob, msgs...)
	largest := 0
	b := &broker{before: func(batch []*postrider.Message) error { largest = max(largest, len(batch)); return nil }}
	_, stop := start(t, pool, b, quick(ob))
	wantIDs(t, b, ids(msgs)...)
	stop()
	if largest > 9 {
		t.Errorf("a batch of %d messages of 1 MiB, want at most 8 MiB and one message", largest)
	}
}
