package bus

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// A message that is to be delivered later waits in the bus's own stream, since the server schedules only within one
// stream, and none that refuses what it has no room for. When it is due the server puts it before the group below, whose
// handler, in any bus that runs, publishes it to its address. See docs/adr/0003-scheduled-messages.md.
const (
	schedulerGroup = "postrider-scheduler"
	headerTimeZone = "Nats-Schedule-Time-Zone"
)

// lastSchedule is where the server's nanoseconds end, less a little.
var lastSchedule = time.Date(2262, 1, 1, 0, 0, 0, 0, time.UTC) //nolint:gochecknoglobals // constant

// postpone obeys the attributes deliverat and expirytime of a message that is about to be published to a subject.
func (b *Bus) postpone(m *postrider.Message, e *entry) error {
	at, err := timeAttribute(m, postrider.ExtDeliverAt)
	if err != nil {
		return err
	}
	expiry, err := timeAttribute(m, postrider.ExtExpiryTime)
	if err != nil {
		return err
	}
	if at.IsZero() && expiry.IsZero() {
		return nil
	}
	now := time.Now()
	switch {
	case !expiry.IsZero() && !now.Before(expiry):
		return expired("publish", m, expiry)
	case !expiry.IsZero() && !at.Before(expiry):
		return postrider.Errorf(postrider.InvalidArgument, "bus: publish %s: it is to be delivered at %v and expires before, at %v",
			m.ID, at, expiry)
	case !at.After(now):
		return nil
	case !at.Before(lastSchedule):
		return postrider.Errorf(postrider.InvalidArgument, "bus: publish %s: deliverat is %v: the server knows no time after %d",
			m.ID, at, lastSchedule.Year()-1)
	}
	// The id of the waiting message holds the time: another time for the same message is no duplicate but replaces it.
	e.msg.Header[headerMsgID] = []string{messageID(m) + "@" + strconv.FormatInt(at.UnixNano(), 10)}
	b.toScheduler(e, m)
	e.schedule(b.delayedSubject(m.Source, m.ID), atSpec(at))
	return nil
}

// toScheduler turns an entry to a message's address into one to the group that will publish it there.
func (b *Bus) toScheduler(e *entry, m *postrider.Message) {
	e.to = e.msg.Subject
	e.msg.Subject = b.groupSubject(schedulerGroup, m.Address())
	e.msg.Header[headerTopic] = []string{m.Address()}
}

func (b *Bus) delayedSubject(source, id string) string {
	return b.subject(schedTopics + ".at." + token(source) + "." + token(id))
}

func timeAttribute(m *postrider.Message, name string) (time.Time, error) {
	text := m.Extension(name)
	if text == "" {
		return time.Time{}, nil
	}
	t, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return t, postrider.Errorf(postrider.InvalidArgument, "bus: message %s: attribute %s is no time: %w", m.ID, name, err)
	}
	return t, nil
}

func expired(what string, m *postrider.Message, at time.Time) error {
	return postrider.Permanent(&postrider.Error{
		Code: postrider.DeadlineExceeded, Op: "bus: " + what + " " + m.ID, Unprocessed: true,
		Msg: "the message expired at " + at.UTC().Format(time.RFC3339Nano),
	})
}

// checkExpiry refuses a message whose time is over before its handler begins.
func checkExpiry(m *postrider.Message) error {
	at, err := timeAttribute(m, postrider.ExtExpiryTime)
	if err == nil && !at.IsZero() && !time.Now().Before(at) {
		return expired("handle", m, at)
	}
	return err
}

// forwarder returns the subscription that publishes what is due.
func (b *Bus) forwarder() *subscription {
	h := postrider.RawHandler(groupTopics+"."+schedulerGroup, b.forward)
	s := &subscription{
		bus: b, handler: h, own: true, subject: b.groupSubject(schedulerGroup, "") + ">", durable: schedulerGroup,
		cfg: subscribeConfig{
			group: schedulerGroup, concurrency: 16, ackWait: 10 * time.Second, from: DeliverAll,
			retry: postrider.RetryPolicy{Attempts: -1}, // a stream that is away for long comes back
		},
		log: b.log.With("group", schedulerGroup),
	}
	s.slots = make(chan struct{}, s.cfg.concurrency)
	return s
}

