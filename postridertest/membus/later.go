package membus

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/internal/envelope"
)

// waiting is a message that comes into its stream later, once or again and again.
type waiting struct {
	key     string // one message waits under a key
	at      time.Time
	message *stored
	id      messageID

	// Of a recurring message only.
	spec, zone string
	next       func(time.Time) time.Time
	count      int
}

// lastTime is where bus.Bus ends.
var lastTime = time.Date(2262, 1, 1, 0, 0, 0, 0, time.UTC) //nolint:gochecknoglobals // constant

// putOff has a message wait for its time, in place of one with the same id that waits for another. The lock is held, as for
// all that follows but the methods of Bus.
func (b *Bus) putOff(s *stored, id messageID, at time.Time) error {
	switch {
	case !s.expiry.IsZero() && !at.Before(s.expiry):
		return postrider.Errorf(postrider.InvalidArgument, "membus: publish %s: it is to be delivered at %v and expires before, at %v",
			id.id, at, s.expiry)
	case !at.Before(lastTime):
		return postrider.Errorf(postrider.InvalidArgument, "membus: publish %s: deliverat is %v: a server knows no time after %d",
			id.id, at, lastTime.Year()-1)
	}
	b.broker.wait(&waiting{key: b.delayed(id), at: at, message: s, id: id})
	return nil
}

func (b *Bus) delayed(id messageID) string {
	return fmt.Sprintf("%s %q %q", b.subject("at"), id.source, id.id)
}

func (b *Bus) recurring(name string) string { return b.subject("cron") + " " + name }

// wait adds a message that waits, in the place of the one under its key.
func (k *Broker) wait(w *waiting) {
	k.remove(w.key)
	k.waiting = append(k.waiting, w)
	k.announce()
}

// remove drops what waits under a key and says if there was something.
func (k *Broker) remove(key string) bool {
	n := len(k.waiting)
	k.waiting = slices.DeleteFunc(k.waiting, func(w *waiting) bool { return w.key == key })
	return len(k.waiting) < n
}

// earliest returns the message that is due first, or nil.
func (k *Broker) earliest() *waiting {
	if len(k.waiting) == 0 {
		return nil
	}
	return slices.MinFunc(k.waiting, func(a, b *waiting) int { return a.at.Compare(b.at) })
}

// untilNext is how long nothing will be due, 0 if nothing waits.
func (k *Broker) untilNext() time.Duration {
	if w := k.earliest(); w != nil {
		return time.Until(w.at)
	}
	return 0
}

// fire stores what is due. There is no goroutine that does it at its time: whoever looks into the broker does it first, and
// each subscription that runs looks then.
func (k *Broker) fire() {
	for w := k.earliest(); w != nil && time.Until(w.at) <= 0; w = k.earliest() {
		if w.next == nil {
			k.remove(w.key)
			k.appendOnce(k.streamOf(w.message.subject), w.message, w.id)
			continue
		}
		w.count++
		m, _ := w.message.message("") // it was encoded here
		m.ID, m.Time = fmt.Sprintf("%s.%d", m.ID, w.count), w.at
		s := *w.message
		s.event = envelope.AppendProto(nil, m)
		k.append(k.streamOf(s.subject), &s)
		w.at = w.next(w.at)
	}
}

// Cancel takes back a message that [postrider.At] or [postrider.Delay] put off, by its id, as bus.Bus does.
func (b *Bus) Cancel(ctx context.Context, id string) (bool, error) {
	k := b.broker
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := b.enter(ctx, "cancel "+id); err != nil {
		return false, err
	}
	return k.remove(b.delayed(messageID{b.cfg.Source, id})), nil
}

// Schedule begins a recurring message, or puts another in its place, as bus.Bus does, and with the same errors. The first
// of "@every 90s" comes after 90 s exactly; a server rounds to a second.
func (b *Bus) Schedule(ctx context.Context, s bus.Schedule) error {
	k := b.broker
	k.mu.Lock()
	defer k.mu.Unlock()
	op := "schedule " + s.Name
	if err := b.enter(ctx, op); err != nil {
		return err
	}
	bad := func(format string, args ...any) error {
		return postrider.Errorf(postrider.InvalidArgument, "membus: "+op+": "+format, args...)
	}
	if s.Name == "" || strings.Trim(s.Name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "" {
		return bad("Name is %q: want letters, digits, - and _", s.Name)
	}
	next, err := parseSpec(s.Spec, s.TimeZone)
	switch {
	case err != nil:
		return bad("Spec is %q, TimeZone %q: %w", s.Spec, s.TimeZone, err)
	case s.Message == nil:
		return bad("Message is required")
	case s.Message.Extension(postrider.ExtDeliverAt) != "" || s.Message.Extension(postrider.ExtExpiryTime) != "":
		return bad("Message must not have a time of its own, deliverat or expirytime")
	}
	m := s.Message.Clone()
	if err := m.SetExtension(postrider.ExtSchedule, s.Name); err != nil {
		return err
	}
	stored, _, err := b.prepare(m)
	if err != nil {
		return err
	}
	w := &waiting{key: b.recurring(s.Name), at: next(time.Now()), message: stored, spec: s.Spec, zone: s.TimeZone, next: next}
	for _, have := range k.waiting {
		if have.key == w.key && have.same(w) {
			return nil // as at each start of a service
		}
	}
	k.wait(w)
	return nil
}

// same compares two recurring messages but for what differs each time that a message is made.
func (w *waiting) same(v *waiting) bool {
	lasting := func(s *stored) []byte {
		m, _ := s.message("")
		m.ID, m.Time = "", time.Time{}
		return envelope.AppendProto(nil, m)
	}
	return w.spec == v.spec && w.zone == v.zone && w.message.subject == v.message.subject &&
		bytes.Equal(lasting(w.message), lasting(v.message))
}

// Unschedule ends a recurring message and reports whether there was one.
func (b *Bus) Unschedule(ctx context.Context, name string) (bool, error) {
	k := b.broker
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := b.enter(ctx, "unschedule "+name); err != nil {
		return false, err
	}
	return k.remove(b.recurring(name)), nil
}
