package membus

import (
	"cmp"
	"context"
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
	letter := &bus.DeadLetter{
		Group: s.Group, Topic: m.Topic, Key: d.key, Subscription: s.handler.Topic(), Redrives: d.redrives,
		Stream: d.stream, Origin: d.sequence, At: time.Now(),
	}
	setCause(letter, cause, d.attempt)
	k.append(k.streamOf(subject), &stored{subject: subject, event: d.event, raw: d.raw, expiry: d.expiry, key: d.key, letter: letter})
	s.log.Warn("message moved to the dead letters", "id", m.ID, "type", m.Type, "attempts", d.attempt,
		"code", postrider.CodeOf(cause), "cause", cause)
}

// DeadLetters reads the dead letters of a bus and acts on them. Its methods are those of bus.DeadLetters, with the same
// errors. A letter has no Header, and [bus.Action.Rate] slows nothing down.
type DeadLetters struct{ letters }

// DeadLetters returns the dead letters in the stream [bus.Config.DeadLetters].
func (b *Bus) DeadLetters() *DeadLetters {
	return &DeadLetters{letters{b, "dead letters", func() *stream {
		return cmp.Or(b.broker.streamOf(b.subject("dead.x")), &stream{}) // empty if no bus that subscribes has run
	}}}
}

// List returns up to limit dead letters, oldest first, with sequences above after, and where the next page begins: see
// bus.DeadLetters.
func (d *DeadLetters) List(ctx context.Context, f bus.LetterFilter, after uint64, limit int) ([]bus.DeadLetter, uint64, error) {
	d.bus.broker.mu.Lock()
	defer d.bus.broker.mu.Unlock()
	found, err := d.find(ctx, selects(f))
	if err != nil {
		return nil, 0, err
	}
	return page(found, func(l bus.DeadLetter) uint64 { return l.Sequence }, after, limit)
}

// Get returns one dead letter. The error is NotFound when there is none of this sequence (any more).
func (d *DeadLetters) Get(ctx context.Context, sequence uint64) (bus.DeadLetter, error) {
	d.bus.broker.mu.Lock()
	defer d.bus.broker.mu.Unlock()
	return d.get(ctx, sequence)
}

// Groups groups the dead letters by the fingerprints of their causes, the largest group first: see bus.DeadLetters.
func (d *DeadLetters) Groups(ctx context.Context, f bus.LetterFilter) ([]bus.CauseGroup, error) {
	d.bus.broker.mu.Lock()
	defer d.bus.broker.mu.Unlock()
	found, err := d.find(ctx, selects(f))
	if err != nil {
		return nil, err
	}
	byPrint := map[string]*bus.CauseGroup{}
	for _, l := range found { // oldest first
		g := byPrint[l.Fingerprint]
		if g == nil {
			g = &bus.CauseGroup{Fingerprint: l.Fingerprint, Code: l.Code, First: l.At}
			byPrint[l.Fingerprint] = g
		}
		g.Count++
		g.Cause, g.Last = l.Cause, l.At
		g.Groups, g.Topics = append(g.Groups, l.Group), append(g.Topics, l.Topic)
	}
	groups := make([]bus.CauseGroup, 0, len(byPrint))
	for _, g := range byPrint {
		slices.Sort(g.Groups)
		slices.Sort(g.Topics)
		g.Groups, g.Topics = slices.Compact(g.Groups), slices.Compact(g.Topics)
		groups = append(groups, *g)
	}
	slices.SortFunc(groups, func(a, b bus.CauseGroup) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Fingerprint, b.Fingerprint))
	})
	return groups, nil
}

// Log returns up to limit entries, oldest first, about letters that the filter selects: see bus.DeadLetters.
func (d *DeadLetters) Log(ctx context.Context, f bus.LetterFilter, after uint64, limit int) ([]bus.LogEntry, uint64, error) {
	return d.readLog(ctx, selects(f), after, limit)
}

// selects returns whether a filter selects a letter.
func selects(f bus.LetterFilter) func(l *bus.DeadLetter) bool {
	return func(l *bus.DeadLetter) bool {
		return (f.Group == "" || f.Group == l.Group) && (f.Topic == "" || overlap(f.Topic, l.Topic)) &&
			(f.Code == postrider.OK || f.Code == l.Code) && strings.Contains(l.Cause, f.Cause) &&
			(f.Fingerprint == "" || f.Fingerprint == l.Fingerprint) &&
			(f.From.IsZero() || !l.At.Before(f.From)) && (f.To.IsZero() || l.At.Before(f.To))
	}
}

// Replay re-drives dead letters to the group that failed, and to no other: see bus.DeadLetters.
func (d *DeadLetters) Replay(ctx context.Context, sequences []uint64, a bus.Action) (int, error) {
	return d.act(ctx, "replay", these(sequences), a, d.replay)
}

// ReplayAll re-drives the letters that a filter selects now.
func (d *DeadLetters) ReplayAll(ctx context.Context, f bus.LetterFilter, a bus.Action) (int, error) {
	return d.act(ctx, "replay", d.those(ctx, selects(f)), a, d.replay)
}

// Discard removes dead letters for good.
func (d *DeadLetters) Discard(ctx context.Context, sequences []uint64, a bus.Action) (int, error) {
	return d.act(ctx, "discard", these(sequences), a, d.discard)
}

// DiscardAll removes the letters that a filter selects now.
func (d *DeadLetters) DiscardAll(ctx context.Context, f bus.LetterFilter, a bus.Action) (int, error) {
	return d.act(ctx, "discard", d.those(ctx, selects(f)), a, d.discard)
}

// Edit replaces a dead letter by a copy that change has changed, and returns the copy's sequence: see bus.DeadLetters.
func (d *DeadLetters) Edit(ctx context.Context, sequence uint64, change func(m *postrider.Message) error, a bus.Action) (uint64, error) {
	op := fmt.Sprintf("membus: edit dead letter %d", sequence)
	if err := checkAction(a, "edit dead letters"); err != nil {
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
	letter := l
	letter.Message, letter.Data, letter.CopyOf = nil, nil, sequence
	edited := &stored{subject: d.bus.subject("dead." + l.Group + "." + l.Topic), key: m.Key(), expiry: expiry, letter: &letter}
	if edited.raw = m.Data; isEvent {
		edited.raw, edited.event = nil, envelope.AppendProto([]byte{}, m)
	}
	d.bus.broker.append(d.stream(), edited)
	d.note(bus.LogEntry{Letter: l, Done: "edit", By: a.By, Why: a.Why, Copy: edited.sequence})
	return edited.sequence, d.discard(l)
}

// replay hands a letter to its group, in the turn of its key if that is ordered, behind what is parked of it, and removes it.
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
	if g := k.groups[i]; g.firstParked(m.key) != nil {
		g.park(&m)
		k.releaseRest(g, m.key)
	} else {
		k.queue(g, &m)
	}
	return d.discard(l)
}
