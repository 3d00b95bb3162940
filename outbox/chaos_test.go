//go:build unix

package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// The broker dies by kill -9 and comes back, again and again, in the middle of batches. POSTRIDER_TEST_RESTARTS is how often.
func TestBrokerRestartsUnderLoad(t *testing.T) {
	t.Parallel()
	restarts := number(t, "POSTRIDER_TEST_RESTARTS", 3)
	s := newScene(t)
	s.start(func(*processConfig) {}).await("leads")
	stop := s.write(4)
	for range restarts {
		s.awaitStored(s.stored() + 50)
		s.nats.kill()
		var committed int
		if err := s.pool.QueryRow(t.Context(), `select count(*) from ledger`).Scan(&committed); err != nil {
			t.Fatal(err)
		}
		wantRows(t, s.pool, fmt.Sprintf(`(select from ledger offset %d limit 1) as t`, committed+50), 1) // a backlog
		s.nats.start()
	}
	stop()
	s.verify()
}

// Slots are emptied and filled again beside transactions that are longer than several turns of the ring: nothing is lost,
// and without a crash nothing is sent twice.
func TestRotationBesideLongTransactions(t *testing.T) {
	t.Parallel()
	pool, ob := proofSetup(t)
	b := &broker{}
	cfg := quick(ob)
	cfg.Retain, cfg.BatchSize = 100*time.Millisecond, 20
	start(t, pool, b, cfg)
	wantRows(t, pool, "postrider.postrider_outbox_relay where period = 0.1", 1)
	writeLoad(t, pool, ob)
	wantRows(t, pool, "postrider.postrider_outbox", 0)
	lost, ghosts, wrongOrder := audit(b.copy(), ledger(t, pool))
	if lost > 0 || ghosts > 0 || len(wrongOrder) > 0 || b.repeated > 0 {
		t.Errorf("%d lost, %d that were rolled back, order broken of %q, %d repeated", lost, ghosts, wrongOrder, b.repeated)
	}
	wantRows(t, pool, `pg_class where relname ~ '^postrider_outbox_[012]$' and relfilenode <> oid`, 3)
}

// Messages that the broker will never take, for three reasons, among good ones of their key and others: they go to the dead
// letters with the cause, and nothing else is held up, lost or out of order.
func TestPoisonAmongGoodMessages(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx, nc := t.Context(), postridertest.NATS(t)
	b := newBus(t, nc)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(ctx, "ORDERS")
	if err != nil {
		t.Fatal(err)
	}
	limited := stream.CachedInfo().Config
	limited.MaxMsgSize = 4096
	if _, err := js.UpdateStream(ctx, limited); err != nil {
		t.Fatal(err)
	}
	msgs := messages(120)
	for i, m := range msgs {
		m.Extensions = message("", fmt.Sprint("key", i%3)).Extensions
	}
	msgs[10].Data = make([]byte, 8000)
	msgs[11].Data = make([]byte, 8000)
	msgs[60].Topic = "nowhere.v1"
	publish(t, pool, ob, msgs...)
	if _, err := pool.Exec(ctx, `update postrider.postrider_outbox set attributes = '\xffff' where id = 91`); err != nil {
		t.Fatal(err)
	}
	relay, _ := start(t, pool, b, quick(ob))
	postridertest.Eventually(t, func() error {
		if s := relay.Stats(); s.Published != 116 || s.Dead != 4 {
			return fmt.Errorf("stats %+v", s)
		}
		return nil
	})
	var report *outbox.AuditReport
	postridertest.Eventually(t, func() error { // until the cursor is written
		if report = wantAudit(t, pool, ob, auditOf(ctx, b)); report.InFlight.Count > 0 {
			return errors.New(report.String())
		}
		return nil
	})
	if !report.OK() || report.Delivered != 116 || report.Dead.Count != 4 || report.Dead.Examples[0].Number != 11 {
		t.Error(report)
	}
	for number, cause := range map[int]string{11: "size", 12: "size", 61: "nowhere.v1", 91: ""} {
		var text string
		if err := pool.QueryRow(ctx, `select cause from postrider.postrider_outbox_dead where id = $1`, number).Scan(&text); err != nil {
			t.Fatal(err)
		}
		if text == "" || !strings.Contains(text, cause) {
			t.Errorf("number %d died of %q", number, text)
		}
	}
}

// PostgreSQL crashes and recovers, again and again, while writers publish: what it says to have committed is sent, each key in its
// order, and nothing else.
func TestDatabaseCrashesUnderLoad(t *testing.T) {
	t.Parallel()
	server := postridertest.NewPostgres(t)
	pool, ctx := server.Pool(), context.WithoutCancel(t.Context())
	if err := outbox.Migrate(ctx, pool, ""); err != nil {
		t.Fatal(err)
	}
	execute(t, pool, `create table ledger (n bigserial primary key, key text, id text)`)
	ob, err := outbox.New(outbox.Config{Source: "//shop/orders"})
	if err != nil {
		t.Fatal(err)
	}
	b := &broker{}
	start(t, server.Pool(), b, quick(ob))
	end := make(chan struct{})
	var writers sync.WaitGroup
	stop := sync.OnceFunc(func() { close(end); writers.Wait() })
	t.Cleanup(stop)
	for w := range 4 {
		writers.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 5))
			for i := 0; ; i++ {
				select {
				case <-end:
					return
				default: // what failed may have committed: the ledger knows
					_ = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error { return writeTransaction(ctx, tx, ob, rnd, fmt.Sprintf("%d-%d", w, i)) })
				}
			}
		})
	}
	for range number(t, "POSTRIDER_TEST_RESTARTS", 3) {
		before := len(b.ids())
		postridertest.Eventually(t, func() error {
			if n := len(b.ids()); n < before+50 {
				return fmt.Errorf("%d were sent, %d before the crash", n, before)
			}
			return nil
		})
		server.Kill()
		server.Start()
	}
	stop()
	postridertest.Eventually(t, func() error { return pool.Ping(ctx) })
	t.Logf("%d committed, %d repeated", wantProof(t, pool, b), b.repeated)
}
