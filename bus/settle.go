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
	if err := s.bus.nc.Publish(msg.Reply, verdict); err != nil {
		s.log.Debug("acknowledgement not sent, the message comes again", "error", err)
	}
}

// handle runs the handler on one message and settles it. It returns false if the message stays here, to be tried again.
func (s *subscription) handle(ctx context.Context, msg *nats.Msg, fence uint64) bool {
	meta, err := msg.Metadata()
	if err != nil {
		s.log.Error("a message without JetStream metadata was dropped: no stream sent it", "subject", msg.Subject, "error", err)
		return true
	}
	if !s.takes(msg.Subject) {
		s.answer(msg, nil)
		return true
	}
	delivery := postrider.Delivery{
		Attempt: int(meta.NumDelivered), Stream: meta.Stream, Sequence: meta.Sequence.Stream,
		Stored: meta.Timestamp, Group: s.cfg.group, Fence: fence,
	}
	if s.lanes != nil {
		delivery.Attempt += s.triedHere(msg)
	}
	if s.own {
		s.bus.restore(msg, &delivery)
	}
	if items, isBatch, err := splitBatch(msg); isBatch && err == nil {
		return s.handleBatch(ctx, msg, items, delivery)
	}
	m, reply, err := s.attempt(ctx, msg, delivery)
	return s.settle(msg, m, reply, err)
}

// attempt runs the handler on one message.
func (s *subscription) attempt(ctx context.Context, msg *nats.Msg, delivery postrider.Delivery) (m, reply *postrider.Message, err error) {
	m, isEvent, err := decode(msg, s.bus.topic(msg.Subject))
	m.Delivery = delivery
	switch {
	case err != nil:
		err = postrider.Permanent(postrider.Errorf(postrider.InvalidArgument, "bus: not a valid CloudEvent: %w", err))
	case !isEvent && !s.handler.IsRaw():
		err = postrider.Permanent(postrider.Errorf(postrider.InvalidArgument,
			"bus: not a CloudEvent: there is no ce-specversion header and no CloudEvents content type"))
	default:
		if err = checkExpiry(m); err == nil {
			reply, err = s.handler.Handle(ctx, m)
		}
	}
	return m, reply, err
}

// settle decides what becomes of a handled message: acknowledged, delivered again later, or in the dead letters with
// its cause. Nothing is dropped silently, and nothing is settled before what follows from it is stored. It returns false
// if the message stays here, to be tried again in its lane.
func (s *subscription) settle(msg *nats.Msg, m, reply *postrider.Message, err error) bool {
	s.broken(err)
	if err != nil {
		if delay, again := backoff.Next(s.cfg.retry, m.Delivery.Attempt, err); again {
			return s.retry(msg, m, delay, err)
		}
	}
	verdict, err := s.conclude(msg, m, reply, err)
	if err != nil {
		return s.retry(msg, m, backoff.Delay(s.cfg.retry, m.Delivery.Attempt), err)
	}
	s.answer(msg, verdict)
	return true
}

// conclude stores what follows from the last attempt: the reply, or the dead letter if it failed. It returns what to tell
// the server, where nothing acknowledges. An error means that the message must come again.
func (s *subscription) conclude(msg *nats.Msg, m, reply *postrider.Message, err error) (verdict []byte, _ error) {
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
		// The refusal of a command is an answer, and its asker gets it. Anything else that failed for good is kept.
		if refused := !postrider.Retryable(err) && reply != nil && reply.Topic != ""; !refused {
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

// retry hands the message back to be delivered after a delay, or keeps it at the head of its lane. It returns whether the
// message is settled.
func (s *subscription) retry(msg *nats.Msg, m *postrider.Message, delay time.Duration, err error) bool {
	s.bus.stats.retried.Add(1)
	s.log.Debug("attempt failed", "id", m.ID, "type", m.Type, "attempt", m.Delivery.Attempt, "delay", delay, "error", err)
	if s.lanes != nil {
		s.retryInPlace(msg, delay)
		return false
	}
	if delay >= longestNak && !s.cfg.broadcast && s.handOver(msg, m, delay) {
		return true
	}
	verdict, _ := json.Marshal(struct { //nolint:errchkjson // a number
		Delay int64 `json:"delay"`
	}{delay.Nanoseconds()})
	s.answer(msg, append([]byte("-NAK "), verdict...))
	return true
}
