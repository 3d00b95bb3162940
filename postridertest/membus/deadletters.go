package membus

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
)

// deadLetter stores a message in the dead letters.
func (s *subscription) deadLetter(d *delivery, m *postrider.Message, cause error) {
	k := s.bus.broker
	k.mu.Lock()
	defer k.mu.Unlock()
	if s.bus.dead {
		return
	}
	s.bus.stats.DeadLettered++
	subject := s.bus.subject("dead." + s.Group + "." + m.Topic)
	k.append(k.streamOf(subject), &stored{
		subject: subject, event: d.event, raw: d.raw, expiry: d.expiry, key: d.key,
		letter: &bus.DeadLetter{
			Group: s.Group, Topic: m.Topic, Subscription: s.handler.Topic(), Code: postrider.CodeOf(cause), Cause: cause.Error(),
			Attempts: d.attempt, Redrives: d.redrives, Stream: d.stream, Origin: d.sequence, At: time.Now(),
		},
	})
	s.log.Warn("message moved to the dead letters", "id", m.ID, "type", m.Type, "attempts", d.attempt,
		"code", postrider.CodeOf(cause), "cause", cause)
}

// DeadLetters reads the dead letters of a bus and acts on them. Its methods are those of bus.DeadLetters, with the same
// errors. It keeps no log, a letter has neither Header nor Fingerprint, and [bus.Action.Rate] slows nothing down.
type DeadLetters struct{ bus *Bus }

// DeadLetters returns the dead letters in the stream [bus.Config.DeadLetters].
func (b *Bus) DeadLetters() *DeadLetters { return &DeadLetters{b} }

// List returns up to limit dead letters, oldest first, with sequences above after, and where the next page begins: see
// bus.DeadLetters.
func (d *DeadLetters) List(ctx context.Context, f bus.LetterFilter, after uint64, limit int) ([]bus.DeadLetter, uint64, error) {
	if limit = cmp.Or(limit, 100); limit < 0 || limit > 1000 {
		return nil, 0, postrider.Errorf(postrider.InvalidArgument, "membus: read dead letters: limit is %d: want 1 to 1000", limit)
	}
	d.bus.broker.mu.Lock()
	defer d.bus.broker.mu.Unlock()
	found, err := d.find(ctx, f)
	if err != nil {
		return nil, 0, err
	}
	var letters []bus.DeadLetter
	for _, l := range found {
		switch {
		case l.Sequence <= after:
		case len(letters) == limit:
			return letters, letters[limit-1].Sequence, nil
		default:
			letters = append(letters, l)
		}
	}
	return letters, 0, nil
}

// Get returns one dead letter. The error is NotFound when there is none of this sequence (any more).
func (d *DeadLetters) Get(ctx context.Context, sequence uint64) (bus.DeadLetter, error) {
	d.bus.broker.mu.Lock()
	defer d.bus.broker.mu.Unlock()
	return d.get(ctx, sequence)
}

func (d *DeadLetters) get(ctx context.Context, sequence uint64) (bus.DeadLetter, error) {
	all, err := d.find(ctx, bus.LetterFilter{})
	if err != nil {
		return bus.DeadLetter{}, err
	}
	for _, l := range all {
		if l.Sequence == sequence {
			return l, nil
		}
	}
	return bus.DeadLetter{}, postrider.Errorf(postrider.NotFound,
		"membus: get dead letter %d: there is none: it may have been replayed or discarded", sequence)
}

// find returns the letters that a filter selects. The lock is held.
func (d *DeadLetters) find(ctx context.Context, f bus.LetterFilter) ([]bus.DeadLetter, error) {
	if err := d.bus.enter(ctx, "read dead letters"); err != nil {
		return nil, err
	}
	var letters []bus.DeadLetter
	for _, m := range d.stream().messages {
		l := *m.letter
		if selects(f, &l) {
			l.Sequence = m.sequence
			l.Message, _ = m.message(l.Topic) // as far as it can be read
			l.Data = l.Message.Data
			letters = append(letters, l)
		}
	}
	return letters, nil
}

