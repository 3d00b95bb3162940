package postrider

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Publisher takes messages: the bus, an outbox in a transaction, a recorder in a test. Publish returns nil when all of
// them are accepted for good (in the stream, in the table). A message without a Source gets the publisher's; the
// publisher changes nothing else and keeps nothing after it returns. When some of several messages failed the error is
// a *[BatchError]. Safe for concurrent use unless the implementation says otherwise.
//
// A Publish that fails with a time-out or a lost connection may have been accepted: publishing the same messages again
// with the same ids is safe, because receivers tell duplicates by source and id.
type Publisher interface {
	Publish(ctx context.Context, msgs ...*Message) error
}

// BatchError tells the fate of each of several messages, of a [Publisher.Publish] or of a [Topic.BatchHandler], that failed
// in part.
type BatchError struct {
	// Errs has one entry for each message, in their order, nil where the message was accepted or handled.
	Errs []error
}

// Error counts the failures and gives the first.
func (e *BatchError) Error() string {
	failed, first := 0, error(nil)
	for _, err := range e.Errs {
		if err != nil {
			if failed++; first == nil {
				first = err
			}
		}
	}
	return fmt.Sprintf("%d of %d messages failed, the first: %v", failed, len(e.Errs), first)
}

// Unwrap returns the failures, so that errors.Is finds any of them.
func (e *BatchError) Unwrap() []error {
	var errs []error
	for _, err := range e.Errs {
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// PublishErrors returns what became of each of n messages, given the error of their Publish: n times nil, the entries
// of a *[BatchError], or n times err.
func PublishErrors(err error, n int) []error {
	var b *BatchError
	if errors.As(err, &b) && len(b.Errs) == n {
		return b.Errs
	}
	errs := make([]error, n)
	for i := range errs {
		errs[i] = err
	}
	return errs
}

// PublishOption changes one message before it is published.
type PublishOption func(*Message) error

// MessageID sets the id instead of a new UUID. Two messages of one source with the same id are one message.
func MessageID(id string) PublishOption {
	return func(m *Message) error { m.ID = id; return nil }
}

// Subject sets the CloudEvents attribute subject: the thing in the source that the message is about.
func Subject(subject string) PublishOption {
	return func(m *Message) error { m.Subject = subject; return nil }
}

// Key sets the partition key, in place of the contract's [KeyBy].
func Key(key string) PublishOption { return WithExtension(ExtPartitionKey, key) }

// ReplyTo sets the topic that the reply to a command is published to.
func ReplyTo(topic string) PublishOption { return WithExtension(ExtReplyTo, topic) }

// IdempotencyKey sets the key that makes repetitions of a command or call one: the same over all attempts.
func IdempotencyKey(key string) PublishOption { return WithExtension(ExtIdempotencyKey, key) }

// Delay has the message delivered after d, counted from now; see [At]. A negative d is InvalidArgument.
func Delay(d time.Duration) PublishOption {
	return func(m *Message) error {
		if d < 0 {
			return Errorf(InvalidArgument, "Delay is %v: want a positive duration", d)
		}
		return m.SetExtension(ExtDeliverAt, time.Now().Add(d))
	}
}

// At has the message delivered at t and not before; a time that has passed means at once. The publisher accepts it now, so
// that it outlives this process. The zero time is InvalidArgument. It has no place in the order of its key: it is as new
// as the time it is delivered at.
func At(t time.Time) PublishOption {
	return func(m *Message) error {
		if t.IsZero() {
			return Errorf(InvalidArgument, "At is the zero time: leave it out for a message that is delivered at once")
		}
		return m.SetExtension(ExtDeliverAt, t)
	}
}

// Expires has the message lose its meaning after d, counted from now: what is not handled by then goes to the dead
// letters. A d that is not positive is InvalidArgument.
func Expires(d time.Duration) PublishOption {
	return func(m *Message) error {
		if d <= 0 {
			return Errorf(InvalidArgument, "Expires is %v: want a positive duration", d)
		}
		return m.SetExtension(ExtExpiryTime, time.Now().Add(d))
	}
}

// WithExtension sets an extension attribute; see [Message.SetExtension] for the values it takes.
func WithExtension(name string, value any) PublishOption {
	return func(m *Message) error { return m.SetExtension(name, value) }
}
