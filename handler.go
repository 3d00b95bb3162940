package postrider

import (
	"context"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
)

// HandlerFunc handles one message and returns the reply to it, nil for an event.
type HandlerFunc func(ctx context.Context, m *Message) (*Message, error)

// Middleware wraps the handling of messages, events and calls alike.
type Middleware func(next HandlerFunc) HandlerFunc

// Handler handles the messages of one topic or method. Contracts make it: [Topic.Handler], [Topic.BatchHandler],
// [Method.Handler], [RawHandler]. A bus subscribes it, an rpc server registers it. It is immutable and safe for
// concurrent use.
type Handler struct {
	name, topic string
	call, raw   bool
	batch       *batch // nil: takes one message at a time
	fn          HandlerFunc
}

// needFunction panics at the start of a program that would fail at its first message.
func needFunction(name string, missing bool) {
	if missing {
		panic("postrider: handler of " + name + ": the function is nil")
	}
}

func newHandler(name, topic string, call bool, fn HandlerFunc) Handler {
	return Handler{name: name, topic: topic, call: call, fn: protect(name, fn)}
}

// RawHandler makes a handler that gets the messages of a topic as they are, undecoded. The topic may have wildcards: "*"
// is any one token, ">" at the end one or more, so "orders.>" is all that happens to orders. It panics on a malformed
// topic and on a nil fn.
func RawHandler(topic string, fn func(ctx context.Context, m *Message) error) Handler {
	tokens := strings.Split(topic, ".")
	for i, t := range tokens {
		if t == "*" || t == ">" && i == len(tokens)-1 {
			tokens[i] = "wildcard"
		}
	}
	checkName("topic", strings.Join(tokens, "."))
	needFunction(topic, fn == nil)
	h := newHandler(topic, topic, false, func(ctx context.Context, m *Message) (*Message, error) {
		return nil, fn(ctx, m)
	})
	h.raw = true
	return h
}

// Name returns the contract's name, "orders.placed.v1" or "stock.v1/Reserve".
func (h Handler) Name() string { return h.name }

// Topic returns the address of its messages on a bus, "orders.placed.v1" or "stock.v1.Reserve".
func (h Handler) Topic() string { return h.topic }

// IsCall reports whether it answers the calls of a [Method].
func (h Handler) IsCall() bool { return h.call }

// IsRaw reports whether it takes messages as they are, also those that are no CloudEvents.
func (h Handler) IsRaw() bool { return h.raw }

// With returns the handler wrapped in middleware; the first given is the outermost. It panics on a nil one.
func (h Handler) With(mw ...Middleware) Handler {
	for i, m := range slices.Backward(mw) {
		if m == nil {
			panic(fmt.Sprintf("postrider: handler of %s: middleware %d is nil", h.name, i+1))
		}
		h.fn = protect(h.name, m(h.fn))
	}
	return h
}

// Handle runs the handler on a message, which it makes known to ctx. A panic is returned as an Internal error that
// holds the stack.
func (h Handler) Handle(ctx context.Context, m *Message) (*Message, error) {
	if h.fn == nil {
		return nil, Errorf(Internal, "handle a message: the Handler is the zero value: make it with Topic.Handler or Method.Handler")
	}
	if m == nil {
		return nil, Errorf(InvalidArgument, "handle %s: the message is nil", h.name)
	}
	return h.fn(ContextWithMessage(ctx, m), m)
}

// protect turns a panic into an error. It stands around the handler and around each middleware, so that a middleware
// sees a panic of what it wraps as the error that it is.
func protect(name string, fn HandlerFunc) HandlerFunc {
	return func(ctx context.Context, m *Message) (reply *Message, err error) {
		defer func() {
			if r := recover(); r != nil {
				reply, err = nil, &Error{Code: Internal, Op: "handle " + name, Err: &panicked{r, debug.Stack()}}
			}
		}()
		return fn(ctx, m)
	}
}

// panicked is the cause of the error that a panic becomes. Its text holds the stack, for logs and dead letters on this
// side; a caller on the other side gets the summary only.
type panicked struct {
	value any
	stack []byte
}

func (p *panicked) summary() string { return fmt.Sprintf("the handler panicked: %v", p.value) }

func (p *panicked) Error() string { return p.summary() + "\n" + string(p.stack) }

// Unwrap returns the panic's value if it is an error.
func (p *panicked) Unwrap() error {
	err, _ := p.value.(error)
	return err
}
