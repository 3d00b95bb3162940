package postridertest_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

// numbered returns n messages with the ids "0", "1", and so on.
func numbered(n int) []*postrider.Message {
	msgs := make([]*postrider.Message, n)
	for i := range msgs {
		msgs[i] = &postrider.Message{ID: fmt.Sprint(i), Source: "//test", Type: "a"}
	}
	return msgs
}

func ids(msgs []*postrider.Message) []string {
	list := make([]string, len(msgs))
	for i, m := range msgs {
		list[i] = m.ID
	}
	return list
}

func TestFaultsOfAPublisher(t *testing.T) {
	t.Parallel()
	publish := func(f postridertest.Faults) ([]string, error) {
		var rec postridertest.Recorder
		err := f.Publisher(&rec).Publish(t.Context(), numbered(100)...)
		return ids(rec.Messages()), err
	}
	if got, err := publish(postridertest.Faults{}); err != nil || !slices.Equal(got, ids(numbered(100))) {
		t.Errorf("no faults: %v, %v", got, err)
	}
	all := postridertest.Faults{Seed: 7, Duplicate: 0.3, Reorder: 0.3, FailAck: 0.3}
	got, err := publish(all)
	failed := 0
	for _, err := range postrider.PublishErrors(err, 100) {
		if err != nil {
			failed++
			if !postrider.Retryable(err) {
				t.Errorf("%v does not invite to retry", err)
			}
		}
	}
	if len(got) < 115 || len(got) > 145 || failed < 15 || failed > 45 {
		t.Errorf("published %d of 100, reported %d as failed: want about 130 and 30", len(got), failed)
	}
	if unique := slices.Compact(slices.Clone(got)); len(unique) != 100 || slices.Equal(unique, ids(numbered(100))) {
		t.Errorf("duplicates stand together, and the order is another: %v", got)
	}
	if again, _ := publish(all); !slices.Equal(got, again) {
		t.Errorf("the same seed gave\n%v\n%v", got, again)
	}
	all.Seed++
	if other, _ := publish(all); slices.Equal(got, other) {
		t.Error("another seed gave the same")
	}
	if errs := postrider.PublishErrors(errOf(publish(postridertest.Faults{FailAck: 1})), 100); slices.Contains(errs, nil) {
		t.Errorf("all were to be reported as failed: %v", errs)
	}
}

func errOf(_ []string, err error) error { return err }

func TestFailAckHappensOnce(t *testing.T) {
	t.Parallel()
	var rec postridertest.Recorder
	p := postridertest.Faults{FailAck: 1}.Publisher(&rec)
	m := numbered(1)[0]
	if err := p.Publish(t.Context(), m); !errors.Is(err, postrider.Unavailable) || len(rec.Messages()) != 1 {
		t.Errorf("the first time: %v, %d published", err, len(rec.Messages()))
	}
	if err := p.Publish(t.Context(), m); err != nil {
		t.Errorf("the second time: %v", err)
	}
	// What the publisher refuses is not reported as something else.
	full := errors.New("full")
	rec.Fail = func(*postrider.Message) error { return full }
	if err := p.Publish(t.Context(), numbered(2)[1]); !errors.Is(err, full) {
		t.Errorf("a refused message: %v", err)
	}
}

func TestFaultsOfAHandler(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var order []string
		h := postrider.RawHandler("a", func(_ context.Context, m *postrider.Message) error {
			mu.Lock()
			defer mu.Unlock()
			order = append(order, m.ID)
			return nil
		})
		handle := func(f postridertest.Faults) (failed int, took time.Duration) {
			order = nil
			begin, faulty := time.Now(), h.With(f.Middleware())
			errs := make([]error, 100)
			var wg sync.WaitGroup
			for i, m := range numbered(100) {
				wg.Go(func() { _, errs[i] = faulty.Handle(t.Context(), m) })
				synctest.Wait() // one after the other, but for those that are held
			}
			wg.Wait()
			for _, err := range errs {
				if err != nil {
					failed++
				}
			}
			return failed, time.Since(begin)
		}
		if failed, took := handle(postridertest.Faults{}); failed != 0 || took != 0 || !slices.Equal(order, ids(numbered(100))) {
			t.Errorf("no faults: %d failed, %v, %v", failed, took, order)
		}
		if failed, _ := handle(postridertest.Faults{Duplicate: 1}); failed != 0 || len(order) != 200 || order[0] != "0" || order[1] != "0" {
			t.Errorf("duplicates: %d failed, %v", failed, order)
		}
		if failed, _ := handle(postridertest.Faults{FailAck: 1}); failed != 100 || len(order) != 100 {
			t.Errorf("failed acknowledgements: %d, handled %d", failed, len(order))
		}
		if _, took := handle(postridertest.Faults{Delay: time.Second}); took < 500*time.Millisecond || took > time.Second {
			t.Errorf("delays: the longest of 100 was %v, want nearly 1s", took)
		}
		_, took := handle(postridertest.Faults{Reorder: 0.3})
		if slices.Equal(order, ids(numbered(100))) || len(order) != 100 || took > 50*time.Millisecond {
			t.Errorf("reordered, in %v: %v", took, order)
		}
		// A lone message is held for ReorderWait only.
		begin := time.Now()
		if _, err := h.With(postridertest.Faults{Reorder: 1, ReorderWait: time.Second}.Middleware()).Handle(t.Context(), numbered(1)[0]); err != nil ||
			time.Since(begin) != time.Second {
			t.Errorf("a lone message: %v after %v", err, time.Since(begin))
		}
	})
}

// A handler that counts what it is given counts too much; one that remembers what it has done does not.
func ExampleFaults() {
	deliveries, effects := 0, map[string]bool{}
	h := postrider.RawHandler("orders.placed.v1", func(_ context.Context, m *postrider.Message) error {
		deliveries++
		effects[m.Source+" "+m.ID] = true
		return nil
	})
	faulty := h.With(postridertest.Faults{Duplicate: 0.5, FailAck: 0.5}.Middleware())
	for i := range 20 {
		m := &postrider.Message{ID: fmt.Sprint("o-", i), Source: "//shop/orders"}
		for attempt := 1; ; attempt++ {
			if _, err := faulty.Handle(context.Background(), m); err == nil {
				break
			}
		}
	}
	fmt.Println("more deliveries than orders:", deliveries > 20)
	fmt.Println("effects:", len(effects))
	// Output:
	// more deliveries than orders: true
	// effects: 20
}
