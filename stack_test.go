package postrider_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/postrider/postrider"
)

// The order is the documented one, whatever fails inside: each part sees the outcome of all that it stands around.
func TestStackOrder(t *testing.T) {
	t.Parallel()
	var order []string
	note := func(name string) postrider.Middleware {
		return func(next postrider.HandlerFunc) postrider.HandlerFunc {
			return func(ctx context.Context, m *postrider.Message) (*postrider.Message, error) {
				_, bounded := ctx.Deadline()
				order = append(order, fmt.Sprintf("%s bounded:%v", name, bounded))
				return next(ctx, m)
			}
		}
	}
	var log bytes.Buffer
	s := postrider.Stack{
		Trace: func(ctx context.Context, _ *postrider.Message) (context.Context, func(error)) {
			order = append(order, "span begins")
			return postrider.ContextWithTrace(ctx, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", ""),
				func(err error) { order = append(order, fmt.Sprintf("span ends: %v", postrider.CodeOf(err))) }
		},
		Metrics: func(_ context.Context, a postrider.Attempt) {
			order = append(order, fmt.Sprintf("metrics: %s %v", a.Message.ID, postrider.CodeOf(a.Err)))
		},
		Logger:  slog.New(slog.NewTextHandler(&log, nil)),
		Timeout: time.Minute,
		Dedup:   note("dedup"),
		Then:    []postrider.Middleware{note("first"), note("second")},
	}
	h := postrider.RawHandler("a", func(ctx context.Context, _ *postrider.Message) error {
		m, err := postrider.NewTopic[Order]("b").Message(ctx, &Order{})
		order = append(order, "handler "+m.Extension(postrider.ExtTraceParent)[:5])
		return errors.Join(err, errors.New("no"))
	}).With(s.Middleware()...)
	m := validMessage()
	m.Delivery = postrider.Delivery{Attempt: 3, Group: "mailer"}
	_, err := h.Handle(t.Context(), m)
	if err == nil {
		t.Error("the error was lost")
	}
	want := []string{
		"span begins", "dedup bounded:true", "first bounded:true", "second bounded:true", "handler 00-0a",
		"metrics: " + m.ID + " UNKNOWN", "span ends: UNKNOWN",
	}
	if !slices.Equal(order, want) {
		t.Errorf("got %q\nwant %q", order, want)
	}
	for _, part := range []string{"level=WARN", "id=" + m.ID, "attempt=3", "group=mailer", "code=UNKNOWN", "error=no"} {
		if !strings.Contains(log.String(), part) {
			t.Errorf("the log has no %s: %s", part, log.String())
		}
	}
}

// A panic is an error to every part of the stack, and none is left out.
func TestStackSeesPanics(t *testing.T) {
	t.Parallel()
	var span, metrics error
	var log bytes.Buffer
	h := postrider.RawHandler("a", func(context.Context, *postrider.Message) error { panic("no") }).With(postrider.Stack{
		Trace: func(ctx context.Context, _ *postrider.Message) (context.Context, func(error)) {
			return ctx, func(err error) { span = err }
		},
		Metrics: func(_ context.Context, a postrider.Attempt) { metrics = a.Err },
		Logger:  slog.New(slog.NewTextHandler(&log, nil)),
	}.Middleware()...)
	_, err := h.Handle(t.Context(), validMessage())
	for who, err := range map[string]error{"the caller": err, "the span": span, "metrics": metrics} {
		if !errors.Is(err, postrider.Internal) {
			t.Errorf("%s saw %v", who, err)
		}
	}
	if !strings.Contains(log.String(), "level=ERROR") {
		t.Errorf("log: %s", log.String())
	}
}

// A handler that overruns its time is told by its context, and its error may be tried again.
func TestStackTimeout(t *testing.T) {
	t.Parallel()
	h := postrider.RawHandler("a", func(ctx context.Context, _ *postrider.Message) error {
		<-ctx.Done()
		return ctx.Err()
	}).With(postrider.Stack{Timeout: time.Millisecond}.Middleware()...)
	if _, err := h.Handle(t.Context(), validMessage()); postrider.CodeOf(err) != postrider.DeadlineExceeded || !postrider.Retryable(err) {
		t.Errorf("got %v", err)
	}
}

func TestEmptyStack(t *testing.T) {
	t.Parallel()
	if mw := (postrider.Stack{}).Middleware(); len(mw) != 0 {
		t.Errorf("%d layers", len(mw))
	}
}

// Hooks of a tracer, of metrics and of a log stand around every handler in one fixed order.
func ExampleStack() {
	stack := postrider.Stack{
		Metrics: func(_ context.Context, a postrider.Attempt) {
			fmt.Println(a.Message.Type, postrider.CodeOf(a.Err), a.Took < time.Minute)
		},
		Timeout: 10 * time.Second,
	}
	placed := postrider.NewTopic[Order]("orders.placed.v1")
	h := placed.Handler(func(context.Context, postrider.Event[Order]) error {
		return postrider.Errorf(postrider.Unavailable, "the mail server is down")
	}).With(stack.Middleware()...) // or bus.Config{Middleware: stack.Middleware()}

	m, _ := placed.Message(context.Background(), &Order{ID: "o-17"})
	_, err := h.Handle(context.Background(), m)
	fmt.Println(err)
	// Output:
	// orders.placed.v1 UNAVAILABLE true
	// the mail server is down (UNAVAILABLE)
}
