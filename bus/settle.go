package bus

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/backoff"
)

// answer settles a message with the server. What is lost on the way only brings the message again.
func (s *subscription) answer(msg *nats.Msg, verdict []byte) {
	if msg.Reply == "" {
		return // a releaser's question, which it asks again
	}
	if err := s.bus.nc.Publish(msg.Reply, verdict); err != nil {
		s.log.Debug("acknowledgement not sent, the message comes again", "error", err)
	}
}

// handle runs the handler on one message and settles it. It returns false if the message stays here, to be tried again.
func (s *subscription) handle(ctx context.Context, d *delivered, fence uint64) bool {
	delivery, ready, settled := s.prepare(ctx, d, fence)
	if !ready {
		s.noProbe()
		return settled
	}
	reply, err := s.attempt(ctx, d, delivery)
	return s.settle(d, reply, err)
}

// prepare says where a message comes from, if it is ready for the handler. Any other it deals with itself, and says if that one
// is settled.
func (s *subscription) prepare(ctx context.Context, d *delivered, fence uint64) (delivery postrider.Delivery, ready, settled bool) {
	switch {
	case d.question != "":
		s.check(d)
		return delivery, false, true
	case s.own && d.Header.Get(headerRelease) != "":
		return delivery, false, s.releaseStep(ctx, d, fence)
	}
	at, err := placeOf(d.Reply)
	if err != nil {
		s.log.Error("a message was dropped that no stream sent", "subject", d.Subject, "error", err)
		return delivery, false, true
	}
	if !s.takes(d.Subject) {
		s.answer(d.Msg, nil)
		return delivery, false, true
	}
	delivery = postrider.Delivery{
		Attempt: at.attempt + d.attempts, Stream: at.stream, Sequence: at.sequence,
		Stored: at.stored, Group: s.cfg.group, Fence: fence,
	}
	if s.own {
		s.bus.restore(d.Msg, &delivery)
	}
	if d.behind != nil {
		return delivery, false, s.parkBehind(d, delivery)
	}
	if items, err := splitBatch(d.Msg, d.format); items != nil && err == nil {
		return delivery, false, s.handleBatch(ctx, d, items, delivery)
	}
	return delivery, true, false
}

// attempt reads a message and runs the handler on it.
func (s *subscription) attempt(ctx context.Context, d *delivered, delivery postrider.Delivery) (reply *postrider.Message, err error) {
	if err := s.open(d, delivery); err != nil {
		return nil, err
	}
	return s.handler.Handle(ctx, d.message)
}

// open reads a message. The error is that of one which cannot be handled.
func (s *subscription) open(d *delivered, delivery postrider.Delivery) error {
	d.read()
	m := d.message
	m.Topic, m.Delivery = s.bus.topic(d.Subject), delivery
	switch {
	case d.err != nil:
		return postrider.Permanent(postrider.Errorf(postrider.InvalidArgument, "bus: not a valid CloudEvent: %w", d.err))
	case !d.isEvent && !s.handler.IsRaw():
		return postrider.Permanent(postrider.Errorf(postrider.InvalidArgument,
			"bus: not a CloudEvent: there is no ce-specversion header and no CloudEvents content type"))
	}
	if err := s.cfg.wants(m); err != nil {
		return err
	}
	return checkExpiry(m)
}

// settle decides what becomes of a handled message: acknowledged, delivered again later, parked, or in the dead letters with
// its cause. Nothing is dropped silently, and nothing is settled before what follows from it is stored. It returns false
// if the message stays here, to be tried again in its lane.
func (s *subscription) settle(d *delivered, reply *postrider.Message, err error) bool {
	m := d.message
	s.broken(err)
	if err != nil {
		if delay, again := backoff.Next(s.cfg.retry, m.Delivery.Attempt, err); again {
			return s.retry(d, m, delay, err)
		}
	}
	var verdict []byte
	if s.parks(d, err) {
		err = s.park(d, err)
	} else {
		verdict, err = s.conclude(d.Msg, m, reply, err)
	}
	if err != nil {
		return s.retry(d, m, backoff.Delay(s.cfg.retry, m.Delivery.Attempt), err)
	}
	s.answer(d.Msg, verdict)
	return true
}

// conclude stores what follows from the last attempt: the reply, or the dead letter if it failed. It returns what to tell
// the server, where nothing acknowledges. An error means that the message must come again.
func (s *subscription) conclude(msg *nats.Msg, m, reply *postrider.Message, err error) (verdict []byte, _ error) {
	if errors.Is(err, errUnwanted) {
		s.bus.stats.filtered.Add(1)
		return nil, nil
	}
	if err == nil && (reply == nil || reply.Topic == "") {
		s.bus.stats.handled.Add(1)
		return nil, nil
	}
	// Not the handler's context: what was done must be told even if the handler was cancelled.
	ctx, cancel := context.WithTimeout(context.Background(), s.bus.cfg.PublishTimeout)
	defer cancel()
	if err != nil {
		if s.handler.IsCall() {
			reply = postrider.ErrorReply(m, err)
		}
		if !s.refuses(m, err) {
			if dlErr := s.deadLetter(ctx, msg, m, err); dlErr != nil {
				return nil, errors.Join(err, dlErr)
			}
			verdict = []byte("+TERM dead letter: " + postrider.CodeOf(err).String())
		}
	}
	if reply != nil && reply.Topic != "" {
		if pubErr := s.bus.Publish(ctx, reply); pubErr != nil {
			// The handler runs again: it is idempotent or has been told that delivery is at least once.
			s.log.Warn("reply not published, the command is delivered again", "id", m.ID, "replyto", reply.Topic, "error", pubErr)
			return nil, pubErr
		}
	}
	if verdict == nil {
		s.bus.stats.handled.Add(1)
	}
	return verdict, nil
}

// refuses says if an error is the refusal of a command: an answer, and its asker gets it. Anything else that failed for good
// is kept.
func (s *subscription) refuses(m *postrider.Message, err error) bool {
	if !s.handler.IsCall() || postrider.Retryable(err) {
		return false
	}
	reply := postrider.ErrorReply(m, err)
	return reply != nil && reply.Topic != ""
}

// retry hands the message back to be delivered after a delay, or keeps it at the head of its lane. It returns whether the
// message is settled.
func (s *subscription) retry(d *delivered, m *postrider.Message, delay time.Duration, err error) bool {
	s.bus.stats.retried.Add(1)
	s.log.Debug("attempt failed", "id", m.ID, "type", m.Type, "attempt", m.Delivery.Attempt, "delay", delay, "error", err)
	if s.lanes != nil {
		s.retryInPlace(d, delay)
		return false
	}
	if delay >= longestNak && !s.cfg.broadcast && s.handOver(d.Msg, m, delay) {
		return true
	}
	verdict, _ := json.Marshal(struct { //nolint:errchkjson // a number
		Delay int64 `json:"delay"`
	}{delay.Nanoseconds()})
	s.answer(d.Msg, append([]byte("-NAK "), verdict...))
	return true
}
