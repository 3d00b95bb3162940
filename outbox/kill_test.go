//go:build unix

package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/idempotency"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// scene is a database with an outbox and a ledger, streams, and processes that relay from the one to the other.
type scene struct {
	testing.TB

	pool  *pgxpool.Pool
	ob    *outbox.Outbox
	nats  *natsProcess
	store *idempotency.Store
	audit outbox.AuditConfig
	js    jetstream.JetStream
	cfg   processConfig
}

// newScene has a consumer handle the messages in order, each once, into the table effects.
func newScene(t *testing.T) *scene {
	t.Helper()
	ctx := t.Context()
	s := &scene{TB: t, nats: newNATSProcess(t)}
	s.pool, s.ob = proofSetup(t)
	if _, err := s.pool.Exec(ctx, `create table effects (n bigserial primary key, key text, id text)`); err != nil {
		t.Fatal(err)
	}
	err := idempotency.Migrate(ctx, s.pool, "")
	if err == nil {
		s.store, err = idempotency.New(s.pool, idempotency.Config{})
	}
	if err != nil {
		t.Fatal(err)
	}
	handler := idempotency.Handler(s.store, "billing", orderPlaced(), func(ctx context.Context, tx pgx.Tx, e postrider.Event[order]) error {
		_, err := tx.Exec(ctx, `insert into effects (key, id) values ($1, $2)`, e.Key(), e.ID)
		return err
	})
	nc := s.nats.connect()
	b := newBus(t, nc, handler)
	if s.js, err = jetstream.New(nc); err != nil {
		t.Fatal(err)
	}
	s.audit = auditOf(context.WithoutCancel(ctx), b)
	s.audit.Inbox, s.audit.Consumer = s.store, "billing"
	s.cfg = processConfig{NATS: s.nats.URL, Postgres: s.pool.Config().ConnString(), Retain: -1, BatchSize: 50}
	return s
}

func (s *scene) start(change func(*processConfig)) *process {
	s.Helper()
	cfg := s.cfg
	change(&cfg)
	return startProcess(s, cfg)
}

// write has writers publish as in the proof run, until the returned function is called.
func (s *scene) write(writers int) (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(s.Context()))
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 7))
			for i := 0; ctx.Err() == nil; i++ {
				err := pgx.BeginFunc(context.WithoutCancel(ctx), s.pool, func(tx pgx.Tx) error {
					return writeTransaction(context.WithoutCancel(ctx), tx, s.ob, rnd, fmt.Sprintf("%d-%d", w, i))
				})
				if err != nil && !errors.Is(err, errOnPurpose) {
					s.Error(err)
					return
				}
			}
		})
	}
	stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	s.Cleanup(stop)
	return stop
}

// fence is the number of the term.
func (s *scene) fence() (n int64) {
	s.Helper()
	if err := s.pool.QueryRow(s.Context(), `select fence from postrider.postrider_outbox_relay`).Scan(&n); err != nil {
		s.Fatal(err)
	}
	return n
}

// stored is how many messages the stream has.
func (s *scene) stored() uint64 {
	s.Helper()
	stream, err := s.js.Stream(s.Context(), "ORDERS")
	if err != nil {
		s.Fatal(err)
	}
	return stream.CachedInfo().State.LastSeq
}

func (s *scene) awaitTerm(after int64) {
	s.Helper()
	postridertest.Eventually(s, func() error {
		if s.fence() <= after {
			return errors.New("nobody took over")
		}
		return nil
	})
}

func (s *scene) awaitStored(above uint64) {
	s.Helper()
	postridertest.Eventually(s, func() error {
		if s.stored() <= above {
			return errors.New("nothing is published")
		}
		return nil
	})
}

// verify compares the ledger with the effects, and audits what the tables still have.
func (s *scene) verify() *outbox.AuditReport {
	s.Helper()
	want := ledger(s, s.pool)
	committed := 0
	for _, ids := range want {
		committed += len(ids)
	}
	postridertest.Eventually(s, func() error {
		var n int
		err := s.pool.QueryRow(s.Context(), `select count(distinct id) from effects`).Scan(&n)
		if err == nil && n != committed {
			err = fmt.Errorf("%d effects of %d messages", n, committed)
		}
		return err
	})
	got := map[string][]string{}
	rows, err := s.pool.Query(s.Context(), `select key, id from effects order by n`)
	if err != nil {
		s.Fatal(err)
	}
	var key, id string
	if _, err := pgx.ForEachRow(rows, []any{&key, &id}, func() error { got[key] = append(got[key], id); return nil }); err != nil {
		s.Fatal(err)
	}
	for key, ids := range want {
		if !slices.Equal(got[key], ids) {
			s.Errorf("key %s took effect as %q\nwant %q", key, got[key], ids)
		}
	}
	var report *outbox.AuditReport
	postridertest.Eventually(s, func() error { // the relay counts what was sent a moment later
		report = wantAudit(s, s.pool, s.ob, s.audit)
		if report.InFlight.Count+report.Unhandled.Count > 0 {
			return errors.New(report.String())
		}
		return nil
	})
	if !report.OK() || report.Dead.Count > 0 {
		s.Error(report)
	}
	s.Logf("%d committed; %v", committed, report)
	return report
}

