package saga

import (
	"context"

	"github.com/postrider/postrider"
)

// Action is something a step does: [Call], [Send] or [Publish].
type Action[D any] struct{ action }

// action is an Action without its type.
type action struct {
	verb     string // call, send, publish
	contract string // the name of the method or topic

	// message makes the message from the saga's data.
	message func(ctx context.Context, data any, opts ...postrider.PublishOption) (*postrider.Message, error)

	// apply reads an answer into the saga's data. It is nil for an action that is done once its message is committed.
	apply func(data any, reply *postrider.Message) error
}

// Call sends a durable command made from the saga's data, and takes its response into them. Both functions only turn
// values into values: they run inside a database transaction, may run more than once for one step, and what take did is
// dropped when it panics or leaves data that are too large.
func Call[D, Req, Res any](m *postrider.Method[Req, Res], request func(*D) *Req, take func(*D, *Res)) Action[D] {
	if take == nil {
		return Action[D]{}
	}
	a := command(m, request)
	a.verb = "call"
	a.apply = func(data any, reply *postrider.Message) error {
		res, err := m.Response(reply)
		if err == nil {
			take(data.(*D), res)
		}
		return err
	}
	return Action[D]{a}
}

// Send sends a durable command whose response says no more than that it was done. See [Call].
func Send[D, Req, Res any](m *postrider.Method[Req, Res], request func(*D) *Req) Action[D] {
	a := command(m, request)
	a.verb = "send"
	a.apply = func(any, *postrider.Message) error { return nil }
	return Action[D]{a}
}

// command is an action without a message, which no plan takes, if something is missing.
func command[D, Req, Res any](m *postrider.Method[Req, Res], request func(*D) *Req) action {
	if m == nil || request == nil {
		return action{}
	}
	return action{
		contract: m.Name(),
		message: func(ctx context.Context, data any, opts ...postrider.PublishOption) (*postrider.Message, error) {
			return m.Request(ctx, request(data.(*D)), opts...)
		},
	}
}

// Publish publishes an event in the commit of the saga's own transition. It is done with that, nobody answers.
func Publish[D, T any](t *postrider.Topic[T], value func(*D) *T) Action[D] {
	if t == nil || value == nil {
		return Action[D]{}
	}
	return Action[D]{action{
		verb:     "publish",
		contract: t.Name(),
		message: func(ctx context.Context, data any, opts ...postrider.PublishOption) (*postrider.Message, error) {
			return t.Message(ctx, value(data.(*D)), opts...)
		},
	}}
}

// guard runs a function of the user and returns its panic as an error.
func guard(what string, fn func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = postrider.Errorf(postrider.Internal, "%s panicked: %v", what, r)
		}
	}()
	return fn()
}
