package outbox

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

func newOutbox(t *testing.T, cfg Config) *Outbox {
	t.Helper()
	cfg.Source = "//shop/orders"
	ob, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return ob
}

// pokers returns the two ends of one subject, each on a connection of its own.
func pokers(t *testing.T, srv *postridertest.NATSServer) (sender, receiver *bus.Poker) {
	t.Helper()
	var ends [2]*bus.Poker
	for i := range ends {
		b, err := bus.New(srv.Connect(), bus.Config{Source: "//shop", Prefix: "staging"})
		if err == nil {
			ends[i], err = b.Poker("orders")
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return ends[0], ends[1]
}

func awaitWake(t *testing.T, ob *Outbox) {
	t.Helper()
	select {
	case <-ob.committed:
	case <-time.After(30 * time.Second):
		t.Fatal("the relay was not woken")
	}
}

func TestPokeWakesAnotherProcess(t *testing.T) {
	t.Parallel()
	pool, srv := postridertest.Postgres(t), postridertest.NewNATS(t)
	if err := Migrate(t.Context(), pool, ""); err != nil {
		t.Fatal(err)
	}
	sender, receiver := pokers(t, srv)
	here, there := newOutbox(t, Config{Poker: receiver}), newOutbox(t, Config{Poker: sender})
	relay, err := NewRelay(pool, new(postridertest.Recorder), RelayConfig{Outbox: here})
	if err != nil {
		t.Fatal(err)
	}
	stop := relay.hearPokes(t.Context())
	defer stop()
	m := &postrider.Message{ID: "1", Type: "orders.placed.v1"}
	for name, publish := range map[string]func() error{
		"on": func() error { return there.On(pool).Publish(t.Context(), m) },
		"in": func() error {
			return pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error { return there.In(tx).Publish(t.Context(), m) })
		},
		"with the commit": func() error {
			return pgx.BeginFunc(t.Context(), there.On(pool), func(tx pgx.Tx) error { return there.In(tx).Publish(t.Context(), m) })
		},
	} {
		postridertest.Eventually(t, func() error { // the subscription may not have reached the server yet
			if err := publish(); err != nil {
				return err
			}
			select {
			case <-here.wake:
				return nil
			case <-time.After(100 * time.Millisecond):
				return fmt.Errorf("%s: the relay was not woken", name)
			}
		})
	}
	srv.Stop() // then publishing goes on
	if err := there.On(pool).Publish(t.Context(), m); err != nil {
		t.Error(err)
	}
}

// counted counts pokes.
type counted struct {
	n    atomic.Int64
	last atomic.Int64 // Unix nanoseconds
}

func (c *counted) Poke() error {
	c.n.Add(1)
	c.last.Store(time.Now().UnixNano())
	return nil
}

func (*counted) OnPoke(func()) (func(), error) { return func() {}, nil }

// However many publish, there is a poke in two milliseconds at most, and one after the last of them.
func TestPokesAreFew(t *testing.T) {
	t.Parallel()
	c := &counted{}
	ob := newOutbox(t, Config{Poker: c})
	began := time.Now()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 2000 {
				ob.soon()
			}
		})
	}
	wg.Wait()
	last := time.Now()
	ob.now(false)
	postridertest.Eventually(t, func() error {
		if c.last.Load() < last.UnixNano() {
			return fmt.Errorf("%d pokes, none after the last message", c.n.Load())
		}
		return nil
	})
	if n, limit := c.n.Load(), int64(time.Since(began)/pokeEvery)+2; n > limit {
		t.Errorf("%d pokes, want at most %d", n, limit)
	}
}

