package bus

import (
	"context"

	"github.com/nats-io/nats.go"
)

// fenceTopics begins the subjects in the bus's own stream whose sequences are the fencing tokens of ordered subscriptions.
const fenceTopics = "fence"

// claim makes the consumer ours to work with, after a message has told that we have its pin.
//
// The token of an ownership is the sequence of a message that the new owner stores. One that stalls before it stores it
// could get a token above that of its own successor. So the owner asks for the pin afterwards: if it is still ours, every
// successor gets its pin, and stores its message, later than that, and has a larger token.
// (The tokens are those of Gray and Cheriton, "Leases", 1989, as used by Burrows, "The Chubby lock service", 2006.)
func (s *subscription) claim(ctx context.Context, pin string) error {
	ctx, cancel := context.WithTimeout(ctx, ackTimeout)
	defer cancel()
	op := "bus: take over " + s.durable
	mark := &nats.Msg{
		Subject: s.bus.subject(fenceTopics + "." + s.durable), Data: []byte(pin),
		Header: nats.Header{"Nats-Rollup": {"sub"}}, // the last one is enough
	}
	fence, err := s.bus.publishOnly(ctx, mark)
	if err != nil {
		return fromNATS(op, err)
	}
	info, err := s.bus.js.Consumer(ctx, s.stream, s.durable)
	if err != nil {
		return fromNATS(op, err)
	}
	groups := info.CachedInfo().PriorityGroups
	if len(groups) != 1 || groups[0].PinnedClientID != pin {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.pin == pin {
			s.disown()
		}
		return nil
	}
	s.reset() // the server forgets what was asked for before: it is asked again, on another inbox
	if _, err := s.bus.js.ResetConsumer(ctx, s.stream, s.durable); err != nil {
		return fromNATS(op, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pin == pin {
		s.fence = fence
		s.log.Info("took over the ordered subscription", "durable", s.durable, "fence", fence)
	}
	return nil
}