// stream returns the stream of dead letters, an empty one if no bus that subscribes has run. The lock is held.
func (d *DeadLetters) stream() *stream {
	return cmp.Or(d.bus.broker.streamOf(d.bus.subject("dead.x")), &stream{})
}

func selects(f bus.LetterFilter, l *bus.DeadLetter) bool {
	return (f.Group == "" || f.Group == l.Group) && (f.Topic == "" || overlap(f.Topic, l.Topic)) &&
		(f.Code == postrider.OK || f.Code == l.Code) && strings.Contains(l.Cause, f.Cause) && f.Fingerprint == l.Fingerprint &&
		(f.From.IsZero() || !l.At.Before(f.From)) && (f.To.IsZero() || l.At.Before(f.To))
}

// Replay re-drives dead letters to the group that failed, and to no other: see bus.DeadLetters.
func (d *DeadLetters) Replay(ctx context.Context, sequences []uint64, a bus.Action) (int, error) {
	return d.act(ctx, "replay", sequences, nil, a, d.replay)
}

// ReplayAll re-drives the letters that a filter selects now.
func (d *DeadLetters) ReplayAll(ctx context.Context, f bus.LetterFilter, a bus.Action) (int, error) {
	return d.act(ctx, "replay", nil, &f, a, d.replay)
}

// Discard removes dead letters for good.
func (d *DeadLetters) Discard(ctx context.Context, sequences []uint64, a bus.Action) (int, error) {
	return d.act(ctx, "discard", sequences, nil, a, d.discard)
}

// DiscardAll removes the letters that a filter selects now.
func (d *DeadLetters) DiscardAll(ctx context.Context, f bus.LetterFilter, a bus.Action) (int, error) {
	return d.act(ctx, "discard", nil, &f, a, d.discard)
}

// act does something to the letters of some sequences, or, with a filter, to those that it selects.
func (d *DeadLetters) act(ctx context.Context, name string, sequences []uint64, f *bus.LetterFilter, a bus.Action, do func(bus.DeadLetter) error) (int, error) {
	if a.By == "" || a.Why == "" {
		return 0, postrider.Errorf(postrider.InvalidArgument, "membus: %s dead letters: Action.By and Action.Why are required", name)
	}
	d.bus.broker.mu.Lock()
	defer d.bus.broker.mu.Unlock()
	if f != nil {
		letters, err := d.find(ctx, *f)
		if err != nil {
			return 0, err
		}
		for _, l := range letters {
			sequences = append(sequences, l.Sequence)
		}
	}
	done := 0
	var failed []error
	for _, sequence := range sequences {
		l, err := d.get(ctx, sequence)
		if err == nil {
			err = do(l)
		}
		if err == nil {
			done++
		} else {
			failed = append(failed, err)
		}
	}
	return done, errors.Join(failed...)
}

// replay hands a letter to its group, in the turn of its key if that is ordered, and removes it.
func (d *DeadLetters) replay(l bus.DeadLetter) error {
	k := d.bus.broker
	i := slices.IndexFunc(k.groups, func(g *group) bool { return g.name == l.Group && g.subject == d.bus.subject(l.Subscription) })
	if i < 0 {
		return postrider.Errorf(postrider.FailedPrecondition,
			"membus: replay dead letters: group %s does not subscribe to %q: have it subscribe and run first", l.Group, l.Subscription)
	}
	messages := d.stream().messages
	m := *messages[slices.IndexFunc(messages, func(m *stored) bool { return m.sequence == l.Sequence })]
	m.subject, m.stream, m.sequence, m.at = d.bus.subject(l.Topic), l.Stream, l.Origin, time.Now()
	m.redrives, m.letter = l.Redrives+1, nil
	k.queue(k.groups[i], &m)
	return d.discard(l)
}

func (d *DeadLetters) discard(l bus.DeadLetter) error {
	s := d.stream()
	s.messages = slices.DeleteFunc(s.messages, func(m *stored) bool { return m.sequence == l.Sequence })
	return nil
}