func TestNotificationWakesTheRelay(t *testing.T) {
	t.Parallel()
	pool := postridertest.Postgres(t)
	ob := newOutbox(t, Config{Schema: "shop"})
	relay, err := NewRelay(pool, new(postridertest.Recorder), RelayConfig{Outbox: ob, Listen: pool, Logger: postridertest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { relay.listen(ctx); close(done) }()
	notify := func(schema string) {
		if _, err := pool.Exec(t.Context(), `select pg_notify('postrider_outbox', $1)`, schema); err != nil {
			t.Fatal(err)
		}
	}
	awaitWake(t, ob) // once it listens: there may have been something before
	notify("elsewhere")
	notify("shop")
	awaitWake(t, ob)

	// A connection that breaks is replaced.
	if _, err := pool.Exec(t.Context(), `select pg_terminate_backend(pid) from pg_stat_activity where query like 'listen%' and
		datname = current_database()`); err != nil {
		t.Fatal(err)
	}
	awaitWake(t, ob)
	notify("shop")
	awaitWake(t, ob)
	cancel()
	<-done
}

// lines gets what is logged, as long as there is room.
type lines chan string

func (l lines) Write(p []byte) (int, error) {
	select {
	case l <- string(p):
	default:
	}
	return len(p), nil
}

// A relay whose Listen leads through a pooler finds out and says so, and sends what SQL writers write all the same.
func TestListenThroughPgBouncer(t *testing.T) {
	t.Parallel()
	direct := postridertest.Postgres(t)
	pool := postridertest.PgBouncer(t, direct, pgx.QueryExecModeExec)
	if err := Migrate(t.Context(), pool, ""); err != nil {
		t.Fatal(err)
	}
	said, got := make(lines, 100), all{make(chan int, 10)}
	relay, err := NewRelay(pool, got, RelayConfig{
		Outbox: newOutbox(t, Config{}), Listen: pool, PollInterval: 50 * time.Millisecond, Logger: slog.New(slog.NewTextHandler(said, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, relay)
	for deadline := time.After(60 * time.Second); ; {
		var text string
		select {
		case text = <-said:
		case <-deadline:
			t.Fatal("nothing is said about notifications that do not arrive")
		}
		if strings.Contains(text, errDeaf.Error()) {
			break
		}
	}
	if err := newOutbox(t, Config{}).On(pool).Publish(t.Context(), &postrider.Message{ID: "1", Type: "orders.placed.v1"}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-got.n:
	case <-time.After(30 * time.Second):
		t.Fatal("the message was not sent")
	}
}

// all accepts everything and tells how much.
type all struct{ n chan int }

func (a all) Publish(_ context.Context, msgs ...*postrider.Message) error {
	a.n <- len(msgs)
	return nil
}

// Each way to wake the relay can be switched off, and what is left does.
func TestWhateverWakesTheRelay(t *testing.T) {
	t.Parallel()
	srv := postridertest.NewNATS(t)
	for i := range 16 {
		sameProcess, poke, listen, poll := i&1 > 0, i&2 > 0, i&4 > 0, i&8 > 0
		t.Run(fmt.Sprintf("same process %v poke %v listen %v poll %v", sameProcess, poke, listen, poll), func(t *testing.T) {
			t.Parallel()
			pool := postridertest.Postgres(t)
			if err := Migrate(t.Context(), pool, ""); err != nil {
				t.Fatal(err)
			}
			cfg, cfgThere := Config{}, Config{}
			if poke {
				sender, receiver := pokers(t, srv)
				cfg.Poker, cfgThere.Poker = receiver, sender
			}
			ob := newOutbox(t, cfg)
			there := ob
			if !sameProcess {
				there = newOutbox(t, cfgThere)
			}
			relayCfg := RelayConfig{Outbox: ob, PollInterval: time.Hour, Logger: postridertest.Logger(t)}
			if listen {
				relayCfg.Listen = pool
			}
			if poll {
				relayCfg.PollInterval = 50 * time.Millisecond
			}
			got := all{make(chan int, 10)}
			relay, err := NewRelay(pool, got, relayCfg)
			if err != nil {
				t.Fatal(err)
			}
			run(t, relay)
			for range 3 {
				if err := there.On(pool).Publish(t.Context(), &postrider.Message{ID: "1", Type: "orders.placed.v1"}); err != nil {
					t.Fatal(err)
				}
				if listen { // as an SQL writer would
					if _, err := pool.Exec(t.Context(), `notify postrider_outbox, 'postrider'`); err != nil {
						t.Fatal(err)
					}
				}
				select {
				case <-got.n:
				case <-time.After(30 * time.Second):
					t.Fatal("the message was not sent")
				}
			}
		})
	}
}

func run(t *testing.T, relay *Relay) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- relay.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// statements counts what a pool sends.
type statements struct{ n atomic.Int64 }

func (s *statements) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	s.n.Add(1)
	return ctx
}
func (*statements) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}
func (s *statements) TraceBatchStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	return ctx
}

func (s *statements) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) { s.n.Add(1) }
func (*statements) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData)       {}

// An idle relay with its defaults makes at most four queries a second.
func TestIdleRelayAsksSeldom(t *testing.T) {
	t.Parallel()
	pool := postridertest.Postgres(t)
	if err := Migrate(t.Context(), pool, ""); err != nil {
		t.Fatal(err)
	}
	cfg, count := pool.Config(), &statements{}
	cfg.ConnConfig.Tracer = count
	traced, err := pgxpool.NewWithConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(traced.Close)
	ob := newOutbox(t, Config{})
	got := all{make(chan int, 1)}
	relay, err := NewRelay(traced, got, RelayConfig{Outbox: ob, Logger: postridertest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	run(t, relay)
	if err := ob.On(pool).Publish(t.Context(), &postrider.Message{ID: "1", Type: "orders.placed.v1"}); err != nil {
		t.Fatal(err)
	}
	<-got.n
	// From the second lease renewal on it has nothing to do but to look and to renew.
	until := time.Now().Add(2 * time.Second)
	postridertest.Eventually(t, func() error { return past(until) })
	before, began := count.n.Load(), time.Now()
	until = began.Add(4 * time.Second)
	postridertest.Eventually(t, func() error { return past(until) })
	seconds := time.Since(began).Seconds()
	if n := float64(count.n.Load() - before); n > 4*seconds+1 {
		t.Errorf("%.0f queries in %.1f s", n, seconds)
	}
}

func past(t time.Time) error {
	if time.Now().Before(t) {
		return fmt.Errorf("it is not %v yet", t)
	}
	return nil
}
