package idempotency

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/postrider/postrider"
)

// BatchHandler is [Handler] for work that costs less when it is done for many events at once: fn gets those of a batch (see
// [postrider.Topic.BatchHandler]) that consumer has not handled, in their order, and what it writes through tx commits with
// their rows. One flight begins the transaction and claims all of them, one commits. A batch that holds nothing new does not
// run fn. Handler and BatchHandler of one consumer know of each other's messages.
//
// Each event has a fate of its own, though a transaction fails as a whole:
//   - When fn returns a *[postrider.BatchError] with one entry for each event that it got, everything is rolled back and fn runs
//     again with the events that have no error. Nothing else is as cheap, so do it where fn knows which event is bad.
//   - When fn returns another error or panics, the two halves of the batch are handled one after the other, each in a transaction
//     of its own, and so on: in the end an event fails only by an error that fn returned for it alone. One bad event in 100
//     costs at most 14 transactions more, 100 bad ones 198.
//   - An event whose other copy is being handled at the moment is parted from its batch in the same way and delayed.
//   - When the context ends or the connection breaks all that is not committed fails with that error.
//
// So fn runs more than once in a row, sees an event in several compositions of the batch, and keeps nothing of a run that has
// failed. Batches that update the same rows in different order run into deadlocks, which PostgreSQL resolves after a second by
// failing one: have fn go through rows in the order of their keys. The claims themselves are sorted.
//
// The errors of an event are those of [Handler]. fn must not end tx, and must be safe for concurrent use. BatchHandler panics if
// consumer is empty, or s or fn nil.
func BatchHandler[T any](
	s *Store, consumer string, t *postrider.Topic[T],
	fn func(ctx context.Context, tx pgx.Tx, events []postrider.Event[T]) error,
) postrider.Handler {
	if consumer == "" {
		panic("idempotency: BatchHandler of " + t.Name() + ": the consumer needs a name")
	}
	need("BatchHandler of "+t.Name(), s, fn == nil)
	return t.BatchHandler(func(ctx context.Context, events []postrider.Event[T]) error {
		b := batch{
			store: s, consumer: consumer, msgs: make([]*postrider.Message, len(events)), errs: make([]error, len(events)),
			op: fmt.Sprintf("idempotency: %s: handle %d events of %s", consumer, len(events), t.Name()),
			effect: func(ctx context.Context, tx pgx.Tx, fresh []claim) error {
				some := make([]postrider.Event[T], len(fresh))
				for i, c := range fresh {
					some[i] = events[c.place]
				}
				return fn(ctx, tx, some)
			},
		}
		for i, e := range events {
			b.msgs[i] = e.Message
		}
		b.handle(ctx)
		return &postrider.BatchError{Errs: b.errs}
	})
}

// batch is the work on several messages.
type batch struct {
	store    *Store
	op       string
	consumer string
	msgs     []*postrider.Message
	errs     []error // what becomes of each message
	effect   func(ctx context.Context, tx pgx.Tx, fresh []claim) error
	busy     int // messages that were found to be in hand elsewhere
}

// claim is a message of a batch, by its place, and its key. Slices of claims are in the order of the batch.
type claim struct {
	place int
	key   pgtype.UUID
}

// handle finds out what becomes of each message.
func (b *batch) handle(ctx context.Context) {
	todo := make([]claim, 0, len(b.msgs))
	first := make(map[pgtype.UUID]int, len(b.msgs))
	again := map[int]int{} // copies within the batch, each with the place of its first
	for i, m := range b.msgs {
		key, err := b.store.admitEvent(b.op, b.consumer, m)
		if err != nil {
			b.errs[i] = err
		} else if place, there := first[key]; there {
			again[i] = place
		} else {
			first[key] = i
			todo = append(todo, claim{i, key})
		}
	}
	b.run(ctx, todo, b.store.sql.lockTimeout)
	for i, place := range again {
		if b.errs[i] = b.errs[place]; b.errs[i] == nil {
			b.store.duplicates.Add(1)
		}
	}
}

// maxBusy is how many messages of a batch that are in hand elsewhere are looked for: each takes some waiting. If there are
// more it is something else that holds up all of them.
const maxBusy = 8

// run handles messages together, and when that fails, in parts.
func (b *batch) run(ctx context.Context, todo []claim, lockTimeout string) {
	for len(todo) > 0 {
		left, separable, err := b.try(ctx, todo, lockTimeout)
		if err == nil {
			return
		}
		todo = left
		if each, ok := err.(*postrider.BatchError); ok { //nolint:errorlint // one that is wrapped is of something else
			todo = b.refuse(todo, each.Errs)
			continue
		}
		if sqlState(err) == lockNotAvailable {
			lockTimeout = b.store.sql.briefLockTimeout // it has waited enough
			if len(todo) == 1 {
				b.busy++
			}
			separable = b.busy < maxBusy
		}
		if len(todo) == 1 || !separable {
			for _, c := range todo {
				b.errs[c.place] = err
			}
			return
		}
		b.run(ctx, todo[:len(todo)/2], lockTimeout)
		todo = todo[len(todo)/2:]
	}
}

