package idempotency

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/postrider/postrider"
)

// Handler makes a handler of fn whose effect happens once per message. What fn writes through tx commits with the row
// that says so; a duplicate is acknowledged without running fn. When fn returns an error or panics everything is rolled
// back, so that a redelivery runs again. consumer names the effect, "billing": two consumers of a topic each handle a
// message once. It is written down with each message, so it must not change. fn must not end tx, and must be safe for
// concurrent use.
//
// Errors beside those of fn: Aborted, to be retried later, while another copy is being handled; OutOfRange when the
// message is older than [Config.Window] or more than a day ahead of the database's clock; InvalidArgument when it has no
// id; Unavailable when the database cannot be reached or the connection broke in COMMIT. Handler panics if consumer is
// empty, or s or fn nil.
func Handler[T any](
	s *Store, consumer string, t *postrider.Topic[T],
	fn func(ctx context.Context, tx pgx.Tx, e postrider.Event[T]) error,
) postrider.Handler {
	if consumer == "" {
		panic("idempotency: Handler of " + t.Name() + ": the consumer needs a name")
	}
	need("Handler of "+t.Name(), s, fn == nil)
	return t.Handler(func(ctx context.Context, e postrider.Event[T]) error {
		return s.once(ctx, consumer, e.Message, func(tx pgx.Tx) error { return fn(ctx, tx, e) })
	})
}

// need panics at the start of a program whose handler would fail at its first message.
func need(what string, s *Store, noFunction bool) {
	switch {
	case s == nil:
		panic("idempotency: " + what + ": the Store is nil: want what idempotency.New returned")
	case noFunction:
		panic("idempotency: " + what + ": the function is nil")
	}
}

// once runs effect unless consumer has handled m.
func (s *Store) once(ctx context.Context, consumer string, m *postrider.Message, effect func(pgx.Tx) error) error {
	op := "idempotency: " + consumer + ": handle " + m.Type + " " + m.ID
	key, err := s.admitEvent(op, consumer, m)
	if err != nil {
		return err
	}
	fresh := false
	t, err := s.beginClaim(ctx, op, func(b *pgx.Batch) {
		b.Queue(s.sql.claim, s.sql.lockTimeout, key).Exec(func(tag pgconn.CommandTag) error {
			fresh = tag.RowsAffected() == 1
			return nil
		})
	}, func() error { return s.createPartition(ctx, op, m.Time) })
	if err != nil {
		return err
	}
	defer s.end(ctx, t)
	if !fresh {
		s.duplicates.Add(1)
		return nil
	}
	if err := effect(t); err != nil {
		return err
	}
	if err := s.commit(ctx, t, 1, nil); err != nil {
		return commitError(ctx, op, err)
	}
	return nil
}

// admitEvent returns the key of a message in the inbox, or refuses it.
func (s *Store) admitEvent(op, consumer string, m *postrider.Message) (pgtype.UUID, error) {
	switch {
	case m.ID == "":
		return pgtype.UUID{}, &postrider.Error{Code: postrider.InvalidArgument, Op: op, Msg: "the message has no id to know it by"}
	case !validTime(m.Time):
		return pgtype.UUID{}, s.outOfRange(op, "its time, %v, cannot be right: mend the sender's clock", m.Time)
	default:
		return inboxKey(consumer, m), nil
	}
}

// beginClaim opens a transaction and claims keys in the same flight; create makes the partitions that they turn out to lack. The
// caller ends it.
func (s *Store) beginClaim(ctx context.Context, op string, queue func(*pgx.Batch), create func() error) (*tx, error) {
	t, err := s.begin(ctx, queue)
	// The first message of its day. More than once, because a committed partition can be seen in the catalog a moment
	// before the sessions are told to forget that it was missing.
	for range 5 {
		if sqlState(err) != checkViolation {
			break
		}
		if err := create(); err != nil {
			return nil, err
		}
		t, err = s.begin(ctx, queue)
	}
	if err != nil {
		return nil, s.beginError(ctx, op, err)
	}
	return t, nil
}

// outOfRange makes the error of a message that is too old or too new to be known. No repetition mends it.
func (s *Store) outOfRange(op, format string, args ...any) error {
	s.expired.Add(1)
	e := postrider.Errorf(postrider.OutOfRange, format, args...)
	e.Op = op
	return e
}
