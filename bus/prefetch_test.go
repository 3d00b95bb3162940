package bus_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// What the server counts as delivered and not acknowledged is what the process holds.
func TestPrefetchBoundsBytes(t *testing.T) {
	t.Parallel()
	const size, budget, messages = 16 << 10, 256 << 10, 100
	for name, opts := range map[string][]bus.SubscribeOption{
		"":        nil,
		"ordered": {bus.Ordered()},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nc := postridertest.NATS(t)
			b := newBus(t, nc)
			gate := make(chan struct{})
			var mu sync.Mutex
			seen := map[string]int{}
			const topic = "notes.large.v1"
			err := b.Subscribe(postrider.RawHandler(topic, func(_ context.Context, m *postrider.Message) error {
				<-gate
				mu.Lock()
				defer mu.Unlock()
				seen[m.ID]++
				return nil
			}), append(opts, bus.Concurrency(2), bus.Prefetch(1000, budget), bus.From(bus.DeliverAll), bus.AckWait(time.Minute))...)
			if err != nil {
				t.Fatal(err)
			}
			publishLarge(t, b, topic, messages, size)
			run(t, b)
			<-b.Started()
			// Without a bound all of them would come at once. One fewer than fit may be held, since each has headers too.
			held := func() int {
				c, err := jetStream(t, nc).Consumer(t.Context(), "NOTES", "tester-notes_large_v1")
				if err != nil {
					t.Fatal(err)
				}
				return c.CachedInfo().NumAckPending
			}
			postridertest.Eventually(t, func() error {
				if n := held(); n < budget/size/2 {
					return fmt.Errorf("%d messages are held", n)
				}
				return nil
			})
			for range 10 { // handle one by one; the server may count one that is acknowledged for a moment more, others stay held
				gate <- struct{}{}
				postridertest.Eventually(t, func() error {
					if n := held(); n > budget/size+1 {
						return fmt.Errorf("%d messages of %d bytes are held, want at most %d bytes and a message", n, size, budget)
					}
					return nil
				})
			}
			close(gate)
			postridertest.Eventually(t, func() error {
				mu.Lock()
				defer mu.Unlock()
				if len(seen) != messages {
					return fmt.Errorf("%d messages were handled", len(seen))
				}
				return nil
			})
		})
	}
}

// Messages of which one alone is more than the bound come all the same, between small ones.
func TestPrefetchTakesWhatIsLargerThanItsBound(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	const topic = "notes.large.v1"
	const rounds = 20
	var mu sync.Mutex
	seen := map[string]int{}
	slow := make(chan struct{})
	err := b.Subscribe(postrider.RawHandler(topic, func(_ context.Context, m *postrider.Message) error {
		if m.ID == "0-100-0" { // holds little, for long: the others must not wait for it
			<-slow
		}
		mu.Lock()
		defer mu.Unlock()
		seen[m.ID]++
		return nil
	}), bus.Prefetch(0, 4096), bus.Concurrency(4), bus.From(bus.DeliverAll))
	if err != nil {
		t.Fatal(err)
	}
	want := 0
	for round := range rounds {
		for _, size := range []int{100, 3000, 100 << 10} {
			publishSized(t, b, topic, 3, size, fmt.Sprint(round))
			want += 3
		}
	}
	run(t, b)
	handled := func(want int) {
		t.Helper()
		postridertest.Eventually(t, func() error {
			mu.Lock()
			defer mu.Unlock()
			if len(seen) != want {
				return fmt.Errorf("%d messages were handled, want %d", len(seen), want)
			}
			return nil
		})
	}
	handled(want - 1)
	close(slow)
	handled(want)
}

func TestPrefetchIsChecked(t *testing.T) {
	t.Parallel()
	b := newBus(t, postridertest.NATS(t))
	for _, o := range []bus.SubscribeOption{bus.Prefetch(-1, 0), bus.Prefetch(10_001, 0), bus.Prefetch(0, 1023), bus.Prefetch(0, -1)} {
		err := b.Subscribe(noted.Handler(func(context.Context, postrider.Event[note]) error { return nil }), o)
		if !errors.Is(err, postrider.InvalidArgument) {
			t.Errorf("error is %v, want InvalidArgument", err)
		}
	}
}

func publishLarge(t *testing.T, b *bus.Bus, topic string, n, size int) {
	t.Helper()
	publishSized(t, b, topic, n, size, "large")
}

func publishSized(t *testing.T, b *bus.Bus, topic string, n, size int, prefix string) {
	t.Helper()
	for i := range n {
		m := &postrider.Message{ID: fmt.Sprintf("%s-%d-%d", prefix, size, i), Type: topic, Data: bytes.Repeat([]byte("x"), size)}
		if err := b.Publish(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
}
