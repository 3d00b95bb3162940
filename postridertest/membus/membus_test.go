package membus_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
	"github.com/postrider/postrider/postridertest/bustest"
	"github.com/postrider/postrider/postridertest/membus"
)

func TestMain(m *testing.M) { os.Exit(postridertest.Main(m)) }

func suite(bubble bool) bustest.Suite {
	return bustest.Suite{Bubble: bubble, Start: func(testing.TB) bustest.Broker {
		broker := new(membus.Broker)
		return bustest.Broker{
			Open:        func(cfg bus.Config) (bustest.Bus, error) { return broker.New(cfg) },
			DeadLetters: func(b bustest.Bus) bustest.DeadLetters { return b.(*membus.Bus).DeadLetters() },
			Parked:      func(b bustest.Bus) bustest.Parked { return b.(*membus.Bus).Parked() },
			Async: func(b bustest.Bus, window int, result func(*postrider.Message, error)) bustest.Async {
				return b.(*membus.Bus).Async(window, result)
			},
			Crash:  func(b bustest.Bus) { b.(*membus.Bus).Crash() },
			Inject: broker.Inject,
		}
	}}
}

func TestConformance(t *testing.T) {
	t.Parallel()
	t.Run("InBubble", suite(true).Run)
	t.Run("InRealTime", suite(false).Run)
}

type order struct {
	ID string `json:"id"`
}

var (
	placed  = postrider.NewTopic[order]("orders.placed.v1")
	shipped = postrider.NewTopic[order]("orders.shipped.v1")
)

func newBus(t *testing.T, k *membus.Broker) *membus.Bus {
	t.Helper()
	b, err := k.New(bus.Config{
		Source: "//shop/orders", Group: "tester", Logger: postridertest.Logger(t),
		Streams: []bus.Stream{{Name: "ORDERS", Topics: []string{"orders.>"}, DuplicateWindow: time.Minute}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func run(t *testing.T, b *membus.Bus) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	<-b.Started()
}

// In a deterministic broker the same program writes the same log each time, whatever runs beside it.
func TestDeterministic(t *testing.T) {
	t.Parallel()
	program := func(t *testing.T) string {
		t.Helper()
		k := &membus.Broker{Deterministic: true}
		var log strings.Builder // no lock: one handler runs at a time
		begin := time.Now()
		for instance := range 3 {
			b := newBus(t, k)
			for _, group := range []string{"mailer", "billing"} {
				h := placed.Handler(func(ctx context.Context, e postrider.Event[order]) error {
					fmt.Fprintf(&log, "%v %d %s %s %d\n", time.Since(begin), instance, group, e.Value.ID, e.Delivery.Attempt)
					if e.Value.ID == "o-3" && e.Delivery.Attempt < 4 {
						return errors.New("not yet")
					}
					if group == "billing" {
						return shipped.Publish(ctx, b, e.Value)
					}
					return nil
				})
				if err := b.Subscribe(h, bus.Group(group)); err != nil {
					t.Fatal(err)
				}
			}
			run(t, b)
		}
		b := newBus(t, k)
		for i := range 8 {
			if err := placed.Publish(t.Context(), b, &order{ID: fmt.Sprint("o-", i)}); err != nil {
				t.Fatal(err)
			}
		}
		<-time.After(time.Minute)
		synctest.Wait()
		return log.String()
	}
	var logs []string
	for range 5 {
		synctest.Test(t, func(t *testing.T) { logs = append(logs, program(t)) })
	}
	for _, log := range logs {
		if log != logs[0] {
			t.Fatalf("two runs differ:\n%s\n%s", logs[0], log)
		}
	}
	// 200, 400 and 800 ms, the upper bounds of the default policy.
	for _, want := range []string{"0s 0 mailer o-0 1\n0s 0 billing o-0 1\n", "200ms 0 mailer o-3 2", "600ms 0 billing o-3 3", "1.4s 0 billing o-3 4"} {
		if !strings.Contains(logs[0], want) {
			t.Errorf("the log misses %q:\n%s", want, logs[0])
		}
	}
}

func TestMaxDelay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBus(t, &membus.Broker{MaxDelay: time.Millisecond})
		var last time.Time
		h := placed.Handler(func(_ context.Context, e postrider.Event[order]) error {
			if wait := time.Since(last); e.Delivery.Attempt > 1 && wait > time.Millisecond {
				t.Errorf("attempt %d came after %v", e.Delivery.Attempt, wait)
			}
			last = time.Now()
			return postrider.RetryAfter(time.Hour, errors.New("busy"))
		})
		if err := b.Subscribe(h); err != nil {
			t.Fatal(err)
		}
		run(t, b)
		if err := placed.Publish(t.Context(), b, &order{}); err != nil {
			t.Fatal(err)
		}
		postridertest.Eventually(t, func() error {
			if s := b.Stats(); s != (bus.Stats{Published: 1, Retried: 4, DeadLettered: 1}) {
				return fmt.Errorf("stats are %+v", s)
			}
			return nil
		})
	})
}

