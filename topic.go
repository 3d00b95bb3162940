package postrider

import "context"

// Topic is the contract of an event: its name, its type and its encoding, written once and shared by those who publish
// and those who handle. It is immutable and safe for concurrent use.
type Topic[T any] struct{ contract }

// Event is a received event: the message with its attributes, and its decoded value.
type Event[T any] struct {
	*Message
	Value *T
}

// NewTopic returns the contract of an event. The name is the CloudEvents type and the address on the bus: tokens joined
// by dots, the last one a version ("orders.placed.v1"). It stays when the Go type is renamed. T is the struct, no pointer
// to it; values travel as pointers. NewTopic panics on a malformed name or option, since contracts are package variables.
func NewTopic[T any](name string, opts ...ContractOption) *Topic[T] {
	checkName("topic", name)
	return &Topic[T]{newContract(name, new(T), opts)}
}

// Name returns the name.
func (t *Topic[T]) Name() string { return t.name }

// Message builds the message that Publish would send, without sending it. The error is InvalidArgument: the value is nil or
// cannot be encoded, or an option is wrong.
func (t *Topic[T]) Message(ctx context.Context, v *T, opts ...PublishOption) (*Message, error) {
	if v == nil {
		return nil, t.nilValue()
	}
	return t.message(ctx, v, opts)
}

// Publish sends an event through p and returns when p has it for good. Inside a handler the event is linked to the
// message being handled: correlation id, causation id and trace context come from ctx.
func (t *Topic[T]) Publish(ctx context.Context, p Publisher, v *T, opts ...PublishOption) error {
	m, err := t.Message(ctx, v, opts...)
	if err != nil {
		return err
	}
	return t.send(ctx, p, m)
}

// PublishAll sends several events in one go, in their order. The error is a *[BatchError] when some of them failed.
func (t *Topic[T]) PublishAll(ctx context.Context, p Publisher, values []*T, opts ...PublishOption) error {
	msgs := make([]*Message, len(values))
	for i, v := range values {
		m, err := t.Message(ctx, v, opts...)
		if err != nil {
			return err
		}
		msgs[i] = m
	}
	return t.send(ctx, p, msgs...)
}

// Decode reads a message of this topic.
func (t *Topic[T]) Decode(m *Message) (Event[T], error) {
	e := Event[T]{Message: m, Value: new(T)}
	return e, t.decode(m, e.Value)
}

// Handler makes a handler of fn. When fn returns nil the event is acknowledged; an error is retried, or ends in the
// dead letters at once if [Retryable] says that a retry is useless. A panic counts as an error with its stack. fn must
// be safe for concurrent use. Handler panics if fn is nil.
func (t *Topic[T]) Handler(fn func(ctx context.Context, e Event[T]) error) Handler {
	needFunction(t.name, fn == nil)
	return newHandler(t.name, t.name, false, func(ctx context.Context, m *Message) (*Message, error) {
		e, err := t.Decode(m)
		if err != nil {
			return nil, err
		}
		return nil, fn(ctx, e)
	})
}
