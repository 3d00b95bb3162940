package membus

import (
	"context"
	"slices"
	"strings"

	"github.com/postrider/postrider/bus"
)

// Parked reads and releases the parked keys of ordered subscriptions. Its methods are those of bus.Parked, with the same errors.
type Parked struct{ letters }

// Parked returns the parked keys of all groups. It works whether or not the bus runs.
func (b *Bus) Parked() *Parked {
	return &Parked{letters{b, "parked messages", func() *stream { return b.broker.parkedOf(b.cfg.Prefix) }}}
}

func parkedBy(f bus.ParkedFilter) func(*bus.DeadLetter) bool {
	return func(l *bus.DeadLetter) bool {
		return (f.Group == "" || f.Group == l.Group) && (f.Topic == "" || f.Topic == l.Subscription) && (f.Key == "" || f.Key == l.Key)
	}
}

// keys returns the parked keys that a filter selects, in their order. The broker's lock is held.
func (p *Parked) keys(ctx context.Context, f bus.ParkedFilter) ([]bus.ParkedKey, error) {
	found, err := p.find(ctx, parkedBy(f))
	var keys []bus.ParkedKey
	for _, l := range found {
		i := slices.IndexFunc(keys, func(k bus.ParkedKey) bool { return k.Group == l.Group && k.Topic == l.Subscription && k.Key == l.Key })
		if i < 0 {
			i = len(keys)
			keys = append(keys, bus.ParkedKey{
				Group: l.Group, Topic: l.Subscription, Key: l.Key, Code: l.Code, Cause: l.Cause, Attempts: l.Attempts, Since: l.At,
			})
		}
		keys[i].Messages++
	}
	slices.SortFunc(keys, func(a, b bus.ParkedKey) int { return strings.Compare(placeOf(a), placeOf(b)) })
	return keys, err
}

// placeOf tells where a key stands among the others.
func placeOf(k bus.ParkedKey) string { return k.Group + " " + k.Topic + " " + k.Key }

// Keys returns up to limit parked keys, by group, topic and key, and where the next page begins: see bus.Parked.
func (p *Parked) Keys(ctx context.Context, f bus.ParkedFilter, after string, limit int) (keys []bus.ParkedKey, next string, err error) {
	if limit, err = checkLimit(limit); err != nil {
		return nil, "", err
	}
	p.bus.broker.mu.Lock()
	defer p.bus.broker.mu.Unlock()
	all, err := p.keys(ctx, f)
	for _, k := range all {
		switch {
		case placeOf(k) <= after:
		case len(keys) == limit:
			return keys, placeOf(keys[limit-1]), nil
		default:
			keys = append(keys, k)
		}
	}
	return keys, "", err
}

// Messages returns up to limit messages of the keys that a filter selects, oldest first: see bus.Parked.
func (p *Parked) Messages(ctx context.Context, f bus.ParkedFilter, after uint64, limit int) ([]bus.DeadLetter, uint64, error) {
	p.bus.broker.mu.Lock()
	defer p.bus.broker.mu.Unlock()
	found, err := p.find(ctx, parkedBy(f))
	if err != nil {
		return nil, 0, err
	}
	return page(found, func(l bus.DeadLetter) uint64 { return l.Sequence }, after, limit)
}

// Release has the messages of the keys that a filter selects handled, those of each key one after the other in their order, and
// then what came meanwhile: see bus.Parked.
func (p *Parked) Release(ctx context.Context, f bus.ParkedFilter, a bus.Action) (int, error) {
	if err := checkAction(a, "release parked keys"); err != nil {
		return 0, err
	}
	k := p.bus.broker
	k.mu.Lock()
	defer k.mu.Unlock()
	keys, err := p.keys(ctx, f)
	for _, key := range keys {
		g := k.groupOf(key.Group, p.bus.subject(key.Topic))
		first := g.firstParked(key.Key)
		letter := *first.letter
		letter.Sequence = first.sequence
		p.note(bus.LogEntry{Letter: letter, Done: "release", By: a.By, Why: a.Why})
		k.release(g, key.Key)
	}
	return len(keys), err
}

// Discard removes parked messages for good, by their sequences. Once the message that a key was parked for is gone, the rest of
// the key is released.
func (p *Parked) Discard(ctx context.Context, sequences []uint64, a bus.Action) (int, error) {
	return p.act(ctx, "discard", these(sequences), a, p.discard)
}

// DiscardAll removes all messages of the keys that a filter selects now.
func (p *Parked) DiscardAll(ctx context.Context, f bus.ParkedFilter, a bus.Action) (int, error) {
	backwards := func() ([]uint64, error) { // so that nothing is released because what was before it is gone
		sequences, err := p.those(ctx, parkedBy(f))()
		slices.Reverse(sequences)
		return sequences, err
	}
	return p.act(ctx, "discard", backwards, a, p.discard)
}

func (p *Parked) discard(l bus.DeadLetter) error {
	k := p.bus.broker
	p.stream().remove(l.Sequence)
	k.releaseRest(k.groupOf(l.Group, p.bus.subject(l.Subscription)), l.Key)
	return nil
}

// Log returns up to limit entries, oldest first, about what was released and discarded of the keys that a filter selects.
func (p *Parked) Log(ctx context.Context, f bus.ParkedFilter, after uint64, limit int) ([]bus.LogEntry, uint64, error) {
	return p.readLog(ctx, parkedBy(f), after, limit)
}
