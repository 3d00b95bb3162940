package postrider_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/postrider/postrider"
)

func TestTopicHandler(t *testing.T) {
	t.Parallel()
	topic := postrider.NewTopic[order]("orders.placed.v1")
	var got order
	h := topic.Handler(func(_ context.Context, e postrider.Event[order]) error {
		got = *e.Value
		return nil
	})
	if h.Name() != "orders.placed.v1" || h.Topic() != "orders.placed.v1" || h.IsCall() {
		t.Errorf("name %q, topic %q, call %v", h.Name(), h.Topic(), h.IsCall())
	}
	m, err := topic.Message(t.Context(), &order{ID: "o-1"})
	if err != nil {
		t.Fatal(err)
	}
	if reply, err := h.Handle(t.Context(), m); reply != nil || err != nil || got.ID != "o-1" {
		t.Errorf("reply %v, error %v, handled %+v", reply, err, got)
	}
	m.Data = []byte("{")
	if _, err := h.Handle(t.Context(), m); !errors.Is(err, postrider.InvalidArgument) || postrider.Retryable(err) {
		t.Errorf("an undecodable event: %v, want a permanent InvalidArgument", err)
	}
}

func TestZeroHandler(t *testing.T) {
	t.Parallel()
	if _, err := (postrider.Handler{}).Handle(t.Context(), validMessage()); !errors.Is(err, postrider.Internal) {
		t.Errorf("the zero Handler: %v, want Internal", err)
	}
}

func TestPanicIsAnError(t *testing.T) {
	t.Parallel()
	for name, value := range map[string]any{"a string": "boom", "an error": io.ErrUnexpectedEOF, "nil": nil} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := postrider.RawHandler("a.v1", func(context.Context, *postrider.Message) error { panic(value) })
			reply, err := h.Handle(t.Context(), validMessage())
			if reply != nil || !errors.Is(err, postrider.Internal) || !postrider.Retryable(err) {
				t.Fatalf("reply %v, error %v: want Internal, retryable", reply, err)
			}
			for _, want := range []string{"handle a.v1: the handler panicked: ", "handler_test.go:"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error lacks %q: %v", want, err)
				}
			}
			if cause, ok := value.(error); ok && !errors.Is(err, cause) {
				t.Errorf("%v does not wrap the panic's error", err)
			}
			// The stack stays here; the other side learns what happened and no more.
			travelled := string(postrider.AppendError(nil, err))
			if !strings.Contains(travelled, "the handler panicked: ") || strings.Contains(travelled, "handler_test.go") {
				t.Errorf("over the wire goes %s", travelled)
			}
		})
	}
}

func TestMiddlewareOrder(t *testing.T) {
	t.Parallel()
	var calls []string
	mw := func(name string) postrider.Middleware {
		return func(next postrider.HandlerFunc) postrider.HandlerFunc {
			return func(ctx context.Context, m *postrider.Message) (*postrider.Message, error) {
				calls = append(calls, name+" in")
				reply, err := next(ctx, m)
				calls = append(calls, name+" out")
				return reply, err
			}
		}
	}
	plain := postrider.RawHandler("a", func(context.Context, *postrider.Message) error {
		calls = append(calls, "handler")
		return nil
	})
	wrapped := plain.With(mw("inner")).With(mw("1"), mw("2"))
	if _, err := wrapped.Handle(t.Context(), validMessage()); err != nil {
		t.Fatal(err)
	}
	want := []string{"1 in", "2 in", "inner in", "handler", "inner out", "2 out", "1 out"}
	if !slices.Equal(calls, want) {
		t.Errorf("order %v, want %v", calls, want)
	}
	calls = nil
	if _, err := plain.Handle(t.Context(), validMessage()); err != nil || !slices.Equal(calls, []string{"handler"}) {
		t.Errorf("With changed the handler that it wrapped: %v, %v", calls, err)
	}
}

// A middleware sees a panic of what it wraps as an error, so that it can count and log it.
func TestMiddlewareSeesPanics(t *testing.T) {
	t.Parallel()
	var seen error
	watch := func(next postrider.HandlerFunc) postrider.HandlerFunc {
		return func(ctx context.Context, m *postrider.Message) (*postrider.Message, error) {
			reply, err := next(ctx, m)
			seen = err
			return reply, err
		}
	}
	broken := func(postrider.HandlerFunc) postrider.HandlerFunc {
		return func(context.Context, *postrider.Message) (*postrider.Message, error) { panic("in a middleware") }
	}
	h := postrider.RawHandler("a", func(context.Context, *postrider.Message) error { panic("in the handler") })
	for _, tt := range []struct {
		h    postrider.Handler
		want string
	}{{h.With(watch), "in the handler"}, {h.With(watch, broken), "in a middleware"}} {
		if _, err := tt.h.Handle(t.Context(), validMessage()); !errors.Is(err, postrider.Internal) ||
			!errors.Is(seen, postrider.Internal) || !strings.Contains(seen.Error(), tt.want) {
			t.Errorf("the middleware saw %v, the caller %v, want %q", seen, err, tt.want)
		}
	}
}

func TestMiddlewareMayAnswer(t *testing.T) {
	t.Parallel()
	refuse := func(postrider.HandlerFunc) postrider.HandlerFunc {
		return func(context.Context, *postrider.Message) (*postrider.Message, error) {
			return nil, postrider.Unauthenticated
		}
	}
	h := postrider.RawHandler("a", func(context.Context, *postrider.Message) error {
		t.Error("the handler ran")
		return nil
	})
	if _, err := h.With(refuse).Handle(t.Context(), validMessage()); !errors.Is(err, postrider.Unauthenticated) {
		t.Errorf("got %v", err)
	}
}

func TestRawHandlerTopics(t *testing.T) {
	t.Parallel()
	panics := func(topic string) (panicked bool) {
		defer func() { panicked = recover() != nil }()
		postrider.RawHandler(topic, func(context.Context, *postrider.Message) error { return nil })
		return false
	}
	for topic, bad := range map[string]bool{
		"a": false, "a.b": false, "a.*.c": false, "*.b": false, "a.>": false, ">": false, "*": false,
		"": true, "a..b": true, "a.>.c": true, "a.b*": true, "a*.b": true, "a>": true, "a b": true, "a.": true,
	} {
		if got := panics(topic); got != bad {
			t.Errorf("RawHandler(%q) panics: %v, want %v", topic, got, bad)
		}
	}
}
