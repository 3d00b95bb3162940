package bus_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// A message that is not wanted is no success: it does not close the circuit, and it does not keep it from being probed.
func TestFilterAndCircuitBreaker(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	var calls, up atomic.Int64
	err := b.Subscribe(noted.Handler(func(context.Context, postrider.Event[note]) error {
		if calls.Add(1); up.Load() == 0 {
			return errors.New("the database is down")
		}
		return nil
	}), bus.Filter(func(m *postrider.Message) bool { return m.Subject == "wanted" }),
		bus.CircuitBreaker(3, 20*time.Millisecond), bus.Concurrency(1), bus.From(bus.DeliverAll),
		bus.Retry(postrider.RetryPolicy{Attempts: -1, Initial: time.Millisecond, Max: 2 * time.Millisecond}))
	if err != nil {
		t.Fatal(err)
	}
	const pairs = 30
	for i := range pairs {
		for _, subject := range []string{"unwanted", "wanted"} {
			if err := noted.Publish(t.Context(), b, &note{N: i}, postrider.Subject(subject)); err != nil {
				t.Fatal(err)
			}
		}
	}
	run(t, b)
	postridertest.Eventually(t, func() error {
		if s := b.Stats(); s.Filtered != pairs {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	up.Store(1)
	postridertest.Eventually(t, func() error {
		if s := b.Stats(); s.Handled != pairs || s.Filtered != pairs || s.DeadLettered != 0 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	wantSettled(t, nc)
}

// In a message with several events each is asked about.
func TestFilterOfABatchOfEvents(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	var got calls
	err := b.Subscribe(noted.Handler(func(_ context.Context, e postrider.Event[note]) error { got.add(e.ID); return nil }),
		bus.Filter(func(m *postrider.Message) bool { return m.ID != "b" }), bus.Ordered(), bus.ParkFailures(), quick, bus.From(bus.DeliverAll))
	if err != nil {
		t.Fatal(err)
	}
	run(t, b)
	<-b.Started()
	send(t, nc, "application/cloudevents-batch+protobuf", protoBatch(t, "a", "b", "c"))
	postridertest.Eventually(t, func() error {
		if s := b.Stats(); got.String() != "a c" || s.Handled != 2 || s.Filtered != 1 || s.DeadLettered != 0 || s.Parked != 0 {
			return fmt.Errorf("handled %q, %+v", got.String(), s)
		}
		return nil
	})
	wantSettled(t, nc)
}
