package membus

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/internal/envelope"
)

// Bus is what one process of a service has: a [postrider.Publisher] and a [postrider.Runner] as bus.Bus is, with the same
// methods. Safe for concurrent use.
type Bus struct {
	broker  *Broker
	cfg     bus.Config
	log     *slog.Logger
	started chan struct{}

	// The broker's lock guards these.
	subs     []*subscription
	declared bool
	ran      bool
	dead     bool
	stats    bus.Stats
	asyncs   map[*Async]bool // that Run waits for
}

var (
	_ postrider.Publisher = (*Bus)(nil)
	_ postrider.Runner    = (*Bus)(nil)
)

// New makes a bus on the broker, as bus.New does on a connection. Several buses of one broker are the services of a
// system, or the instances of a service. The error is InvalidArgument and names the field.
func (k *Broker) New(cfg bus.Config) (*Bus, error) {
	cfg, err := cfg.Checked()
	if err != nil {
		return nil, err
	}
	return &Bus{broker: k, cfg: cfg, log: cfg.Logger.With("component", "membus"), started: make(chan struct{}), asyncs: map[*Async]bool{}}, nil
}

// Publish stores messages and returns when the streams have them. What was stored before, by source and id, within the
// stream's duplicate window is not stored again. Errors: InvalidArgument (attributes, no such address),
// FailedPrecondition (no stream takes the address), Unavailable after [Bus.Crash]. With several messages the error is a
// *[postrider.BatchError].
func (b *Bus) Publish(ctx context.Context, msgs ...*postrider.Message) error {
	k := b.broker
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := b.enter(ctx, "publish"); err != nil {
		return err
	}
	errs := make([]error, len(msgs))
	for i, m := range msgs {
		if errs[i] = b.store(m); errs[i] == nil {
			b.stats.Published++
		}
	}
	return published(errs)
}

// published makes one error of those of several messages.
func published(errs []error) error {
	switch {
	case errors.Join(errs...) == nil:
		return nil
	case len(errs) == 1:
		return errs[0]
	default:
		return &postrider.BatchError{Errs: errs}
	}
}

// enter begins what a process asks of the broker. The lock is held, as for all that follows but the exported methods.
func (b *Bus) enter(ctx context.Context, op string) error {
	if err := ctx.Err(); err != nil {
		return &postrider.Error{Code: postrider.CodeOf(err), Op: "membus: " + op, Unprocessed: true, Err: err}
	}
	if b.dead {
		return &postrider.Error{Code: postrider.Unavailable, Op: "membus: " + op, Msg: "the process has crashed", Unprocessed: true}
	}
	b.broker.fire()
	return b.declare()
}

// declare makes the streams exist, once.
func (b *Bus) declare() error {
	if b.declared {
		return nil
	}
	for _, s := range b.cfg.Streams {
		subjects := make([]string, len(s.Topics))
		for i, t := range s.Topics {
			subjects[i] = b.subject(t)
		}
		if s.DuplicateWindow == 0 {
			s.DuplicateWindow = 2 * time.Minute
		}
		if err := b.broker.declare(s.Name, subjects, s.DuplicateWindow); err != nil {
			return err
		}
	}
	b.declared = true
	return nil
}

// store publishes one message.
func (b *Bus) store(m *postrider.Message) error {
	stored, s, err := b.prepare(m)
	if err != nil {
		return err
	}
	at, err := timeAttribute(m, postrider.ExtDeliverAt)
	if err != nil {
		return err
	}
	id := messageID{m.Source, m.ID}
	switch {
	case at.After(time.Now()):
		return b.putOff(stored, id, at)
	case b.cfg.AllowDuplicates:
		b.broker.append(s, stored)
	default:
		b.broker.appendOnce(s, stored, id)
	}
	return nil
}

// check fills in what a message lacks, and refuses it for what it is.
func (b *Bus) check(m *postrider.Message) error {
	if m != nil && m.Source == "" {
		m.Source = b.cfg.Source
	}
	if err := m.Validate(); err != nil {
		return err
	}
	_, err1 := timeAttribute(m, postrider.ExtDeliverAt)
	_, err2 := timeAttribute(m, postrider.ExtExpiryTime)
	return cmp.Or(err1, err2, m.CheckAddress())
}

// prepare checks a message, encodes it and finds its stream.
func (b *Bus) prepare(m *postrider.Message) (*stored, *stream, error) {
	if err := b.check(m); err != nil {
		return nil, nil, err
	}
	subject := b.subject(m.Address())
	s := b.broker.streamOf(subject)
	if s == nil {
		return nil, nil, noStream("publish "+m.ID, subject)
	}
	expiry, err := timeAttribute(m, postrider.ExtExpiryTime)
	if err != nil {
		return nil, nil, err
	}
	stored := &stored{subject: subject, key: m.Key(), expiry: expiry, event: envelope.AppendProto([]byte{}, m)}
	return stored, s, stored.expired("publish", m)
}

func timeAttribute(m *postrider.Message, name string) (time.Time, error) {
	text := m.Extension(name)
	if text == "" {
		return time.Time{}, nil
	}
	t, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return t, postrider.Errorf(postrider.InvalidArgument, "membus: message %s: attribute %s is no time: %w", m.ID, name, err)
	}
	return t, nil
}

// expired returns an error for a message that has lost its meaning.
func (s *stored) expired(what string, m *postrider.Message) error {
	if s.expiry.IsZero() || time.Now().Before(s.expiry) {
		return nil
	}
	return postrider.Permanent(&postrider.Error{
		Code: postrider.DeadlineExceeded, Op: "membus: " + what + " " + m.ID, Unprocessed: true,
		Msg: "the message expired at " + s.expiry.UTC().Format(time.RFC3339Nano),
	})
}

