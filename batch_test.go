package postrider_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/postrider/postrider"
)

type reading struct{ N int }

var measured = postrider.NewTopic[reading]("sensors.measured.v1")

func readings(t *testing.T, n int) []*postrider.Message {
	t.Helper()
	msgs := make([]*postrider.Message, n)
	for i := range msgs {
		m, err := measured.Message(t.Context(), &reading{i}, postrider.MessageID(fmt.Sprint(i)))
		if err != nil {
			t.Fatal(err)
		}
		msgs[i] = m
	}
	return msgs
}

// calls notes the batches that a handler gets and returns what fn says.
type calls struct {
	batches [][]int
	fn      func(ctx context.Context, events []postrider.Event[reading]) error
}

func (c *calls) handler() postrider.Handler {
	var mu sync.Mutex
	return measured.BatchHandler(func(ctx context.Context, events []postrider.Event[reading]) error {
		mu.Lock()
		var ns []int
		for _, e := range events {
			ns = append(ns, e.Value.N)
		}
		c.batches = append(c.batches, ns)
		mu.Unlock()
		if c.fn == nil {
			return nil
		}
		return c.fn(ctx, events)
	})
}

func TestBatchHandlerOutcomes(t *testing.T) {
	t.Parallel()
	cause := errors.New("no ink")
	each := &postrider.BatchError{Errs: []error{nil, cause, nil}}
	for name, c := range map[string]struct {
		result error
		want   [3]error
	}{
		"all handled":         {nil, [3]error{}},
		"one failed":          {each, [3]error{nil, cause, nil}},
		"none failed":         {&postrider.BatchError{Errs: make([]error, 3)}, [3]error{}},
		"all failed":          {cause, [3]error{cause, cause, cause}},
		"a wrapped one":       {fmt.Errorf("print: %w", each), [3]error{cause, cause, cause}},
		"all failed for good": {postrider.Permanent(each), [3]error{cause, cause, cause}},
		"too few entries":     {&postrider.BatchError{Errs: []error{nil}}, [3]error{postrider.Internal, postrider.Internal, postrider.Internal}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := (&calls{fn: func(context.Context, []postrider.Event[reading]) error { return c.result }}).handler()
			for i, err := range h.HandleBatch(t.Context(), readings(t, 3)) {
				if !errors.Is(err, c.want[i]) {
					t.Errorf("event %d: %v, want %v", i, err, c.want[i])
				}
			}
		})
	}
}

func TestBatchHandlerIsGivenWhatCanBeHandled(t *testing.T) {
	t.Parallel()
	msgs := readings(t, 5)
	msgs[1].Data, msgs[3].Data = []byte("{"), []byte("[]")
	var c calls
	errs := c.handler().HandleBatch(t.Context(), msgs)
	for i, err := range errs {
		if want := i%2 == 1; errors.Is(err, postrider.InvalidArgument) != want || postrider.Retryable(err) {
			t.Errorf("event %d: %v", i, err)
		}
	}
	if len(c.batches) != 1 || !slices.Equal(c.batches[0], []int{0, 2, 4}) {
		t.Errorf("the handler got %v, want the good ones together and in order", c.batches)
	}
}

func TestBatchHandlerPanics(t *testing.T) {
	t.Parallel()
	c := calls{fn: func(context.Context, []postrider.Event[reading]) error { panic("ouch") }}
	for i, err := range c.handler().HandleBatch(t.Context(), readings(t, 3)) {
		if !errors.Is(err, postrider.Internal) || !strings.Contains(err.Error(), "ouch") || !strings.Contains(err.Error(), "batch_test.go") {
			t.Errorf("event %d: %v, want the panic with its stack", i, err)
		}
	}
}

func TestBatchHandlerTakesOneMessage(t *testing.T) {
	t.Parallel()
	cause := errors.New("no ink")
	c := calls{fn: func(context.Context, []postrider.Event[reading]) error {
		return &postrider.BatchError{Errs: []error{cause}}
	}}
	m := readings(t, 1)
	if _, err := c.handler().Handle(t.Context(), m[0]); !errors.Is(err, cause) {
		t.Errorf("Handle: %v", err)
	}
	if errs := c.handler().HandleBatch(t.Context(), m); len(errs) != 1 || !errors.Is(errs[0], cause) {
		t.Errorf("HandleBatch: %v", errs)
	}
	single := measured.Handler(func(context.Context, postrider.Event[reading]) error { return nil })
	if errs := single.HandleBatch(t.Context(), m); !errors.Is(errs[0], postrider.FailedPrecondition) || single.IsBatch() {
		t.Errorf("a handler of single messages: %v", errs)
	}
}

