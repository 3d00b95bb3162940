package bus_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

func TestCircuitBreaker(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	const messages, limit, concurrency = 40, 3, 4
	var up atomic.Bool
	var calls, failures atomic.Int64
	var got seen
	var buses []*bus.Bus
	for range 2 {
		b := newBus(t, nc)
		h := noted.Handler(func(_ context.Context, e postrider.Event[note]) error {
			calls.Add(1)
			if !up.Load() {
				failures.Add(1)
				return errors.New("the database is down")
			}
			got.add(*e.Value)
			return nil
		})
		// So many attempts that only the breaker keeps them from being burned, and the message from the dead letters.
		err := b.Subscribe(h, bus.CircuitBreaker(limit, 300*time.Millisecond), bus.Concurrency(concurrency), bus.From(bus.DeliverAll),
			bus.Retry(postrider.RetryPolicy{Attempts: 10, Initial: time.Millisecond, Max: 2 * time.Millisecond}))
		if err != nil {
			t.Fatal(err)
		}
		run(t, b)
		buses = append(buses, b)
	}
	pub := newBus(t, nc)
	publishNotes(t, pub, 0, messages)
	// Through several pauses each probe is one more failure, and nothing else is tried.
	postridertest.Eventually(t, func() error {
		if n := failures.Load(); n < 2*(limit+concurrency)+4 {
			return fmt.Errorf("%d failed attempts", n)
		}
		return nil
	})
	up.Store(true)
	postridertest.Eventually(t, wantCount(got.distinct, messages))
	for _, b := range buses {
		if n := b.Stats().DeadLettered; n != 0 {
			t.Errorf("%d messages went to the dead letters although the breaker should have saved their attempts", n)
		}
	}
	if n := failures.Load(); n > 60 {
		t.Errorf("%d attempts failed in about four pauses", n)
	}
}

func TestCircuitBreakerDrains(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	var failures atomic.Int64
	h := noted.Handler(func(context.Context, postrider.Event[note]) error {
		failures.Add(1)
		return errors.New("down")
	})
	if err := b.Subscribe(h, bus.CircuitBreaker(1, time.Hour), bus.Concurrency(1), bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	stop := run(t, b)
	publishNotes(t, b, 0, 5)
	postridertest.Eventually(t, wantCount(func() int { return int(failures.Load()) }, 1))
	if err := stop(); err != nil { // with workers that wait for the pause to end
		t.Error(err)
	}
}

func TestRateLimit(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	pub := newBus(t, nc)
	const messages, rate = 21, 100
	publishNotes(t, pub, 0, messages)
	var got seen
	var mu sync.Mutex
	var first, last time.Time
	b := newBus(t, nc)
	h := noted.Handler(func(_ context.Context, e postrider.Event[note]) error {
		mu.Lock()
		if last = time.Now(); first.IsZero() {
			first = last
		}
		mu.Unlock()
		got.add(*e.Value)
		return nil
	})
	if err := b.Subscribe(h, bus.RateLimit(rate), bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	postridertest.Eventually(t, wantCount(got.distinct, messages))
	mu.Lock()
	defer mu.Unlock()
	// Less by one place, in which the first handler may have been late.
	if took := last.Sub(first); took < (messages-2)*time.Second/rate {
		t.Errorf("%d messages at %d/s took only %v", messages, rate, took)
	}
}
