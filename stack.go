package postrider

import (
	"context"
	"log/slog"
	"time"
)

// Stack is what stands around the handlers of a service beside the service's own middleware, in the one order that makes
// sense. A bus, an in-memory bus and an rpc server take what [Stack.Middleware] returns; the zero value is empty.
//
//	recover  always there, in each layer: a panic is an Internal error to whatever stands around it
//	Trace    the span covers all that follows
//	Metrics  counts what the caller or the broker sees, timeouts and duplicates included
//	Logger   the same, with the span's context
//	Timeout  bounds the work, not the bookkeeping around it
//	Dedup    a duplicate is answered before the service's own middleware does anything
//	Then     the service's own
//	handler
//
// Retries are no middleware: a transport delivers a failed message again, and each attempt passes through the stack.
type Stack struct {
	// Trace begins a span for an attempt and returns the function that ends it. The message has the sender's trace context in
	// its extensions traceparent and tracestate; what the handler publishes carries on that of the context returned, if
	// [ContextWithTrace] made it.
	Trace func(ctx context.Context, m *Message) (context.Context, func(err error))

	// Metrics is told of every attempt, when it has ended.
	Metrics func(ctx context.Context, a Attempt)

	// Logger gets a line for every attempt: at level Debug if it succeeded, Warn if it failed, Error if it panicked or
	// failed with [Internal]. Nil is silent.
	Logger *slog.Logger

	// Timeout is the deadline of an attempt, unless its context has an earlier one. The handler learns of it by its context.
	// Zero: none.
	Timeout time.Duration

	// Dedup answers what was handled before without calling next. For an effect in PostgreSQL package idempotency does it in
	// the handler's own transaction, which is safer: this is for other stores.
	Dedup Middleware

	// Then is the service's own; the first is the outermost.
	Then []Middleware
}

// Attempt is one run of a handler.
type Attempt struct {
	Message *Message
	Began   time.Time
	Took    time.Duration
	Err     error // nil if it succeeded
}

// Middleware returns the stack, outermost first. The hooks must be safe for concurrent use.
func (s Stack) Middleware() []Middleware {
	var all []Middleware
	if s.Trace != nil {
		all = append(all, traced(s.Trace))
	}
	if s.Metrics != nil {
		all = append(all, observed(s.Metrics))
	}
	if s.Logger != nil {
		all = append(all, observed(logTo(s.Logger)))
	}
	if s.Timeout > 0 {
		all = append(all, bounded(s.Timeout))
	}
	if s.Dedup != nil {
		all = append(all, s.Dedup)
	}
	return append(all, s.Then...)
}

func traced(begin func(context.Context, *Message) (context.Context, func(error))) Middleware {
	return func(next HandlerFunc) HandlerFunc {
		return func(ctx context.Context, m *Message) (*Message, error) {
			ctx, end := begin(ctx, m)
			reply, err := next(ctx, m)
			end(err)
			return reply, err
		}
	}
}

func observed(tell func(context.Context, Attempt)) Middleware {
	return func(next HandlerFunc) HandlerFunc {
		return func(ctx context.Context, m *Message) (*Message, error) {
			began := time.Now()
			reply, err := next(ctx, m)
			tell(ctx, Attempt{Message: m, Began: began, Took: time.Since(began), Err: err})
			return reply, err
		}
	}
}

func logTo(logger *slog.Logger) func(context.Context, Attempt) {
	return func(ctx context.Context, a Attempt) {
		level, text := slog.LevelDebug, "handled"
		switch CodeOf(a.Err) {
		case OK:
		case Internal:
			level, text = slog.LevelError, "handler failed"
		default:
			level, text = slog.LevelWarn, "handler failed"
		}
		if !logger.Enabled(ctx, level) {
			return
		}
		m := a.Message
		attrs := append(make([]slog.Attr, 0, 8),
			slog.String("type", m.Type), slog.String("id", m.ID), slog.String("source", m.Source), slog.Duration("took", a.Took))
		if d := m.Delivery; d.Attempt > 0 {
			attrs = append(attrs, slog.Int("attempt", d.Attempt))
			if d.Group != "" {
				attrs = append(attrs, slog.String("group", d.Group))
			}
		}
		if a.Err != nil {
			attrs = append(attrs, slog.String("code", CodeOf(a.Err).String()), slog.Any("error", a.Err))
		}
		logger.LogAttrs(ctx, level, text, attrs...)
	}
}

func bounded(limit time.Duration) Middleware {
	return func(next HandlerFunc) HandlerFunc {
		return func(ctx context.Context, m *Message) (*Message, error) {
			ctx, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			return next(ctx, m)
		}
	}
}
