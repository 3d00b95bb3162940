package bus

import (
	"context"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// fenceTopics begins the subjects whose sequences are the fencing tokens of ordered subscriptions. They are in the stream of
// parked messages, so that the server itself can refuse what an owner parks that has a successor: see [subscription.parkLast].
const (
	fenceTopics = "fence"
	fenceAgain  = ".again" // of the tokens that an owner draws when it is one already
)

// takeFence draws the token of an ownership, a new one if it has one already, and returns it. It is 0 if the ownership has
// ended.
//
// The token of an ownership is the sequence of a message that the new owner stores. One that stalls before it stores it
// could get a token above that of its own successor. So the owner asks for the pin afterwards: if it is still ours, every
// successor gets its pin, and stores its message, later than that, and has a larger token.
// (The tokens are those of Gray and Cheriton, "Leases", 1989, as used by Burrows, "The Chubby lock service", 2006.)
func (s *subscription) takeFence(ctx context.Context, subject string) (uint64, error) {
	s.mu.Lock()
	pin := s.pin
	s.mu.Unlock()
	mark := &nats.Msg{Subject: subject, Data: []byte(pin), Header: nats.Header{"Nats-Rollup": {"sub"}}} // the last one is enough
	fence, err := s.bus.publishOnly(ctx, mark)
	if err != nil {
		return 0, fromNATS("bus: fence "+s.durable, err)
	}
	if ours, err := s.hasPin(ctx, pin); err != nil || !ours {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pin != pin {
		return 0, nil
	}
	s.fence = max(s.fence, fence) // two may have been drawn at once
	return fence, nil
}

// hasPin asks if a pin of ours is the consumer's still. Else the ownership has ended.
func (s *subscription) hasPin(ctx context.Context, pin string) (bool, error) {
	info, err := s.bus.js.Consumer(ctx, s.stream, s.durable)
	if err != nil {
		return false, fromNATS("bus: owner of "+s.durable, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.pin != pin || pin == "":
		return false, nil
	case pinOf(info.CachedInfo()) != pin:
		s.disown()
		return false, nil
	}
	return true, nil
}

// fenceSubject is where the token is stored that an owner begins with.
func (s *subscription) fenceSubject() string { return s.bus.subject(fenceTopics + "." + s.durable) }

// pinOf returns the pin of a consumer, which has one group at most.
func pinOf(info *jetstream.ConsumerInfo) string {
	for _, g := range info.PriorityGroups {
		return g.PinnedClientID
	}
	return ""
}

// claim makes the consumer ours to work with, after a message has told that we have its pin.
func (s *subscription) claim(ctx context.Context, pin string) error {
	ctx, cancel := context.WithTimeout(ctx, ackTimeout)
	defer cancel()
	op := "bus: take over " + s.durable
	subject := s.fenceSubject()
	if s.own { // of the same name as the consumer whose owner parks on condition that the last token there is its own
		subject += fenceAgain
	}
	term, err := s.takeFence(ctx, subject)
	if err != nil || term == 0 {
		return err
	}
	s.mu.Lock()
	keys := s.parked // not nil: we were the owner, and have kept it up to date
	s.mu.Unlock()
	if !s.own && keys == nil {
		if keys, err = s.loadParked(ctx); err != nil {
			return fromNATS(op, err)
		}
	}
	s.mu.Lock()
	ours := s.pin == pin
	if ours {
		s.parked, s.term = keys, term
	}
	fence, n := s.fence, len(keys)
	s.mu.Unlock()
	if !ours {
		return nil
	}
	s.forgetPulls() // it is asked again, on another inbox, so that what comes there was asked for after the reset
	info, err := s.bus.js.ResetConsumer(ctx, s.stream, s.durable)
	if err != nil {
		return fromNATS(op, err)
	}
	s.mu.Lock()
	ours = s.pin == pin
	switch {
	case ours && pinOf(info.ConsumerInfo) != pin: // who told us before that it is ours was no longer the consumer's leader
		s.disown()
		ours = false
	case ours:
		s.wasReset = true
	}
	s.mu.Unlock()
	if !ours {
		return nil
	}
	s.log.Info("took over the ordered subscription", "durable", s.durable, "fence", fence, "parked keys", n)
	return nil
}