// Subscribe has h handle the messages of its topic, from [Bus.Run] on. The options are those of package bus, and so are
// the errors; an option that needs a server is Unimplemented.
func (b *Bus) Subscribe(h postrider.Handler, opts ...bus.SubscribeOption) error {
	settings, err := bus.ReadSettings(h, b.cfg.Group, opts...)
	if err != nil {
		return err
	}
	b.broker.mu.Lock()
	defer b.broker.mu.Unlock()
	if b.ran {
		return postrider.Errorf(postrider.FailedPrecondition, "membus: subscribe %s: Run was called already: subscribe before it", h.Name())
	}
	for _, s := range b.subs {
		if s.Group == settings.Group && s.handler.Topic() == h.Topic() {
			return postrider.Errorf(postrider.AlreadyExists,
				"membus: subscribe %s: group %s has a handler for this topic already", h.Name(), settings.Group)
		}
	}
	b.subs = append(b.subs, &subscription{
		bus: b, Settings: settings, handler: h.With(b.cfg.Middleware...), held: map[*delivery]bool{},
		log: b.log.With("group", settings.Group, "topic", h.Topic()),
	})
	return nil
}

// Started returns a channel that is closed once [Bus.Run] has the groups in place: what is published from then on is not
// missed by a new group.
func (b *Bus) Started() <-chan struct{} { return b.started }

// Run hands messages to the handlers and blocks. When ctx ends it takes no new messages, waits for running handlers, and
// returns nil. It fails when no stream takes a topic, when handlers outlive DrainTimeout, and when an Async could not publish.
func (b *Bus) Run(ctx context.Context) error {
	if err := b.start(); err != nil {
		return err
	}
	errs := make([]error, len(b.subs))
	var wg sync.WaitGroup
	for i, s := range b.subs {
		wg.Go(func() { errs[i] = s.run(ctx) })
	}
	wg.Wait()
	<-ctx.Done()
	return errors.Join(errors.Join(errs...), b.flush())
}

func (b *Bus) start() error {
	k := b.broker
	k.mu.Lock()
	defer k.mu.Unlock()
	if b.ran {
		return postrider.Errorf(postrider.FailedPrecondition, "membus: Run was called twice")
	}
	b.ran = true
	if err := b.enter(context.Background(), "start"); err != nil {
		return err
	}
	if len(b.subs) > 0 {
		if err := k.declare(b.cfg.DeadLetters.Name, []string{b.subject("dead.>")}, 0); err != nil {
			return err
		}
	}
	for _, s := range b.subs {
		if err := k.join(s); err != nil {
			return err
		}
	}
	close(b.started)
	return nil
}

// PublishAfter publishes a message only if the last one at its address has a given sequence, as bus.Bus does.
func (b *Bus) PublishAfter(ctx context.Context, last uint64, m *postrider.Message) (uint64, error) {
	k := b.broker
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := b.enter(ctx, "publish"); err != nil {
		return 0, err
	}
	stored, s, err := b.prepare(m)
	if err != nil {
		return 0, err
	}
	if at, err := timeAttribute(m, postrider.ExtDeliverAt); err != nil || at.After(time.Now()) {
		return 0, postrider.Errorf(postrider.InvalidArgument,
			"membus: publish %s: a message that is delivered later cannot expect a sequence", m.ID)
	}
	have := uint64(0)
	for _, other := range s.messages {
		if other.subject == stored.subject {
			have = other.sequence
		}
	}
	if have != last {
		return 0, postrider.Errorf(postrider.Aborted, "membus: publish %s: the last sequence is %d, not %d", m.ID, have, last)
	}
	if !k.appendOnce(s, stored, messageID{m.Source, m.ID}) {
		return have, nil
	}
	b.stats.Published++
	return s.last, nil
}

// Pause stops the delivery of a topic to a group, in all its instances, until a time or [Bus.Resume], as bus.Bus does.
func (b *Bus) Pause(ctx context.Context, group, topic string, until time.Time) error {
	return b.pause(ctx, "pause ", group, topic, until)
}

// Resume ends a pause. It does nothing to a group that is not paused.
func (b *Bus) Resume(ctx context.Context, group, topic string) error {
	return b.pause(ctx, "resume ", group, topic, time.Time{})
}

func (b *Bus) pause(ctx context.Context, op, group, topic string, until time.Time) error {
	op += topic + " of group " + group
	k := b.broker
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := b.enter(ctx, op); err != nil {
		return err
	}
	g := k.groupOf(group, b.subject(topic))
	if g == nil {
		return postrider.Errorf(postrider.NotFound, "membus: %s: the group has no such subscription", op)
	}
	g.paused = until
	k.announce()
	return nil
}

// Stats returns the counters.
func (b *Bus) Stats() bus.Stats {
	b.broker.mu.Lock()
	defer b.broker.mu.Unlock()
	return b.stats
}

// Crash lets the process of this bus die, as if the machine lost its power: what its handlers hold comes to others after
// AckWait, whatever they return meanwhile, and nothing can be published any more. Run returns when its context ends.
func (b *Bus) Crash() {
	k := b.broker
	k.mu.Lock()
	defer k.mu.Unlock()
	b.dead = true
	for _, s := range b.subs {
		for d := range s.held {
			delete(s.held, d)
			k.running--
			k.requeue(s.group, d, s.AckWait)
		}
		if s.group != nil {
			k.part(s)
		}
	}
	k.announce()
}

func (b *Bus) subject(topic string) string {
	if b.cfg.Prefix == "" {
		return topic
	}
	return b.cfg.Prefix + "." + topic
}

func (b *Bus) topic(subject string) string {
	if b.cfg.Prefix == "" {
		return subject
	}
	return strings.TrimPrefix(subject, b.cfg.Prefix+".")
}
