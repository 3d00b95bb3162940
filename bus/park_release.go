package bus

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/backoff"
)

// release is how far the releaser is with a command. The subscription's lock guards it.
//
//	ask the owner --parked--> handle the first, again and again --none left--> ask the owner --free--> done
//	                                                                                        --parked: more came--> handle ...
type release struct {
	question string // the subject of the answer that it waits for
	held     bool   // the owner puts what comes behind the rest, or there is no owner
	fenced   bool   // our fencing token is larger than the owner's
	done     bool   // the owner handles what comes
}

// sendRelease has the group's releaser empty a parked key. The id makes a repeat of the same command a duplicate.
func (b *Bus) sendRelease(ctx context.Context, group, topic, key, what, id string) error {
	return b.sendToGroup(ctx, group, topic, &nats.Msg{Header: nats.Header{
		headerParkedKey: {strconv.QuoteToASCII(key)}, headerRelease: {what}, headerMsgID: {id},
	}}, time.Time{})
}

// releaseStep makes one step of a command and returns whether the command is settled. Each step handles one message at most,
// so that other keys have their turns.
func (s *subscription) releaseStep(ctx context.Context, cmd *delivered, fence uint64) (settled bool) {
	if s.lanes == nil {
		return s.releaseUnordered(cmd)
	}
	s.mu.Lock()
	if cmd.release == nil {
		cmd.release = &release{}
	}
	now := *cmd.release
	s.mu.Unlock()
	quick, cancel := context.WithTimeout(context.WithoutCancel(ctx), ackTimeout)
	defer cancel()
	subject := s.parkedSubject(keyToken(cmd.lane.key))
	var err error
	switch {
	case now.done:
		if err = s.parkedStream.Purge(quick, jetstream.WithPurgeSubject(causeSubject(subject))); err == nil {
			s.log.Info("key released", "key", cmd.lane.key)
			s.answer(cmd.Msg, nil)
			return true
		}
	case !now.held:
		err = s.ask(quick, cmd)
	case !now.fenced:
		var token uint64
		if token, err = s.takeFence(quick, s.fenceSubject()+fenceAgain); err == nil {
			s.goOn(cmd, func(r *release) { r.fenced = token > 0 }) // with the new token
			return false
		}
	default:
		var first *jetstream.RawStreamMsg
		if first, err = s.parkedStream.GetMsg(quick, 1, jetstream.WithGetMsgSubject(subject)); err == nil {
			return s.releaseFirst(ctx, cmd, first, fence)
		}
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			s.goOn(cmd, func(r *release) { r.held, r.fenced = false, false })
			return false
		}
	}
	if err != nil {
		s.interrupted(cmd, err)
	}
	return false
}

// goOn has the next step of a command follow.
func (s *subscription) goOn(cmd *delivered, change func(r *release)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(cmd.release)
	s.later(cmd, 0)
}

func (s *subscription) interrupted(cmd *delivered, err error) {
	s.log.Warn("release interrupted, it goes on in a second", "key", cmd.lane.key, "error", err)
	s.again(cmd)
}

// ask finds out whether the key is parked from the one who must act on it, the owner of the consumer, and has the command
// go on when there is an answer. Without an owner the stream tells it: one that comes later reads it there too.
func (s *subscription) ask(ctx context.Context, cmd *delivered) error {
	key, durable := cmd.lane.key, s.main.durable
	if s.main.shares > 0 {
		durable = shareName(durable, partitionOf(key, s.main.shares))
	}
	consumer, err := s.bus.js.Consumer(ctx, s.main.stream, durable)
	if err != nil {
		return err
	}
	if pinOf(consumer.CachedInfo()) == "" {
		_, err := s.parkedStream.GetLastMsgForSubject(ctx, s.parkedSubject(keyToken(key)))
		if err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
			return err
		}
		s.goOn(cmd, func(r *release) { r.held, r.done = err == nil, err != nil })
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	cmd.release.question = s.answers + postrider.NewID()
	s.later(cmd, time.Second) // the owner may be one that has died
	return s.bus.nc.PublishRequest(s.askSubject(), cmd.release.question, []byte(strconv.QuoteToASCII(key)))
}

func (s *subscription) askSubject() string {
	return s.bus.subject(parkAsk + s.cfg.group + "." + withoutWildcards(s.handler.Topic()))
}

// answered takes the owner's answer.
func (s *subscription) answered(msg *nats.Msg) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, cmd := range s.held {
		// An answer that is late finds the command on its way to ask again: it must not be with two workers.
		if r := cmd.release; r != nil && r.question == msg.Subject && cmd.timer != nil {
			r.held, r.done = string(msg.Data) == answerParked, string(msg.Data) == answerFree
			s.later(cmd, 0)
			return
		}
	}
}

