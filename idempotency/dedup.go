package idempotency

import (
	"context"
	"strconv"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/envelope"
)

// messageType is the content type of a recorded reply, a CloudEvent in the structured JSON format.
const messageType = "application/cloudevents+json"

// Dedup returns a middleware, for [postrider.Stack] say, that handles a message once per consumer, known by its source and id, and answers
// a copy with the recorded reply. It is for effects outside the database, with the promise of [Do]: a copy that comes while the first
// is being handled is delayed, and one whose owner died is handled again. An effect in the database is better kept by [Handler] and
// [Action], which commit it with the record.
//
// Errors are not recorded, permanent ones included: what has ended in the dead letters can be replayed. Errors beside those of the
// handler: Aborted, to be retried later, while another copy is being handled or when the lease was lost; Unavailable when the store
// cannot be reached; InvalidArgument for a message without an id, or with a source and id of over 1,000 bytes. Dedup panics if r is nil or
// consumer empty: it is written down with each message, so it must not change.
func Dedup(r Records, consumer string) postrider.Middleware {
	if consumer == "" {
		panic("idempotency: Dedup: the consumer needs a name")
	}
	if r == nil {
		panic("idempotency: Dedup: the Records are nil")
	}
	return func(next postrider.HandlerFunc) postrider.HandlerFunc {
		return func(ctx context.Context, m *postrider.Message) (*postrider.Message, error) {
			op := "idempotency: " + consumer + ": handle " + m.Type + " " + m.ID
			id := strconv.Quote(m.Source) + m.ID
			if m.ID == "" || len(id) > maxChosenKey {
				return nil, &postrider.Error{
					Code: postrider.InvalidArgument, Op: op, Msg: "the message needs an id to know it by, of at most 1,000 bytes with its source",
				}
			}
			t := task{
				records: r, op: op, key: "message " + consumer + " " + id, request: []byte{}, lease: defaultLease, askAgain: busyDelay,
			}
			var reply *postrider.Message
			o, repeated, err := t.do(ctx, func(ctx context.Context) (o Outcome, err error) {
				if reply, err = next(ctx, m); err == nil && reply != nil {
					o = Outcome{ContentType: messageType, Data: envelope.AppendJSON(nil, reply)}
				}
				return o, err
			})
			switch {
			case err != nil:
				return nil, err
			case repeated && o.ContentType == messageType:
				reply = &postrider.Message{Topic: m.Extension(postrider.ExtReplyTo)}
				if err := envelope.ParseJSON(o.Data, reply); err != nil {
					return nil, &postrider.Error{Code: postrider.Internal, Op: op, Msg: "the recorded reply is damaged", Err: err}
				}
			}
			return reply, nil
		}
	}
}
