package bus

import (
	"context"
	"errors"
	"iter"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

const (
	// readAhead bounds what a Read has asked for and not yet handed out; a larger message comes all the same.
	readAhead = 8 << 20

	// readPatience is how long Read waits for a message that the stream should have before it looks whether it still does.
	readPatience = 5 * time.Second
)

// Read returns the messages that a stream has, oldest first: those stored at since or later, all for the zero time, up to
// the last one that is there when the reading begins. It is for looking at what was published, such as outbox.Audit does:
// nothing is acknowledged and no group's place changes. Each loop over the result reads anew, from the leader of the
// stream; lost connections are waited for until ctx ends.
//
// A message that is no CloudEvent, or cannot be read as one, has a Topic and Data and no ID; the events of a batch come one by
// one. An error ends the loop: NotFound when there is no such stream, or that of ctx or the server.
func (b *Bus) Read(ctx context.Context, stream string, since time.Time) iter.Seq2[*postrider.Message, error] {
	return func(yield func(*postrider.Message, error) bool) {
		if err := b.read(ctx, stream, since, func(m *postrider.Message) bool { return yield(m, nil) }); err != nil {
			yield(nil, fromNATS("bus: read stream "+stream, err))
		}
	}
}

func (b *Bus) read(ctx context.Context, name string, since time.Time, fn func(*postrider.Message) bool) error {
	stream, err := b.js.Stream(ctx, name)
	if err != nil {
		return err
	}
	last := stream.CachedInfo().State.LastSeq
	cfg := jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverAllPolicy, InactiveThreshold: time.Minute}
	if !since.IsZero() {
		cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, &since
	}
	consumer, err := stream.OrderedConsumer(ctx, cfg)
	if err != nil {
		return err
	}
	if consumer.CachedInfo().NumPending == 0 {
		return nil
	}
	messages, err := consumer.Messages(jetstream.PullMaxBytes(readAhead))
	if err != nil {
		return err
	}
	defer messages.Stop()
	for next := consumer.CachedInfo().Delivered.Stream + 1; next <= last; {
		msg, err := b.nextOf(ctx, messages)
		if errors.Is(err, nats.ErrTimeout) {
			// Is the rest deleted, or the server away? With a subject GetMsg takes the sequence or the first one behind it.
			_, err = stream.GetMsg(ctx, next, jetstream.WithGetMsgSubject(">"))
			if errors.Is(err, jetstream.ErrMsgNotFound) {
				return nil
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		at, err := msg.Metadata()
		if err != nil {
			return err
		}
		next = at.Sequence.Stream + 1
		if next > last+1 {
			return nil // published since
		}
		raw := &nats.Msg{Subject: msg.Subject(), Header: msg.Headers(), Data: msg.Data()}
		for _, m := range b.events(raw, postrider.Delivery{Stream: name, Sequence: at.Sequence.Stream, Stored: at.Timestamp}) {
			if !fn(m) {
				return nil
			}
		}
		if at.NumPending == 0 {
			return nil
		}
	}
	return nil
}

func (b *Bus) nextOf(ctx context.Context, messages jetstream.MessagesContext) (jetstream.Msg, error) {
	patience, cancel := context.WithTimeout(ctx, readPatience)
	defer cancel()
	msg, err := messages.Next(jetstream.NextContext(patience))
	if err != nil && ctx.Err() == nil && patience.Err() != nil {
		err = nats.ErrTimeout
	}
	return msg, err
}

// events returns the events that a stored message carries.
func (b *Bus) events(raw *nats.Msg, delivery postrider.Delivery) []*postrider.Message {
	topic := b.topic(raw.Subject)
	f, _ := formatOf(raw)
	items, err := splitBatch(raw, f)
	if items == nil || err != nil {
		items = []*nats.Msg{raw}
	}
	events := make([]*postrider.Message, len(items))
	for i, item := range items {
		m, isEvent, err := decode(item, topic)
		if isEvent && err != nil {
			m = &postrider.Message{Topic: topic, Data: item.Data}
		}
		m.Delivery = delivery
		events[i] = m
	}
	return events
}
