package membus

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
)

// letters are what operators see of a stream of dead letters, or of parked messages. The broker's lock is held in their methods but
// for readLog and act.
type letters struct {
	bus    *Bus
	what   string // for errors
	stream func() *stream
}

// page returns up to limit items with sequences above after, and where the next page begins.
func page[T any](all []T, sequence func(T) uint64, after uint64, limit int) (items []T, next uint64, _ error) {
	limit, err := checkLimit(limit)
	if err != nil {
		return nil, 0, err
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

func checkLimit(limit int) (int, error) {
	if limit = cmp.Or(limit, 100); limit < 0 || limit > 1000 {
		return 0, postrider.Errorf(postrider.InvalidArgument, "membus: read dead letters: limit is %d: want 1 to 1000", limit)
	}
	return limit, nil
}

// get returns one of them.
func (d *letters) get(ctx context.Context, sequence uint64) (bus.DeadLetter, error) {
	all, err := d.find(ctx, func(*bus.DeadLetter) bool { return true })
	if err != nil {
		return bus.DeadLetter{}, err
	}
	for _, l := range all {
		if l.Sequence == sequence {
			return l, nil
		}
	}
	return bus.DeadLetter{}, postrider.Errorf(postrider.NotFound,
		"membus: get one of the %s: %d: there is none: it may have been replayed, released or discarded", d.what, sequence)
}

// find returns the letters that are selected, oldest first.
func (d *letters) find(ctx context.Context, selected func(*bus.DeadLetter) bool) ([]bus.DeadLetter, error) {
	if err := d.bus.enter(ctx, "read "+d.what); err != nil {
		return nil, err
	}
	var found []bus.DeadLetter
	for _, m := range d.stream().messages {
		l := *m.letter
		if selected(&l) {
			l.Sequence = m.sequence
			l.Message, _ = m.message(l.Topic) // as far as it can be read
			l.Data = l.Message.Data
			found = append(found, l)
		}
	}
	return found, nil
}

// readLog returns a page of the log, of entries whose letter is selected.
func (d *letters) readLog(ctx context.Context, selected func(*bus.DeadLetter) bool, after uint64, limit int) ([]bus.LogEntry, uint64, error) {
	d.bus.broker.mu.Lock()
	defer d.bus.broker.mu.Unlock()
	if err := d.bus.enter(ctx, "read the log of "+d.what); err != nil {
		return nil, 0, err
	}
	var found []bus.LogEntry
	for _, e := range d.stream().log {
		if selected(&e.Letter) {
			found = append(found, e)
		}
	}
	return page(found, func(e bus.LogEntry) uint64 { return e.Sequence }, after, limit)
}

// note adds an entry to the log.
func (d *letters) note(e bus.LogEntry) {
	s := d.stream()
	s.last++
	e.Sequence, e.At = s.last, time.Now()
	s.log = append(s.log, e)
}

func checkAction(a bus.Action, op string) error {
	if a.By == "" || a.Why == "" {
		return postrider.Errorf(postrider.InvalidArgument, "membus: %s: Action.By and Action.Why are required", op)
	}
	return nil
}

// these picks letters by their sequences, for act.
func these(sequences []uint64) func() ([]uint64, error) {
	return func() ([]uint64, error) { return sequences, nil }
}

// those picks the letters that are selected now, for act.
func (d *letters) those(ctx context.Context, selected func(*bus.DeadLetter) bool) func() ([]uint64, error) {
	return func() ([]uint64, error) {
		found, err := d.find(ctx, selected)
		sequences := make([]uint64, len(found))
		for i, l := range found {
			sequences[i] = l.Sequence
		}
		return sequences, err
	}
}

// act does something to letters.
func (d *letters) act(ctx context.Context, name string, pick func() ([]uint64, error), a bus.Action, do func(bus.DeadLetter) error) (int, error) {
	if err := checkAction(a, name+" "+d.what); err != nil {
		return 0, err
	}
	d.bus.broker.mu.Lock()
	defer d.bus.broker.mu.Unlock()
	sequences, err := pick()
	if err != nil {
		return 0, err
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

// discard removes a letter.
func (d *letters) discard(l bus.DeadLetter) error {
	d.stream().remove(l.Sequence)
	return nil
}
