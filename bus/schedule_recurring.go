package bus

import (
	"context"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// Schedule is a message that the server publishes again and again, whether this process runs or not.
type Schedule struct {
	// Name tells the schedules of a system apart: letters, digits, "-" and "_". Required.
	Name string

	// Spec says when: "@every 90s" (at least 1 s), or six fields as in cron with the second first, "0 30 8 * * mon-fri",
	// or one of "@hourly", "@daily", "@weekly", "@monthly", "@yearly". Required.
	Spec string

	// TimeZone is the IANA name of the zone that the six fields mean, "Europe/Warsaw". Default UTC.
	TimeZone string

	// Message is what is published, as [postrider.Topic.Message] or [postrider.Method.Request] make it. Each time it gets an
	// id and a time of its own, and the extension attribute schedule. Required.
	Message *postrider.Message
}

// Schedule begins a recurring message, or puts another in its place. One that is there already and does not differ is left
// as it is, so that a service may call Schedule whenever it starts. When the server was away for several of its times
// it is published once. It makes one attempt. Errors: those of [Bus.Publish], InvalidArgument for a spec or a time zone that does not exist.
func (b *Bus) Schedule(ctx context.Context, s Schedule) error {
	op := "bus: schedule " + s.Name
	bad := func(field, format string, args ...any) error {
		return postrider.Errorf(postrider.InvalidArgument, "%s: %s %s", op, field, fmt.Sprintf(format, args...))
	}
	switch {
	case !isToken(s.Name):
		return bad("Name", "is %q: want letters, digits, - and _", s.Name)
	case s.Spec == "" || strings.HasPrefix(s.Spec, "@at") || strings.ContainsAny(s.Spec, "\r\n"):
		return bad("Spec", "is %q: want six fields, or @every and a duration", s.Spec)
	case strings.ContainsAny(s.TimeZone, "\r\n"):
		return bad("TimeZone", "is %q", s.TimeZone)
	case s.Message == nil:
		return bad("Message", "is required")
	case s.Message.Extension(postrider.ExtDeliverAt) != "" || s.Message.Extension(postrider.ExtExpiryTime) != "":
		return bad("Message", "must not have a time of its own, deliverat or expirytime")
	}
	m := s.Message.Clone()
	if err := m.SetExtension(postrider.ExtSchedule, s.Name); err != nil {
		return err
	}
	e, err := b.prepare(m)
	if err != nil {
		return err
	}
	b.toScheduler(e, m)
	e.schedule(b.recurringSubject(s.Name), s.Spec)
	delete(e.msg.Header, headerMsgID) // what replaces it may follow at once
	if s.TimeZone != "" {
		e.msg.Header[headerTimeZone] = []string{s.TimeZone}
	}
	_, have, err := b.scheduled(ctx, e.msg.Subject)
	if err != nil {
		return fromNATS(op, err)
	}
	if have != nil && sameSchedule(have, e.msg) {
		return nil
	}
	if err := b.publishOnce(ctx, []*entry{e})[0]; err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	return nil
}

// sameSchedule compares but for what differs each time that a message is made.
func sameSchedule(have *jetstream.RawStreamMsg, want *nats.Msg) bool {
	for _, k := range [...]string{headerSched, headerTarget, headerTimeZone} {
		if have.Header.Get(k) != want.Header.Get(k) {
			return false
		}
	}
	lasting := func(h nats.Header, data []byte) *postrider.Message {
		m, _, _ := decode(&nats.Msg{Header: h, Data: data}, "") // what cannot be read differs, and is replaced
		m.ID, m.Time = "", time.Time{}
		return m
	}
	return reflect.DeepEqual(lasting(have.Header, have.Data), lasting(want.Header, want.Data))
}

// Unschedule ends a recurring message and reports whether there was one. One that is due at this moment may still come.
func (b *Bus) Unschedule(ctx context.Context, name string) (bool, error) {
	op, subject := "bus: unschedule "+name, b.recurringSubject(token(name))
	stream, have, err := b.scheduled(ctx, subject)
	if err == nil && have != nil {
		err = stream.Purge(ctx, jetstream.WithPurgeSubject(subject))
	}
	if err != nil || have == nil {
		return false, fromNATS(op, err)
	}
	return true, nil
}

func (b *Bus) recurringSubject(name string) string {
	return b.subject(schedTopics + ".cron." + name)
}
