package bus

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/backoff"
)

// publishRetry spaces the attempts of one Publish; PublishTimeout bounds them.
var publishRetry = postrider.RetryPolicy{ //nolint:gochecknoglobals // a constant in all but syntax
	Attempts: -1, Initial: 50 * time.Millisecond, Max: time.Second,
}

// Publish stores messages in their streams and returns when the server has acknowledged all of them, synced as the
// server's sync_interval says. Messages of one call that go to one stream are stored in their order. What several
// callers publish at the same time shares the server's disk syncs (see the package comment). Failures that pass are
// tried again under the same message ids until PublishTimeout or ctx ends, so that the server drops what it had already.
//
// Errors: InvalidArgument (attributes, no such address), ResourceExhausted (too large for the server, stream full),
// FailedPrecondition (no stream takes the address), Unavailable and DeadlineExceeded (it may have been stored). With
// several messages the error is a *[postrider.BatchError].
func (b *Bus) Publish(ctx context.Context, msgs ...*postrider.Message) error {
	switch len(msgs) {
	case 0:
		return nil
	case 1:
		return b.publishOne(ctx, time.Now(), msgs[0])
	}
	return b.publishAll(ctx, msgs, true)
}

// publishAll publishes messages in one attempt, or in as many as it takes.
func (b *Bus) publishAll(ctx context.Context, msgs []*postrider.Message, again bool) error {
	began := time.Now()
	errs := make([]error, len(msgs))
	entries := make([]*entry, 0, len(msgs))
	index := make([]int, 0, len(msgs))
	for i, m := range msgs {
		e, err := b.prepare(m)
		if err != nil {
			errs[i] = err
			continue
		}
		entries, index = append(entries, e), append(index, i)
	}
	ctx, cancel := context.WithDeadline(ctx, began.Add(b.cfg.PublishTimeout))
	defer cancel()
	results := b.publishOnce(ctx, entries)
	if again {
		results = b.publishAgain(ctx, entries, results)
	} else {
		b.published(entries, results)
	}
	for i, err := range results {
		errs[index[i]] = err
	}
	for _, err := range errs {
		if err != nil {
			return &postrider.BatchError{Errs: errs}
		}
	}
	return nil
}

// publishOne is Publish for one message, nearly always without a context and a goroutine of its own.
func (b *Bus) publishOne(ctx context.Context, began time.Time, m *postrider.Message) error {
	e, err := b.prepare(m)
	if err != nil {
		return err
	}
	l := b.pub.laneKnown(e.wanted())
	if l != nil && e.via == "" && b.declared.Load() {
		e.divide(int(l.partitions.Load()))
		if err = l.one(ctx, e); err == nil {
			b.stats.published.Add(1)
			b.release(e)
			return nil
		}
		if !e.again(err) {
			return err
		}
	}
	ctx, cancel := context.WithDeadline(ctx, began.Add(b.cfg.PublishTimeout))
	defer cancel()
	entries, errs := []*entry{e}, []error{err}
	if err == nil {
		errs = b.publishOnce(ctx, entries)
	}
	return b.publishAgain(ctx, entries, errs)[0]
}

// publishAgain makes further attempts for the entries of which errs says that they may succeed, and returns what became of all.
func (b *Bus) publishAgain(ctx context.Context, entries []*entry, errs []error) []error {
	index := make([]int, 0, len(entries))
	for i, e := range entries {
		if e.again(errs[i]) {
			index = append(index, i)
		}
	}
	for attempt := 1; len(index) > 0 && !b.nc.IsClosed() && backoff.Wait(ctx, publishRetry, attempt) == nil; attempt++ {
		again := make([]*entry, len(index))
		for i, at := range index {
			again[i] = entries[at]
		}
		left := index[:0]
		for i, err := range b.publishOnce(ctx, again) {
			at := index[i]
			if errs[at] = err; again[i].again(err) {
				left = append(left, at)
			}
		}
		index = left
	}
	b.published(entries, errs)
	return errs
}

