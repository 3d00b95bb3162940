package bus

import (
	"context"
	"errors"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// PublishAfter publishes a message only if the last one at its address has a given sequence in the stream, 0 for none: of
// several writers that have read the same, one succeeds. In a stream with partitions it is the last one of the partition
// that the message's key belongs to. PublishAfter returns the sequence of the new message. The loser's error is
// Aborted: read again. Unlike Publish it makes one attempt; after DeadlineExceeded or Unavailable the message may have been
// stored, and only reading tells.
func (b *Bus) PublishAfter(ctx context.Context, last uint64, m *postrider.Message) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, b.cfg.PublishTimeout)
	defer cancel()
	e, err := b.prepare(m)
	if err != nil {
		return 0, err
	}
	if e.via != "" {
		return 0, postrider.Errorf(postrider.InvalidArgument,
			"bus: publish %s: a message that is delivered later cannot expect a sequence", m.ID)
	}
	if err := b.declare(ctx); err != nil {
		return 0, err
	}
	if _, err := b.pub.laneOf(ctx, e); err != nil {
		return 0, err
	}
	seq, err := b.publishOnly(ctx, e.msg, jetstream.WithExpectLastSequencePerSubject(last))
	if err == nil {
		b.stats.published.Add(1)
	}
	return seq, err
}

// publishOnly publishes under a condition, and so outside of the groups, which have one fate.
func (b *Bus) publishOnly(ctx context.Context, msg *nats.Msg, opts ...jetstream.PublishOpt) (uint64, error) {
	op := "bus: publish to " + msg.Subject
	if !b.nc.IsConnected() { // the client library would send it later
		return 0, &postrider.Error{Code: postrider.Unavailable, Op: op, Msg: "not connected to NATS", Unprocessed: true}
	}
	ack, err := b.js.PublishMsg(ctx, msg, append(opts, jetstream.WithRetryAttempts(0))...)
	switch {
	case errors.Is(err, jetstream.ErrNoStreamResponse):
		return 0, noStream()
	case err != nil:
		return 0, fromNATS(op, err)
	}
	return ack.Sequence, nil
}
