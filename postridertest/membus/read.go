package membus

import (
	"context"
	"iter"
	"slices"
	"time"

	"github.com/postrider/postrider"
)

// Read returns the messages that a stream has, oldest first: those stored at since or later, all for the zero time, up to the last
// one that is there when the reading begins. It is for looking at what was published; no group's place changes. The error is
// NotFound when there is no such stream, or that of ctx.
func (b *Bus) Read(ctx context.Context, stream string, since time.Time) iter.Seq2[*postrider.Message, error] {
	return func(yield func(*postrider.Message, error) bool) {
		messages, err := b.stored(ctx, stream)
		for _, s := range messages {
			if s.at.Before(since) {
				continue
			}
			m, parseErr := s.message(b.topic(s.subject))
			if parseErr != nil {
				m = &postrider.Message{Topic: b.topic(s.subject), Data: s.event}
			}
			m.Delivery = postrider.Delivery{Stream: s.stream, Sequence: s.sequence, Stored: s.at}
			if err = ctx.Err(); err != nil {
				break
			}
			if !yield(m, nil) {
				return
			}
		}
		if err != nil {
			yield(nil, err)
		}
	}
}

func (b *Bus) stored(ctx context.Context, stream string) ([]*stored, error) {
	k := b.broker
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := b.enter(ctx, "read stream "+stream); err != nil {
		return nil, err
	}
	for _, s := range k.streams {
		if s.name == stream {
			return slices.Clone(s.messages), nil
		}
	}
	return nil, postrider.Errorf(postrider.NotFound, "membus: read stream %s: there is none", stream)
}

// Check says if Publish would refuse a message for what it is: see bus.Bus. There is no bound on its size.
func (b *Bus) Check(m *postrider.Message) error { return b.check(m) }
