package membus

import (
	"container/heap"
	"slices"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/internal/fingerprint"
)

// Parking, as bus.Bus does it. A key of an ordered group is parked while there are parked messages of it:
//
//	           +--handled                                                  +--handled, or a dead letter: the next
//	lane of the key --Park--> parked, first of its key --release--> handler --Park--> stays, with all behind
//	           +--key is parked--> parked, behind the others
//
// It happens under the broker's lock, which is held in all that follows but park: so nothing of a key is handed out from its lane
// while there is something parked.

// parkedOf returns the stream of parked messages of the buses with a prefix.
func (k *Broker) parkedOf(prefix string) *stream {
	if k.parked == nil {
		k.parked = map[string]*stream{}
	}
	if k.parked[prefix] == nil {
		k.parked[prefix] = &stream{name: "PARKED"}
	}
	return k.parked[prefix]
}

// firstParked returns the first parked message of a key, or nil.
func (g *group) firstParked(key string) *stored {
	if g.parked == nil || key == "" {
		return nil
	}
	for _, m := range g.parked.messages {
		if m.key == key && m.letter.Group == g.name && m.letter.Subscription == g.topic {
			return m
		}
	}
	return nil
}

// parks says if an error parks the key of a message, rather than send it to the dead letters.
func (s *subscription) parks(d *delivery, m *postrider.Message, err error) bool {
	return s.group.lanes != nil && d.key != "" && (postrider.Parks(err) || s.ParkFailures && !s.refuses(m, err))
}

// park parks the key of a message for a cause, or notes why it stays parked.
func (s *subscription) park(d *delivery, m *postrider.Message, cause error) {
	k := s.bus.broker
	k.mu.Lock()
	defer k.mu.Unlock()
	if !s.held[d] {
		return // another process has the message, or will
	}
	delete(s.held, d)
	k.running--
	if d.parked == 0 {
		s.setAside(d, cause)
		k.done(s.group, d)
	} else {
		delete(s.group.released, d.key)
		for _, p := range s.group.parked.messages {
			if p.sequence == d.parked {
				setCause(p.letter, cause, d.attempt)
			}
		}
	}
	k.announce()
	s.log.Warn("key parked: its messages wait until they are released with Bus.Parked", "key", d.key, "id", m.ID, "type", m.Type,
		"attempts", d.attempt, "code", postrider.CodeOf(cause), "cause", cause)
}

func setCause(l *bus.DeadLetter, cause error, attempts int) {
	l.Code, l.Cause, l.Attempts = postrider.CodeOf(cause), cause.Error(), attempts
	l.Fingerprint = fingerprint.Of(l.Code, l.Cause)
}

// setAside puts a message behind those of its key that are parked; with a cause it is the first.
func (s *subscription) setAside(d *delivery, cause error) {
	m := s.group.park(d.stored)
	if cause != nil {
		setCause(m.letter, cause, d.attempt)
	}
	s.bus.stats.Parked++
}

// park stores a message as the last of its key.
func (g *group) park(m *stored) *stored {
	parked := *m
	parked.letter = &bus.DeadLetter{
		Group: g.name, Topic: m.subject[len(g.subject)-len(g.topic):], Key: m.key, Subscription: g.topic, Redrives: m.redrives,
		Stream: m.stream, Origin: m.sequence, At: time.Now(),
	}
	g.parked.add(&parked)
	return &parked
}

// aside deals with a delivery that is not for the handler: its key is parked, or it was, and an operator has discarded it.
func (k *Broker) aside(s *subscription, d *delivery) bool {
	g := s.group
	switch {
	case d.parked > 0:
		there := slices.ContainsFunc(g.parked.messages, func(m *stored) bool { return m.sequence == d.parked })
		if !there {
			k.releaseNext(g, d.key)
		}
		return !there
	case g.firstParked(d.key) != nil:
		s.setAside(d, nil)
		k.done(g, d)
		return true
	default:
		return false
	}
}

// release has the messages of a parked key handled, one after the other.
func (k *Broker) release(g *group, key string) {
	if !g.released[key] {
		g.released[key] = true
		k.releaseNext(g, key)
	}
}

// releaseRest does so if what the key was parked for is not there any more.
func (k *Broker) releaseRest(g *group, key string) {
	if first := g.firstParked(key); first != nil && first.letter.Code == postrider.OK {
		k.release(g, key)
	}
}

// releaseNext queues the first message of a key that is being released. When there is none left the key is as any other.
func (k *Broker) releaseNext(g *group, key string) {
	first := g.firstParked(key)
	switch {
	case !g.released[key]:
	case first == nil:
		delete(g.released, key)
	default:
		m := *first
		m.stream, m.sequence, m.letter = first.letter.Stream, first.letter.Origin, nil
		k.order++
		heap.Push(&g.queue, &delivery{stored: &m, parked: first.sequence, due: time.Now(), order: k.order})
		k.announce()
	}
}
