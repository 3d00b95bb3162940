package bus

import (
	"context"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// fenceTopics begins the subjects in the bus's own stream whose sequences are the fencing tokens of ordered subscriptions.
const fenceTopics = "fence"

// takeFence draws the token of an ownership, a new one if it has one already. It returns false if the ownership has ended.
//
// The token of an ownership is the sequence of a message that the new owner stores. One that stalls before it stores it
// could get a token above that of its own successor. So the owner asks for the pin afterwards: if it is still ours, every
// successor gets its pin, and stores its message, later than that, and has a larger token.
// (The tokens are those of Gray and Cheriton, "Leases", 1989, as used by Burrows, "The Chubby lock service", 2006.)
func (s *subscription) takeFence(ctx context.Context) (ours bool, _ error) {
	s.mu.Lock()
	pin := s.pin
	s.mu.Unlock()
	mark := &nats.Msg{
		Subject: s.bus.subject(fenceTopics + "." + s.durable), Data: []byte(pin),
		Header: nats.Header{"Nats-Rollup": {"sub"}}, // the last one is enough
	}
	fence, err := s.bus.publishOnly(ctx, mark)
	if err != nil {
		return false, fromNATS("bus: fence "+s.durable, err)
	}
	info, err := s.bus.js.Consumer(ctx, s.stream, s.durable)
	if err != nil {
		return false, fromNATS("bus: fence "+s.durable, err)
	}
	now := pinOf(info.CachedInfo())
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.pin != pin || pin == "":
		return false, nil
	case now != pin:
		s.disown()
		return false, nil
	}
	s.fence = max(s.fence, fence) // two may have been drawn at once
	return true, nil
}

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
	ours, err := s.takeFence(ctx)
	if err != nil || !ours {
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
	if ours = s.pin == pin; ours {
		s.parked = keys
	}
	fence, n := s.fence, len(keys)
	s.mu.Unlock()
	if !ours {
		return nil
	}
	s.forgetPulls() // the server forgets what was asked for before: it is asked again, on another inbox
	info, err := s.bus.js.ResetConsumer(ctx, s.stream, s.durable)
	if err != nil {
		return fromNATS(op, err)
	}
	if pinOf(info.ConsumerInfo) != pin { // who told us before that it is ours was no longer the consumer's leader
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.pin == pin {
			s.disown()
		}
		return nil
	}
	s.log.Info("took over the ordered subscription", "durable", s.durable, "fence", fence, "parked keys", n)
	return nil
}
