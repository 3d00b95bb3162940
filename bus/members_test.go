package bus_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/internal/devstack"
	"github.com/postrider/postrider/postridertest"
)

// sharers are instances that share the keys of an ordered subscription; the diary sees all of them.
type sharers struct {
	*diary

	mu  sync.Mutex
	had map[string]map[string]bool // the keys that each instance has handled, since it was cleared
}

// start starts an instance.
func (s *sharers) start(t *testing.T, nc *nats.Conn, name string, opts ...bus.SubscribeOption) (stop func() error) {
	t.Helper()
	b := newBus(t, nc, inPartitions(16))
	h := keyed.Handler(func(_ context.Context, e postrider.Event[note]) error {
		defer s.begin(e.Value)()
		s.mu.Lock()
		if s.had[name] == nil {
			s.had[name] = map[string]bool{}
		}
		s.had[name][e.Value.Text] = true
		s.mu.Unlock()
		s.finish(e.Value)
		return nil
	})
	if err := b.Subscribe(h, append(opts, bus.Ordered(), bus.From(bus.DeliverAll))...); err != nil {
		t.Fatal(err)
	}
	stop = run(t, b)
	<-b.Started()
	return stop
}

// settle publishes until just these instances have all keys between them, each its part. It returns the next N.
func (s *sharers) settle(t *testing.T, pub *bus.Bus, keys, n int, names ...string) int {
	t.Helper()
	postridertest.Eventually(t, func() error {
		s.mu.Lock()
		s.had = map[string]map[string]bool{}
		s.mu.Unlock()
		publishKeyed(t, pub, keys, n, 5)
		n += 5
		postridertest.Eventually(t, wantCount(s.handled, keys*n))
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.had) != len(names) {
			return fmt.Errorf("%d instances handle messages, want %d", len(s.had), len(names))
		}
		total := 0
		for _, name := range names {
			total += len(s.had[name])
			if had := len(s.had[name]); had < keys/len(names)/3 {
				return fmt.Errorf("%s handles %d of %d keys", name, had, keys)
			}
		}
		if total != keys {
			return fmt.Errorf("%d keys are handled by several instances", total-keys)
		}
		return nil
	})
	return n
}

// TestMembersShareKeys has instances come and go. All take part, no key is handled by two at once, out of order, or not at all.
func TestMembersShareKeys(t *testing.T) {
	t.Parallel()
	srv := postridertest.NewNATS(t)
	const keys = 60
	s := &sharers{diary: newDiary()}
	pub := newBus(t, srv.Connect(), inPartitions(16))
	stop := map[string]func() error{}
	n := 0
	for _, step := range []struct{ starts, stops string }{{starts: "a"}, {starts: "b"}, {starts: "c"}, {stops: "a"}, {starts: "d"}} {
		if step.starts != "" {
			stop[step.starts] = s.start(t, srv.Connect(), step.starts)
		} else {
			if err := stop[step.stops](); err != nil {
				t.Fatal(err)
			}
			delete(stop, step.stops)
		}
		var names []string
		for name := range stop {
			names = append(names, name)
		}
		n = s.settle(t, pub, keys, n, names...)
	}
	s.check(t)
}