// releaseFirst handles the first message of a parked key.
func (s *subscription) releaseFirst(ctx context.Context, cmd *delivered, first *jetstream.RawStreamMsg, fence uint64) (settled bool) {
	quick, cancel := context.WithTimeout(context.WithoutCancel(ctx), ackTimeout)
	defer cancel()
	if cmd.Header.Get(headerRelease) == releaseRest {
		stays, err := s.parkedAgain(quick, first)
		switch {
		case err != nil:
			s.interrupted(cmd, err)
			return false
		case stays:
			s.answer(cmd.Msg, nil)
			return true
		}
	}
	err := s.bus.payload(quick, first)
	if err != nil && postrider.Retryable(err) {
		s.interrupted(cmd, err)
		return false
	}
	l := parseDeadLetter(first.Sequence, first.Header, first.Data)
	d := newDelivered(&nats.Msg{Subject: s.bus.subject(l.Topic), Header: l.original(), Data: first.Data})
	delivery := postrider.Delivery{
		Attempt: 1 + cmd.attempts, Stream: l.Stream, Sequence: l.Origin, Stored: first.Time, Group: s.cfg.group, Fence: fence,
	}
	d.read()
	d.message.Topic, d.message.Delivery = l.Topic, delivery
	var reply *postrider.Message
	if err == nil { // else its payload is lost
		reply, err = s.attempt(ctx, d, delivery)
	}
	s.broken(err)
	if err != nil {
		if delay, again := backoff.Next(s.cfg.retry, delivery.Attempt, err); again {
			return s.retry(cmd, d.message, delay, err)
		}
	}
	if err != nil && s.stops(d.message, err) {
		if noteErr := s.noteCause(first, delivery.Attempt, err); noteErr != nil {
			return s.retry(cmd, d.message, backoff.Delay(s.cfg.retry, delivery.Attempt), errors.Join(err, noteErr))
		}
		s.log.Warn("key parked again", "key", cmd.lane.key, "id", d.message.ID, "type", d.message.Type,
			"code", postrider.CodeOf(err), "cause", err.Error())
		s.answer(cmd.Msg, nil)
		return true
	}
	if _, err = s.conclude(d.Msg, d.message, reply, err); err == nil {
		err = s.unpark(first)
	}
	if err != nil {
		return s.retry(cmd, d.message, backoff.Delay(s.cfg.retry, delivery.Attempt), err)
	}
	cmd.attempts = 0 // those of the next message
	s.goOn(cmd, func(*release) {})
	return false
}

// unpark removes a message that was handled.
func (s *subscription) unpark(first *jetstream.RawStreamMsg) error {
	ctx, cancel := context.WithTimeout(context.Background(), ackTimeout)
	defer cancel()
	err := s.parkedStream.DeleteMsg(ctx, first.Sequence)
	if err == nil {
		return nil
	}
	if _, gone := s.parkedStream.GetMsg(ctx, first.Sequence); errors.Is(gone, jetstream.ErrMsgNotFound) {
		return nil // an operator discarded it
	}
	return fromNATS("bus: remove a message that was parked", err)
}

// parkedAgain says if the first message of a key is what the key was parked for.
func (s *subscription) parkedAgain(ctx context.Context, first *jetstream.RawStreamMsg) (bool, error) {
	if first.Header.Get(headerCode) != "" {
		return true, nil
	}
	note, err := s.parkedStream.GetLastMsgForSubject(ctx, causeSubject(first.Subject))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	return note.Header.Get(headerLetter) == strconv.FormatUint(first.Sequence, 10), nil
}

// noteCause writes down why a message was parked that was in the stream already.
func (s *subscription) noteCause(first *jetstream.RawStreamMsg, attempts int, cause error) error {
	note := &nats.Msg{Subject: causeSubject(first.Subject), Header: nats.Header{
		headerLetter: {strconv.FormatUint(first.Sequence, 10)}, headerTime: {formatTime(time.Now())},
		"Nats-Rollup": {"sub"}, // the last one is enough
	}}
	setCause(note.Header, cause, attempts)
	ctx, cancel := context.WithTimeout(context.Background(), ackTimeout)
	defer cancel()
	_, err := s.bus.publishOnly(ctx, note)
	return err
}

// releaseUnordered serves a group that is no longer ordered: its parked messages become redeliveries like others.
func (s *subscription) releaseUnordered(cmd *delivered) (settled bool) {
	ctx, cancel := context.WithTimeout(context.Background(), s.bus.cfg.PublishTimeout)
	defer cancel()
	subject := s.parkedSubject(keyToken(cmd.key()))
	stream, err := s.bus.js.Stream(ctx, s.bus.prefixed(parkedStreamName))
	for {
		var first *jetstream.RawStreamMsg
		if err == nil {
			first, err = stream.GetMsg(ctx, 1, jetstream.WithGetMsgSubject(subject))
		}
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			s.answer(cmd.Msg, nil)
			return true
		}
		if err == nil {
			err = s.bus.payload(ctx, first)
		}
		if err == nil {
			l := parseDeadLetter(first.Sequence, first.Header, first.Data)
			msg := &nats.Msg{Header: l.original(), Data: first.Data}
			msg.Header[headerMsgID] = []string{fmt.Sprintf("unpark.%s.%d.%d", s.bus.prefixed(parkedStreamName), l.Sequence, l.At.UnixNano())}
			if err = s.bus.sendToGroup(ctx, s.cfg.group, s.handler.Topic(), msg, time.Time{}); err == nil {
				err = stream.DeleteMsg(ctx, first.Sequence)
			}
		}
		if err != nil {
			s.log.Warn("release interrupted, it goes on in a second", "key", cmd.key(), "error", err)
			s.answer(cmd.Msg, []byte(`-NAK {"delay":1000000000}`))
			return true
		}
	}
}
