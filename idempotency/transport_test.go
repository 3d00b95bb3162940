package idempotency

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
	"github.com/postrider/postrider/rpc"
)

// start runs a bus or a server until the test ends.
func start(t *testing.T, r postrider.Runner) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- postrider.Run(ctx, r) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// On a bus, batches of which single messages are delivered twice, or again because their acknowledgement was lost, with an
// event that is never handled among them.
func TestBatchesOnABus(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const n, bad = 200, "m-77"
	broker, err := bus.New(postridertest.NATS(t), bus.Config{
		Source: "//test/shop", Streams: []bus.Stream{{Name: "ORDERS", Topics: []string{"orders.>"}}}, Logger: postridertest.Logger(t),
	})
	must(t, err)
	s := b.store(Config{})
	h, runs := b.batcher(s, "billing", func(events []postrider.Event[order]) error {
		for _, e := range events {
			if e.ID == bad {
				return postrider.Permanent(errors.New("no such customer"))
			}
		}
		return nil
	})
	faults := postridertest.Faults{Seed: 7, Duplicate: 0.2, FailAck: 0.3}
	must(t, broker.Subscribe(h.With(faults.Middleware()), bus.Group("billing"), bus.From(bus.DeliverAll), bus.Concurrency(3),
		bus.Batch(25, 20*time.Millisecond), bus.Retry(postrider.RetryPolicy{Attempts: -1, Initial: time.Millisecond, Max: 5 * time.Millisecond})))
	msgs := b.events(n, time.Now())
	must(t, broker.Publish(t.Context(), msgs...))
	start(t, broker)
	postridertest.Eventually(t, func() error {
		var effects int
		err := b.pool.QueryRow(t.Context(), `select count(*) from ledger`).Scan(&effects)
		if stats := broker.Stats(); err != nil || effects < n-1 || stats.DeadLettered != 1 || stats.Handled < n-1 {
			return fmt.Errorf("%d effects of %d, %+v, %w", effects, n-1, stats, err)
		}
		return nil
	})
	b.wantOnce("billing", msgs, 77)
	if stats := s.Stats(); stats.Handled != n-1 || stats.Duplicates == 0 {
		t.Errorf("stats %+v", stats)
	}
	t.Logf("%d runs, %+v", runs.Load(), s.Stats())
}

// Calls with an idempotency key get the recorded answer, from whichever instance they meet.
func TestCallsWithAKey(t *testing.T) {
	t.Parallel()
	b := setup(t)
	nc := postridertest.NATS(t)
	for range 2 {
		p := b.store(Config{LockTimeout: -1})
		srv, err := rpc.NewServer(nc, rpc.ServerConfig{})
		must(t, err)
		must(t, srv.Register(Action(p, b.reserve, func(ctx context.Context, tx pgx.Tx, req *order) (*hold, error) {
			if req.Cents > 100 {
				return nil, postrider.Permanent(postrider.Errorf(postrider.ResourceExhausted, "too dear"))
			}
			return &hold{ID: postrider.NewID()}, write(ctx, tx, req.ID)
		})))
		start(t, srv)
	}
	client, err := rpc.NewClient(nc, rpc.ClientConfig{Source: "//test/shop"})
	must(t, err)
	t.Cleanup(client.Close)
	call := func(key string, req order) (*hold, error) {
		return rpc.Call(t.Context(), client, b.reserve, &req, rpc.Attributes(postrider.IdempotencyKey(key)), rpc.WaitForReady(),
			rpc.Timeout(30*time.Second))
	}
	const copies = 12
	ids, errs := make([]string, copies), make([]error, copies)
	var wg sync.WaitGroup
	for i := range copies {
		wg.Go(func() {
			var h *hold
			if h, errs[i] = call("k-1", order{ID: "o-1"}); errs[i] == nil {
				ids[i] = h.ID
			}
		})
	}
	wg.Wait()
	must(t, errors.Join(errs...))
	for _, id := range ids {
		if id != ids[0] || id == "" {
			t.Fatalf("answers %q", ids)
		}
	}
	b.wantEffects("o-1", 1)
	_, err = call("k-1", order{ID: "o-2"})
	wantCode(t, err, postrider.AlreadyExists, false)
	b.wantEffects("o-2", 0)
	for range 2 {
		_, err = call("k-2", order{ID: "o-3", Cents: 101})
		wantCode(t, err, postrider.ResourceExhausted, false)
	}
}