// forward publishes a message that is due. Each message of a recurring schedule is one of its own, and keeps its id when
// it is forwarded twice.
func (b *Bus) forward(ctx context.Context, m *postrider.Message) error {
	if m.Extension(postrider.ExtSchedule) != "" {
		m = m.Clone()
		m.ID += "." + strconv.FormatUint(m.Delivery.Sequence, 10)
		m.Time = m.Delivery.Stored
	} else if at, err := timeAttribute(m, postrider.ExtDeliverAt); err != nil {
		return err
	} else if _, cancelled, err := b.scheduled(ctx, b.cancelSubject(m.Source, m.ID, at)); err != nil {
		return fromNATS("bus: forward "+m.ID, err)
	} else if cancelled != nil {
		return nil
	}
	e := &entry{msg: b.encode(m, b.subject(m.Topic)), key: m.Key()}
	e.msg.Header[headerMsgID] = []string{messageID(m)}
	return b.pub.publish(ctx, []*entry{e})[0]
}

// Cancel takes back a message that [postrider.At] or [postrider.Delay] put off, by its id; the message is one of this
// bus's Source. It reports whether it was in time: true means that the message will not be delivered, false that it was
// delivered, or is about to be, or was never published, or was cancelled before. A message that still waits in an outbox
// was not published.
func (b *Bus) Cancel(ctx context.Context, id string) (bool, error) {
	op, subject := "bus: cancel "+id, b.delayedSubject(b.cfg.Source, id)
	for {
		stream, waiting, err := b.scheduled(ctx, subject)
		if err != nil || waiting == nil {
			return false, fromNATS(op, err)
		}
		// A purge alone may come between the server's decision to send and the sending, and report a success that it is not.
		// The mark is stored only if the schedule is still there, and so before anything that the schedule sends; the
		// forwarder looks for it. It names the time, since the id may be published again with another.
		at, err := time.Parse(atPrefix+time.RFC3339Nano, waiting.Header.Get(headerSched))
		if err != nil {
			return false, postrider.Errorf(postrider.Internal, "%s: its schedule cannot be read: %w", op, err)
		}
		mark := nats.NewMsg(b.cancelSubject(b.cfg.Source, id, at))
		mark.Header["Nats-Rollup"] = []string{"sub"}
		_, err = b.publishOnly(ctx, mark, jetstream.WithExpectLastSequenceForSubject(waiting.Sequence, subject),
			jetstream.WithMsgTTL(cancelMemory))
		if errors.Is(err, postrider.Aborted) {
			continue // sent, or put off to another time
		}
		if err == nil {
			err = stream.Purge(ctx, jetstream.WithPurgeSubject(subject), jetstream.WithPurgeSequence(waiting.Sequence+1))
		}
		return err == nil, fromNATS(op, err)
	}
}

// cancelMemory is how long a cancellation is remembered. It must outlast the time for which no bus forwards.
const cancelMemory = 24 * time.Hour

func (b *Bus) cancelSubject(source, id string, at time.Time) string {
	return b.subject(schedTopics + ".cancel." + token(source) + "." + token(id) + "." + strconv.FormatInt(at.UnixNano(), 10))
}

// scheduled returns the message that waits under a subject, nil if there is none, and the stream it waits in.
func (b *Bus) scheduled(ctx context.Context, subject string) (jetstream.Stream, *jetstream.RawStreamMsg, error) {
	stream, err := b.js.Stream(ctx, b.ownStreamName())
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, nil, nil
	} else if err != nil {
		return nil, nil, err
	}
	raw, err := stream.GetLastMsgForSubject(ctx, subject)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return stream, nil, nil
	}
	return stream, raw, err
}
