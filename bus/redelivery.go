package bus

import (
	"context"
	"fmt"
	"maps"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// What is meant for one group only, a retry that was put off or a dead letter that is tried again, cannot go to the
// stream it came from, where every group would see it. It goes to group.<group>.<topic> in the bus's own stream, from
// which each subscription reads with a second consumer:
//
//	orders.placed.v1 ---------------------> consumer --> handler --(failed, long delay)--+
//	sched.group... --(when it is due)--+                    ^                            |
//	      ^                            v                    |                            |
//	      |              group.mailer.orders.placed.v1 --> consumer                      |
//	      +------------------------------------------------------------------------------+
//
// The stream is a work queue: what was handled is gone, and what nobody has handled stays.
const (
	ownStream    = "SCHEDULES"
	groupTopics  = "group"
	schedTopics  = "sched"
	longestNak   = 5 * time.Second // a delayed nak occupies MaxAckPending: what waits longer leaves the consumer
	atPrefix     = "@at "
	headerSched  = "Nats-Schedule"
	headerTarget = "Nats-Schedule-Target"
)

// ownStreamName returns the name of the bus's own stream: systems that share a server under different prefixes have
// one each.
func (b *Bus) ownStreamName() string { return b.prefixed(ownStream) }

func (b *Bus) prefixed(stream string) string {
	if b.cfg.Prefix == "" {
		return stream
	}
	return stream + "_" + strings.ReplaceAll(b.cfg.Prefix, ".", "_")
}

// declareOwn makes the bus's own stream exist, once.
func (b *Bus) declareOwn(ctx context.Context) error {
	if b.ownDeclared.Load() {
		return nil
	}
	b.declaring.Lock()
	defer b.declaring.Unlock()
	if b.ownDeclared.Load() {
		return nil
	}
	if err := b.checkServer(ctx); err != nil {
		return err
	}
	s := Stream{Name: b.ownStreamName(), Topics: []string{groupTopics + ".>", schedTopics + ".>"}}
	for _, other := range b.cfg.Streams {
		s.Replicas = max(s.Replicas, other.Replicas) // as safe as the safest
	}
	want := b.streamConfig(s)
	want.Retention = jetstream.WorkQueuePolicy
	want.Discard = jetstream.DiscardOld // schedules need it; without limits nothing is discarded
	// What the server sends keeps the headers of its schedule, those of an atomic batch too: it would pass for a part of one.
	want.AllowAtomicPublish = false
	want.AllowDirect = false // a replica that lags behind may not know of a cancellation
	want.AllowMsgSchedules, want.AllowMsgTTL, want.AllowRollup = true, true, true
	err := b.declareConfig(ctx, want, func(want *jetstream.StreamConfig, have jetstream.StreamConfig) {
		want.Replicas = max(want.Replicas, have.Replicas)
	})
	if err != nil {
		return err
	}
	b.ownDeclared.Store(true)
	return nil
}

// groupSubject is where a group finds what is meant for it alone. The topic is that of its subscription.
func (b *Bus) groupSubject(group, topic string) string {
	return b.subject(groupTopics + "." + group + "." + withoutWildcards(topic))
}

// redelivery returns the subscription that reads what is meant for the group of s alone, one instance of the group that is,
// also if s is a broadcast. Together the two handle no more messages at once than s alone may.
func (s *subscription) redelivery() *subscription {
	r := &subscription{
		bus: s.bus, cfg: s.cfg, handler: s.handler, durable: durableName(s.cfg.group, s.handler.Topic()), log: s.log,
		subject: s.bus.groupSubject(s.cfg.group, s.handler.Topic()), own: true,
		slots: s.slots, breaker: s.breaker, pacer: s.pacer, main: s,
	}
	r.cfg.from, r.cfg.broadcast = DeliverAll, false
	return r
}

// sendToGroup stores a message for one group, from a time on (the zero time: at once), and returns when the server has
// it. The topic is that of the group's subscription. All headers go along but the server's own; three are for the caller
// to set: Nats-Msg-Id, unique for this sending; Postrider-Topic, where the message was published; Postrider-Attempts, the
// attempts already made, left out if they start anew.
func (b *Bus) sendToGroup(ctx context.Context, group, topic string, msg *nats.Msg, at time.Time) error {
	if err := b.declareOwn(ctx); err != nil {
		return err
	}
	subject, id := b.groupSubject(group, topic), msg.Header.Get(headerMsgID)
	header := ownHeaders(msg.Header, 4)
	header[headerMsgID] = []string{id}
	e := &entry{msg: &nats.Msg{Subject: subject, Header: header, Data: msg.Data}}
	if !at.IsZero() {
		e.schedule(b.subject(schedTopics+"."+groupTopics+"."+group+"."+token(id)), atSpec(at))
	}
	return b.pub.publish(ctx, []*entry{e})[0]
}

// schedule has the server send the entry's message when spec says, within the bus's own stream. Until then it waits under a
// subject of its own: the server keeps one schedule for each.
func (e *entry) schedule(subject, spec string) {
	e.via = e.msg.Subject
	e.msg.Subject = subject
	e.msg.Header[headerSched] = []string{spec}
	e.msg.Header[headerTarget] = []string{e.via}
}

// atSpec is the specification of one time. The client library's own cuts it down to seconds, and so fires early.
func atSpec(t time.Time) string { return atPrefix + t.UTC().Format(time.RFC3339Nano) }

// ownHeaders copies the headers of a message without those of the server: ids, expectations, schedules.
func ownHeaders(h nats.Header, more int) nats.Header {
	own := make(nats.Header, len(h)+more)
	maps.Copy(own, h)
	maps.DeleteFunc(own, func(k string, _ []string) bool { return strings.HasPrefix(k, "Nats-") })
	return own
}

// token makes one token of a subject from any text.
func token(s string) string {
	var b strings.Builder
	for i := range len(s) {
		switch c := s[i]; {
		case c <= ' ', c >= 0x7f, strings.IndexByte(`.*>%`, c) >= 0:
			fmt.Fprintf(&b, "%%%02X", c)
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

// handOver gives a failed message to the scheduler and acknowledges it, so that its wait does not hold up others: the
// server counts a message that waits for its redelivery as one being handled. It reports false when that failed.
func (s *subscription) handOver(msg *nats.Msg, m *postrider.Message, delay time.Duration) bool {
	ctx, cancel := context.WithTimeout(context.Background(), s.bus.cfg.PublishTimeout)
	defer cancel()
	d, header := m.Delivery, ownHeaders(msg.Header, 5)
	for _, h := range [...][2]string{
		{headerMsgID, fmt.Sprintf("%s.%s.%d.%d%s", s.durable, d.Stream, d.Sequence, d.Attempt, life(msg.Header))},
		{headerTopic, s.bus.topic(msg.Subject)},
		{headerAttempts, strconv.Itoa(d.Attempt)},
		{headerStream, d.Stream},
		{headerSequence, strconv.FormatUint(d.Sequence, 10)},
	} {
		header[h[0]] = []string{h[1]}
	}
	out := &nats.Msg{Header: header, Data: msg.Data}
	if err := s.bus.sendToGroup(ctx, s.cfg.group, s.handler.Topic(), out, time.Now().Add(delay)); err != nil {
		s.log.Warn("retry not handed to the scheduler, it waits in its consumer", "id", m.ID, "delay", delay, "error", err)
		return false
	}
	s.answer(msg, nil)
	return true
}

// restore gives a message from the bus's own stream the subject, the place and the attempts that it had before.
func (b *Bus) restore(msg *nats.Msg, d *postrider.Delivery) {
	h := msg.Header
	if topic := h.Get(headerTopic); isAddress(topic) { // else not even a dead letter of it could be published
		msg.Subject = b.subject(topic)
	}
	attempts, _ := strconv.Atoi(h.Get(headerAttempts))
	d.Attempt += min(max(attempts, 0), math.MaxInt32)
	if seq, err := strconv.ParseUint(h.Get(headerSequence), 10, 64); err == nil {
		d.Stream, d.Sequence = h.Get(headerStream), seq
	}
}