// Relays die by kill -9 at every point of their work, and others take over: nothing is lost, nothing doubled, every key in
// order. POSTRIDER_TEST_KILLS is how often; the times of the take-overs are logged.
func TestKilledRelays(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	kills := number(t, "POSTRIDER_TEST_KILLS", 3)
	if kills <= 3 {
		s.cfg.TTL, s.cfg.Retain = 1500*time.Millisecond, 500*time.Millisecond // for the default there is no time
	}
	points := []string{afterPublish, beforeCursor, halfPublished, anyMoment, beforePublish, afterCursor}
	if s.cfg.Retain > 0 {
		points = append(points[:2], beforeEmpty)
	}
	rnd := rand.New(rand.NewPCG(3, uint64(kills)))
	started := 0
	start := func() *process {
		return s.start(func(c *processConfig) {
			c.Point, c.Nth = points[started%len(points)], 3+rnd.IntN(20)
			started++
			switch c.Point {
			case beforeEmpty:
				c.Nth = 1 + rnd.IntN(2)
			case anyMoment:
				c.Nth *= 50
			}
		})
	}
	relays := []*process{start(), start()}
	deaths := 0
	replace := func() { // those that have died; a successor may die as well before it sends anything new
		for i, r := range relays {
			select {
			case <-r.died:
				deaths++
				relays[i] = start()
			default:
			}
		}
	}
	stop := s.write(4)
	var leases, firsts []time.Duration
	s.awaitTerm(0)
	for deaths < kills {
		fence := s.fence()
		select {
		case <-relays[0].died:
		case <-relays[1].died:
		case <-time.After(2 * time.Minute):
			t.Fatalf("no relay died: %d did so far", deaths)
		}
		began := time.Now()
		replace()
		s.awaitTerm(fence)
		leases = append(leases, time.Since(began))
		before := s.stored()
		postridertest.Eventually(t, func() error {
			replace()
			if s.stored() <= before {
				return errors.New("nothing is published")
			}
			return nil
		})
		firsts = append(firsts, time.Since(began))
	}
	s.start(func(*processConfig) {}) // one that lives
	for _, r := range relays {
		_ = r.Process.Kill()
	}
	stop()
	s.verify()
	for what, times := range map[string][]time.Duration{"the lease": leases, "the next message": firsts} {
		slices.Sort(times)
		t.Logf("%d kills, from death to %s: median %v, worst %v", deaths, what, times[len(times)/2], times[len(times)-1])
	}
}

// A relay that is stopped for longer than its lease and then goes on meets its successor's fence: it cannot write the
// cursor, and what it still publishes are duplicates by id. POSTRIDER_TEST_STOP is for how many seconds it is stopped.
func TestZombieRelay(t *testing.T) {
	t.Parallel()
	for _, point := range []string{beforePublish, afterPublish, beforeCursor} {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			s := newScene(t)
			s.cfg.TTL = 1500 * time.Millisecond
			noteTerms(t, s.pool)
			stop := s.write(2)
			zombie := s.start(func(c *processConfig) { c.Point, c.Nth, c.Hold = point, 5, true })
			zombie.await("holds")
			if err := zombie.Process.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			if _, err := fmt.Fprintln(zombie.in, "go on"); err != nil { // once it is continued
				t.Fatal(err)
			}
			stopped, fence := time.Now(), s.fence()
			s.start(func(*processConfig) {}).await("leads")
			s.awaitTerm(fence)
			for time.Since(stopped) < time.Duration(number(t, "POSTRIDER_TEST_STOP", 0))*time.Second {
				s.awaitStored(s.stored())
			}
			s.awaitStored(s.stored() + 20)
			if err := zombie.Process.Signal(syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
			zombie.await("follows")
			s.awaitStored(s.stored() + 20)
			stop()
			s.verify()
			wantTerms(t, s.pool)
		})
	}
}
