package membus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/internal/envelope"
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
// errors. There are no Groups, a letter has neither Header nor Fingerprint, and [bus.Action.Rate] slows nothing down.
type DeadLetters struct{ bus *Bus }

// DeadLetters returns the dead letters in the stream [bus.Config.DeadLetters].
func (b *Bus) DeadLetters() *DeadLetters { return &DeadLetters{b} }

// List returns up to limit dead letters, oldest first, with sequences above after, and where the next page begins: see
// bus.DeadLetters.
func (d *DeadLetters) List(ctx context.Context, f bus.LetterFilter, after uint64, limit int) ([]bus.DeadLetter, uint64, error) {
	d.bus.broker.mu.Lock()
	defer d.bus.broker.mu.Unlock()
	found, err := d.find(ctx, f)
	if err != nil {
		return nil, 0, err
	}
	return page(found, func(l bus.DeadLetter) uint64 { return l.Sequence }, after, limit)
}

// page returns up to limit items with sequences above after, and where the next page begins.
func page[T any](all []T, sequence func(T) uint64, after uint64, limit int) (items []T, next uint64, _ error) {
	if limit = cmp.Or(limit, 100); limit < 0 || limit > 1000 {
		return nil, 0, postrider.Errorf(postrider.InvalidArgument, "membus: read dead letters: limit is %d: want 1 to 1000", limit)
	}
	for _, item := range all {
		switch {
		case sequence(item) <= after:
		case len(items) == limit:
			return items, sequence(items[limit-1]), nil
		default:
			items = append(items, item)
		}
	}
	return items, 0, nil
}

// Log returns up to limit entries, oldest first, about letters that the filter selects: see bus.DeadLetters.
func (d *DeadLetters) Log(ctx context.Context, f bus.LetterFilter, after uint64, limit int) ([]bus.LogEntry, uint64, error) {
	d.bus.broker.mu.Lock()
	defer d.bus.broker.mu.Unlock()
	if err := d.bus.enter(ctx, "read the log of dead letters"); err != nil {
		return nil, 0, err
	}
	var found []bus.LogEntry
	for _, e := range d.stream().log {
		if selects(f, &e.Letter) {
			found = append(found, e)
		}
	}
	return page(found, func(e bus.LogEntry) uint64 { return e.Sequence }, after, limit)
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

// Edit replaces a dead letter by a copy that change has changed, and returns the copy's sequence: see bus.DeadLetters.
func (d *DeadLetters) Edit(ctx context.Context, sequence uint64, change func(m *postrider.Message) error, a bus.Action) (uint64, error) {
	op := fmt.Sprintf("membus: edit dead letter %d", sequence)
	if err := checkAction(a, "edit"); err != nil {
		return 0, err
	}
	original, err := d.Get(ctx, sequence)
	if err != nil {
		return 0, err
	}
	m := original.Message.Clone()
	m.Data = slices.Clone(m.Data)
	if err := change(m); err != nil { // without the lock: it may use the bus
		return 0, fmt.Errorf("%s: %w", op, err)
	}
	if m.Topic != original.Topic {
		return 0, postrider.Errorf(postrider.InvalidArgument, "%s: the topic was changed from %q to %q", op, original.Topic, m.Topic)
	}
	isEvent := m.ID != "" || m.Source != "" || m.Type != "" // else it is still for a handler of raw messages
	if isEvent {
		if err := m.Validate(); err != nil {
			return 0, fmt.Errorf("%s: %w", op, err)
		}
	}
	expiry, err := timeAttribute(m, postrider.ExtExpiryTime)
	if err != nil {
		return 0, err
	}
	d.bus.broker.mu.Lock()
	defer d.bus.broker.mu.Unlock()
	l, err := d.get(ctx, sequence)
	if err != nil {
		return 0, err
	}
	s, letter := d.stream(), l
	letter.Message, letter.Data, letter.CopyOf = nil, nil, sequence
	edited := &stored{subject: d.bus.subject("dead." + l.Group + "." + l.Topic), key: m.Key(), expiry: expiry, letter: &letter}
	if edited.raw = m.Data; isEvent {
		edited.raw, edited.event = nil, envelope.AppendProto([]byte{}, m)
	}
	d.bus.broker.append(s, edited)
	d.note(bus.LogEntry{Letter: l, Done: "edit", By: a.By, Why: a.Why, Copy: edited.sequence})
	return edited.sequence, d.discard(l)
}

// note adds an entry to the log.
func (d *DeadLetters) note(e bus.LogEntry) {
	s := d.stream()
	s.last++
	e.Sequence, e.At = s.last, time.Now()
	s.log = append(s.log, e)
}

func checkAction(a bus.Action, name string) error {
	if a.By == "" || a.Why == "" {
		return postrider.Errorf(postrider.InvalidArgument, "membus: %s dead letters: Action.By and Action.Why are required", name)
	}
	return nil
}

// act does something to the letters of some sequences, or, with a filter, to those that it selects.
func (d *DeadLetters) act(ctx context.Context, name string, sequences []uint64, f *bus.LetterFilter, a bus.Action, do func(bus.DeadLetter) error) (int, error) {
	if err := checkAction(a, name); err != nil {
		return 0, err
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
			l.Data, l.Message.Data = nil, nil
			d.note(bus.LogEntry{Letter: l, Done: name, By: a.By, Why: a.Why})
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