func TestMiddlewareStandsAroundEachEventOfABatch(t *testing.T) {
	t.Parallel()
	weather := errors.New("the weather is bad")
	var mu sync.Mutex
	attempts := map[string]error{}
	stack := postrider.Stack{
		Metrics: func(_ context.Context, a postrider.Attempt) {
			mu.Lock()
			defer mu.Unlock()
			attempts[a.Message.ID] = a.Err
		},
		Timeout: time.Hour,
		Dedup: func(next postrider.HandlerFunc) postrider.HandlerFunc {
			return func(ctx context.Context, m *postrider.Message) (*postrider.Message, error) {
				if m.ID == "0" {
					return nil, nil // handled before
				}
				return next(ctx, m)
			}
		},
	}
	c := calls{fn: func(ctx context.Context, events []postrider.Event[reading]) error {
		if _, ok := ctx.Deadline(); !ok || postrider.MessageFromContext(ctx) != nil {
			t.Error("want the deadline of the time-out, and no message")
		}
		return &postrider.BatchError{Errs: []error{nil, weather}}
	}}
	errs := c.handler().With(stack.Middleware()...).HandleBatch(t.Context(), readings(t, 3))
	if !slices.Equal(errs, []error{nil, nil, weather}) {
		t.Errorf("errors are %v", errs)
	}
	if len(attempts) != 3 || attempts["0"] != nil || attempts["1"] != nil || !errors.Is(attempts["2"], weather) {
		t.Errorf("attempts are %v", attempts)
	}
	if len(c.batches) != 1 || !slices.Equal(c.batches[0], []int{1, 2}) {
		t.Errorf("the handler got %v", c.batches)
	}
}

// A middleware that lets through one at a time, that comes twice, or that goes on without the handler must not stop a batch.
func TestMiddlewareCannotStopABatch(t *testing.T) {
	t.Parallel()
	var turn sync.Mutex
	for name, mw := range map[string]func(next postrider.HandlerFunc, ctx context.Context, m *postrider.Message) error{
		"one at a time": func(next postrider.HandlerFunc, ctx context.Context, m *postrider.Message) error {
			for !turn.TryLock() { // a Mutex would not let the bubble's clock go on
				<-time.After(time.Millisecond)
			}
			defer turn.Unlock()
			_, err := next(ctx, m)
			return err
		},
		"twice": func(next postrider.HandlerFunc, ctx context.Context, m *postrider.Message) error {
			if _, err := next(ctx, m); err != nil {
				return err
			}
			_, err := next(ctx, m)
			return err
		},
		"without it": func(next postrider.HandlerFunc, ctx context.Context, m *postrider.Message) error {
			if m.ID == "1" {
				go func() { _, _ = next(ctx, m) }()
				return nil
			}
			_, err := next(ctx, m)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var c calls
				h := c.handler().With(func(next postrider.HandlerFunc) postrider.HandlerFunc {
					return func(ctx context.Context, m *postrider.Message) (*postrider.Message, error) {
						return nil, mw(next, ctx, m)
					}
				})
				for i, err := range h.HandleBatch(t.Context(), readings(t, 4)) {
					if err != nil {
						t.Errorf("event %d: %v", i, err)
					}
				}
				seen := map[int]bool{}
				for _, b := range c.batches {
					for _, n := range b {
						seen[n] = true
					}
				}
				if want := 4; len(seen) < want-1 || len(seen) < want && name != "without it" {
					t.Errorf("the handler got %v", c.batches)
				}
			})
		})
	}
}

func BenchmarkHandleBatch(b *testing.B) {
	h := measured.BatchHandler(func(context.Context, []postrider.Event[reading]) error { return nil })
	msgs := make([]*postrider.Message, 100)
	for i := range msgs {
		msgs[i], _ = measured.Message(b.Context(), &reading{i})
	}
	b.ReportAllocs()
	for b.Loop() {
		h.HandleBatch(b.Context(), msgs)
	}
}