// published takes leave of the entries that are stored.
func (b *Bus) published(entries []*entry, errs []error) {
	for i, e := range entries {
		if errs[i] == nil {
			b.stats.published.Add(1)
			b.release(e)
		}
	}
}

// again says if a failed entry may be sent again: never without a message id once it may have been stored.
func (e *entry) again(err error) bool {
	return err != nil && !e.abandoned && postrider.Retryable(err) && (!e.isNameless() || notStored(err))
}

// publishOnce makes one attempt.
func (b *Bus) publishOnce(ctx context.Context, entries []*entry) []error {
	if err := b.declare(ctx); err != nil {
		return postrider.PublishErrors(unsent(err), len(entries))
	}
	if slices.ContainsFunc(entries, func(e *entry) bool { return e.via != "" }) {
		if err := b.declareOwn(ctx); err != nil {
			return postrider.PublishErrors(unsent(err), len(entries))
		}
	}
	errs := b.pub.publish(ctx, entries)
	for i, err := range errs {
		if m, gone := errors.AsType[*missing](err); gone && b.declareAgain(m.subject) {
			errs[i] = &postrider.Error{
				Code: postrider.Unavailable, Op: "bus: publish", Unprocessed: true, Err: err,
				Msg: "the stream that was declared is gone, or no longer takes the topic",
			}
		}
	}
	return errs
}

// missing is a subject that no stream takes.
type missing struct{ subject string }

func (m *missing) Error() string { return "no stream takes " + m.subject }
func (m *missing) Unwrap() error { return jetstream.ErrStreamNotFound }

// declareAgain has the stream of a subject declared at the next attempt, and says if it is ours to declare: it may have been
// deleted, or have lost our topics to somebody who wrote its configuration over.
func (b *Bus) declareAgain(subject string) bool {
	for _, own := range [...]string{groupTopics, schedTopics} {
		if covers(b.subject(own+".>"), subject) {
			b.ownDeclared.Store(false)
			return true
		}
	}
	for _, s := range b.cfg.Streams {
		for _, topic := range s.Topics {
			if covers(b.subject(topic), subject) {
				b.declared.Store(false)
				return true
			}
		}
	}
	return false
}

// notStored says if a failed message is provably in no stream, so that it can be sent again without an id that the server
// would know it by.
func notStored(err error) bool {
	e, ok := errors.AsType[*postrider.Error](err)
	return ok && e.Unprocessed
}

// Check says if Publish would refuse a message for what it is: its attributes, its address, its size with the headers that it
// would have, by what the server that the bus is connected to takes. It asks nobody. Give it to an outbox as its
// Config.Check: then the transaction fails and not the relay. The errors are those of Publish.
func (b *Bus) Check(m *postrider.Message) error {
	e, err := b.prepare(m)
	if err != nil {
		return err
	}
	b.release(e)
	return nil
}

// prepare checks a message and encodes it.
func (b *Bus) prepare(m *postrider.Message) (*entry, error) {
	if m != nil && m.Source == "" {
		m.Source = b.cfg.Source
	}
	if err := m.Validate(); err != nil {
		return nil, err
	}
	if err := m.CheckAddress(); err != nil {
		return nil, err
	}
	topic := m.Address()
	if err := checkPartitions(topic); err != nil {
		return nil, postrider.Errorf(postrider.InvalidArgument, "bus: publish %s: %w", m.ID, err)
	}
	e := b.newEntry(m, b.subject(topic))
	if err := b.postpone(m, e); err != nil {
		return nil, err
	}
	msg := e.msg
	if limit := b.nc.MaxPayload(); limit > 0 && int64(msg.Size()) > limit {
		return nil, postrider.Permanent(&postrider.Error{
			Code: postrider.ResourceExhausted, Op: "bus: publish " + m.Type + " " + m.ID,
			Msg: fmt.Sprintf("the message has %d bytes with its headers, the server takes %d (max_payload): "+
				"send a reference instead of the data", msg.Size(), limit),
		})
	}
	return e, nil
}

// isAddress says if s can be published to.
func isAddress(s string) bool { return (&postrider.Message{Topic: s}).CheckAddress() == nil }