// refuse keeps the errors of messages and returns those that have none.
func (b *batch) refuse(todo []claim, errs []error) []claim {
	var rest []claim
	for i, c := range todo {
		if b.errs[c.place] = errs[i]; errs[i] == nil {
			rest = append(rest, c)
		}
	}
	return rest
}

// try handles messages in one transaction. If it fails, it returns those that are left, which are neither duplicates nor
// refused, and whether a part of them may succeed.
func (b *batch) try(ctx context.Context, todo []claim, lockTimeout string) (left []claim, separable bool, err error) {
	s := b.store
	var fresh []claim
	t, err := s.beginClaim(ctx, b.op, func(q *pgx.Batch) {
		q.Queue(s.sql.claimAll, lockTimeout, sortedKeys(todo)).Query(func(rows pgx.Rows) (err error) {
			fresh, err = among(todo, rows)
			return err
		})
		if lockTimeout != s.sql.lockTimeout {
			q.Queue(s.sql.wait, s.sql.lockTimeout)
		}
	}, func() (err error) {
		todo, err = b.createPartitions(ctx, todo)
		return err
	})
	if err != nil {
		return todo, false, err
	}
	defer s.end(ctx, t)
	s.duplicates.Add(int64(len(todo) - len(fresh)))
	if len(fresh) == 0 {
		return nil, false, nil
	}
	if err = b.guarded(ctx, t, fresh); err == nil {
		if err = s.commit(ctx, t, len(fresh), nil); err == nil {
			return nil, false, nil
		}
		err = commitError(ctx, b.op, err)
	}
	return fresh, ctx.Err() == nil && !t.conn.Conn().IsClosed(), err
}

// guarded runs the effect and returns its panic as an error.
func (b *batch) guarded(ctx context.Context, t *tx, fresh []claim) (err error) {
	defer func() {
		if r := recover(); r != nil {
			text := fmt.Sprintf("the handler panicked: %v\n%s", r, debug.Stack())
			cause, _ := r.(error)
			err = &postrider.Error{Code: postrider.Internal, Op: b.op, Msg: text, Err: cause}
		}
	}()
	err = b.effect(ctx, t, fresh)
	each, ok := err.(*postrider.BatchError) //nolint:errorlint // one that is wrapped is of something else
	switch {
	case !ok:
		return err
	case len(each.Errs) != len(fresh):
		return postrider.Errorf(postrider.Internal, "the BatchError has %d entries for %d events: want one for each, in their order: %w",
			len(each.Errs), len(fresh), err)
	case !slices.ContainsFunc(each.Errs, func(err error) bool { return err != nil }):
		return nil
	default:
		return err
	}
}

// createPartitions creates the partitions of messages, and returns those messages that are not refused for their time.
func (b *batch) createPartitions(ctx context.Context, todo []claim) ([]claim, error) {
	there := map[time.Time]bool{}
	var rest []claim
	for _, c := range todo {
		at := b.msgs[c.place].Time
		if day := dayOf(at); !at.IsZero() && !there[day] {
			err := b.store.createPartition(ctx, b.op, at)
			if errors.Is(err, postrider.OutOfRange) {
				b.errs[c.place] = err
				continue
			} else if err != nil {
				return todo, err
			}
			there[day] = true
		}
		rest = append(rest, c)
	}
	return rest, nil
}

// sortedKeys returns the keys in order, so that two batches never wait for each other.
func sortedKeys(todo []claim) []pgtype.UUID {
	keys := make([]pgtype.UUID, len(todo))
	for i, c := range todo {
		keys[i] = c.key
	}
	slices.SortFunc(keys, func(a, b pgtype.UUID) int { return bytes.Compare(a.Bytes[:], b.Bytes[:]) })
	return keys
}

// among returns those whose keys the rows have.
func among(todo []claim, rows pgx.Rows) ([]claim, error) {
	keys, err := pgx.CollectRows(rows, pgx.RowTo[pgtype.UUID])
	if err != nil {
		return nil, err
	}
	has := make(map[pgtype.UUID]bool, len(keys))
	for _, k := range keys {
		has[k] = true
	}
	var some []claim
	for _, c := range todo {
		if has[c.key] {
			some = append(some, c)
		}
	}
	return some, nil
}