// TestMembersUnheard has instances that may not announce themselves: each takes part in everything, the pins choose, and
// when one stops the other has it all.
func TestMembersUnheard(t *testing.T) {
	t.Parallel()
	srv, _ := startNATS(t, devstack.NATSConfig{Options: options(t, `authorization: {
		default_permissions: {publish: {deny: "members.>"}}, users: [{user: mute, password: secret}]
	}`)}, nats.UserInfo("mute", "secret"))
	connect := func() *nats.Conn {
		nc, err := nats.Connect(srv.URL, nats.UserInfo("mute", "secret"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	s := &sharers{diary: newDiary(), had: map[string]map[string]bool{}}
	pub := newBus(t, connect(), inPartitions(16))
	stop := s.start(t, connect(), "a")
	s.start(t, connect(), "b")
	publishKeyed(t, pub, 20, 0, 10)
	postridertest.Eventually(t, wantCount(s.handled, 200))
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	publishKeyed(t, pub, 20, 10, 10)
	postridertest.Eventually(t, wantCount(s.handled, 400))
	s.check(t)
}

// TestGroupIsDivided has a group that was not ordered become so, in the middle of its messages: the consumers of the
// partitions go on where the group was.
func TestGroupIsDivided(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	start := func(handle func(*note) error, opts ...bus.SubscribeOption) (b *bus.Bus, stop func() error) {
		b = newBus(t, nc, inPartitions(4))
		h := keyed.Handler(func(_ context.Context, e postrider.Event[note]) error { return handle(e.Value) })
		if err := b.Subscribe(h, append(opts, quick)...); err != nil {
			t.Fatal(err)
		}
		return b, run(t, b)
	}
	publishKeyed(t, newBus(t, nc, inPartitions(4)), 10, 0, 1) // before the group, which begins with new messages
	var got seen
	var mu sync.Mutex
	limit := 30
	b, stop := start(func(n *note) error {
		mu.Lock()
		defer mu.Unlock()
		if limit == 0 {
			return postrider.RetryAfter(1e9, errors.New("later"))
		}
		limit--
		got.add(*n)
		return nil
	})
	<-b.Started()
	publishKeyed(t, b, 10, 1, 6)
	postridertest.Eventually(t, wantCount(got.count, 30))
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	d := newDiary()
	b, stop = start(func(n *note) error {
		defer d.begin(n)()
		d.mu.Lock()
		if d.done[n.Text] == 0 {
			d.done[n.Text] = n.N // where the ordered handling of this key begins
		}
		d.mu.Unlock()
		d.finish(n)
		got.add(*n)
		return nil
	}, bus.Ordered())
	publishKeyed(t, b, 10, 7, 1)
	distinct := func() int {
		got.mu.Lock()
		defer got.mu.Unlock()
		m := map[note]bool{}
		for _, n := range got.list {
			m[n] = true
			if n.N == 0 {
				t.Errorf("%v is from before the group", n)
			}
		}
		return len(m)
	}
	postridertest.Eventually(t, wantCount(distinct, 70))
	d.check(t)
	if err := stop(); err != nil {
		t.Fatal(err)
	}

	b = newBus(t, nc)
	if err := b.Subscribe(keyed.Handler(func(context.Context, postrider.Event[note]) error { return nil })); err != nil {
		t.Fatal(err)
	}
	if err := b.Run(t.Context()); !errors.Is(err, postrider.FailedPrecondition) {
		t.Errorf("not ordered any more: error is %v, want FailedPrecondition", err)
	}
}

// TestPauseReachesAllPartitions pauses and resumes a group that is divided.
func TestPauseReachesAllPartitions(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	s := &sharers{diary: newDiary(), had: map[string]map[string]bool{}}
	s.start(t, nc, "only")
	b := newBus(t, nc)
	paused := func(want int) error {
		n := 0
		stream, err := js.Stream(t.Context(), "NOTES")
		if err != nil {
			return err
		}
		for c := range stream.ListConsumers(t.Context()).Info() {
			if c.Paused {
				n++
			}
		}
		return wantCount(func() int { return n }, want)()
	}
	if err := b.Pause(t.Context(), "tester", "notes.keyed.v1", time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if err := paused(16); err != nil {
		t.Errorf("paused: %v", err)
	}
	if err := b.Resume(t.Context(), "tester", "notes.keyed.v1"); err != nil {
		t.Fatal(err)
	}
	if err := paused(0); err != nil {
		t.Errorf("resumed: %v", err)
	}
}

// TestPartsDoNotBeginAnew has a group that is to be divided while its consumer cannot be looked up, so that it is not known
// where its parts begin: none may, since one that began with new messages would lose the others.
func TestPartsDoNotBeginAnew(t *testing.T) {
	t.Parallel()
	_, nc := startNATS(t, devstack.NATSConfig{Options: options(t, `authorization: {users: [
		{user: app, password: secret}
		{user: blind, password: secret, permissions: {publish: {deny: "$JS.API.CONSUMER.INFO.NOTES.tester-notes_keyed_v1"}}}
	]}`)}, nats.UserInfo("app", "secret"))
	b := newBus(t, nc, inPartitions(4))
	handled := make(chan struct{}, 1)
	if err := b.Subscribe(keyed.Handler(func(context.Context, postrider.Event[note]) error { handled <- struct{}{}; return nil })); err != nil {
		t.Fatal(err)
	}
	stop := run(t, b)
	<-b.Started()
	publishKeyed(t, b, 1, 0, 1)
	<-handled
	if err := stop(); err != nil {
		t.Fatal(err)
	}

	blind, err := nats.Connect(nc.ConnectedUrl(), nats.UserInfo("blind", "secret"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(blind.Close)
	var text logText
	b = newBus(t, blind, func(c *bus.Config) { c.Logger = slog.New(slog.NewTextHandler(&text, nil)) })
	if err := b.Subscribe(keyed.Handler(func(context.Context, postrider.Event[note]) error { return nil }), bus.Ordered()); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	postridertest.Eventually(t, func() error {
		if !strings.Contains(text.String(), "cannot start yet") {
			return errors.New("the bus has not noticed")
		}
		return nil
	})
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.Consumer(t.Context(), "NOTES", "tester-notes_keyed_v1=p3"); !errors.Is(err, jetstream.ErrConsumerNotFound) {
		t.Errorf("the consumer of the last partition: %v, want that there is none", err)
	}
}