// What a server shows too: a duplicate is one within the window only, and two streams do not take the same topic.
func TestStreams(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k := new(membus.Broker)
		b := newBus(t, k)
		var handled int
		h := placed.Handler(func(context.Context, postrider.Event[order]) error { handled++; return nil })
		if err := b.Subscribe(h); err != nil {
			t.Fatal(err)
		}
		run(t, b)
		for range 3 {
			if err := placed.Publish(t.Context(), b, &order{}, postrider.MessageID("same")); err != nil {
				t.Fatal(err)
			}
			<-time.After(40 * time.Second)
			synctest.Wait()
		}
		if handled != 2 {
			t.Errorf("handled %d times, want 2: a duplicate window of 60 s, published at 0, 40 and 80 s", handled)
		}
		other, err := k.New(bus.Config{Source: "//shop/stock", Streams: []bus.Stream{{Name: "STOCK", Topics: []string{"*.placed.v1"}}}})
		if err != nil {
			t.Fatal(err)
		}
		if err := placed.Publish(t.Context(), other, &order{}); !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), "ORDERS") {
			t.Errorf("overlapping streams: %v", err)
		}
		if err := k.Inject("nowhere", nil); !errors.Is(err, postrider.FailedPrecondition) {
			t.Errorf("Inject to a topic that no stream takes: %v", err)
		}
		if _, err := k.New(bus.Config{}); !errors.Is(err, postrider.InvalidArgument) {
			t.Errorf("New without a Source: %v", err)
		}
	})
}

func TestCheck(t *testing.T) {
	t.Parallel()
	b := newBus(t, new(membus.Broker))
	m, err := placed.Message(t.Context(), &order{})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Check(m); err != nil {
		t.Error(err)
	}
	if err := m.SetExtension(postrider.ExtExpiryTime, "soon"); err != nil {
		t.Fatal(err)
	}
	if err := b.Check(m); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("a message whose expiry is no time: %v", err)
	}
}

func TestPrefix(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k := new(membus.Broker)
		got := map[string][]string{}
		for _, prefix := range []string{"staging", "live"} {
			b, err := k.New(bus.Config{
				Source: "//shop/orders", Group: "tester", Prefix: prefix, DeadLetters: bus.Stream{Name: "DEAD_" + prefix},
				Streams: []bus.Stream{{Name: "ORDERS_" + prefix, Topics: []string{"orders.>"}}},
			})
			if err != nil {
				t.Fatal(err)
			}
			h := placed.Handler(func(_ context.Context, e postrider.Event[order]) error {
				got[prefix] = append(got[prefix], e.Topic+" "+e.Value.ID)
				return postrider.Permanent(errors.New("no"))
			})
			if err := b.Subscribe(h); err != nil {
				t.Fatal(err)
			}
			run(t, b)
			if err := placed.Publish(t.Context(), b, &order{ID: prefix}); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if letters, _, err := b.DeadLetters().List(t.Context(), bus.LetterFilter{}, 0, 0); err != nil || len(letters) != 1 || letters[0].Topic != "orders.placed.v1" {
				t.Errorf("dead letters of %s: %+v, %v", prefix, letters, err)
			}
		}
		if s := fmt.Sprint(got); s != "map[live:[orders.placed.v1 live] staging:[orders.placed.v1 staging]]" {
			t.Errorf("handled %s", s)
		}
	})
}
