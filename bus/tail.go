package bus

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// tail is a position of a stream. The time at which the server stored the message tells it from another one that got its
// sequence later, and the stream's own time the stream from another one of the same name.
type tail struct {
	Topic    string    `json:"topic"` // one that the stream takes
	Created  time.Time `json:"created"`
	Sequence uint64    `json:"sequence"`
	Time     time.Time `json:"time"`
}

// Tail returns where the streams of some topics end now, by the names of the streams: all that was acknowledged before the
// call is up to there. With delayed the bus's own stream is among them, where messages wait that are to be delivered later. The
// values are for [Bus.Lost], now or after a restart. An outbox relay asks for them.
func (b *Bus) Tail(ctx context.Context, topics []string, delayed bool) (map[string]string, error) {
	const op = "bus: read the end of a stream"
	if err := b.connected(op); err != nil {
		return nil, err
	}
	tails := map[string]string{}
	read := func(name, topic string) error {
		stream, err := b.js.Stream(ctx, name)
		if err != nil {
			return err
		}
		info := stream.CachedInfo()
		text, err := json.Marshal(tail{topic, info.Created, info.State.LastSeq, info.State.LastTime})
		tails[name] = string(text)
		return err
	}
	if delayed {
		// Where nothing was put off by this or another bus, because its time had come by then, there is none.
		if err := read(b.ownStreamName(), schedTopics+".at"); err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
			return nil, fromNATS(op, err)
		}
	}
	seen := map[*lane]bool{}
	for _, topic := range topics {
		subject := b.subject(topic)
		l, err := b.pub.lane(ctx, subject)
		if err != nil {
			return nil, err
		}
		if seen[l] {
			continue
		}
		seen[l] = true
		if err := read(l.name, topic); err != nil {
			return nil, fromNATS(op, err)
		}
	}
	return tails, nil
}

// Lost returns the streams that do not hold any more what was up to these tails, by no doing of their limits or of somebody
// who removed messages: a server that does not sync has lost power, or a stream was deleted and created again. A
// declared stream that is missing is declared first; another one that is missing is not told of until it is back.
func (b *Bus) Lost(ctx context.Context, tails map[string]string) ([]string, error) {
	const op = "bus: compare the end of a stream"
	if err := b.connected(op); err != nil {
		return nil, err
	}
	var lost []string
	for name, text := range tails {
		var t tail
		if err := json.Unmarshal([]byte(text), &t); err != nil {
			return nil, postrider.Errorf(postrider.InvalidArgument, "%s: %q is no tail: %w", op, text, err)
		}
		stream, err := b.js.Stream(ctx, name)
		if errors.Is(err, jetstream.ErrStreamNotFound) && b.declareAgain(b.subject(t.Topic)) {
			b.pub.forget(b.subject(t.Topic))
			declare := b.declare
			if name == b.ownStreamName() {
				declare = b.declareOwn
			}
			if err := declare(ctx); err != nil {
				return nil, err
			}
			stream, err = b.js.Stream(ctx, name)
		}
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			continue
		}
		if err != nil {
			return nil, fromNATS(op, err)
		}
		holds, err := t.holds(ctx, stream)
		if err != nil {
			return nil, fromNATS(op, err)
		}
		if !holds {
			lost = append(lost, name)
		}
	}
	return lost, nil
}

// holds says if the stream still is what it was up to t. A message that was removed, by limits, a purge or an acknowledgement, is
// not lost: the stream goes on counting behind it.
func (t tail) holds(ctx context.Context, stream jetstream.Stream) (bool, error) {
	info := stream.CachedInfo()
	switch {
	case !info.Created.Equal(t.Created) || info.State.LastSeq < t.Sequence:
		return false, nil
	case info.State.FirstSeq > t.Sequence || t.Sequence == 0:
		return true, nil
	case info.State.LastSeq == t.Sequence && info.State.LastTime.Equal(t.Time):
		return true, nil
	}
	msg, err := stream.GetMsg(ctx, t.Sequence)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	return msg.Time.Equal(t.Time), nil
}

// connected fails at once where the client library would wait for the server.
func (b *Bus) connected(op string) error {
	if b.nc.IsConnected() {
		return nil
	}
	return &postrider.Error{Code: postrider.Unavailable, Op: op, Msg: "not connected to NATS", Unprocessed: true}
}

// Reconnects counts how often the connection was lost and made again.
func (b *Bus) Reconnects() uint64 { return b.nc.Stats().Reconnects }

// PublishOnce is [Bus.Publish] without further attempts: whoever makes them first looks if the server still has what it had.
func (b *Bus) PublishOnce(ctx context.Context, msgs ...*postrider.Message) error {
	return b.publishAll(ctx, msgs, false)
}
