package bus_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	topics := func(topics ...string) bus.Config {
		return bus.Config{Source: "//test", Streams: []bus.Stream{{Name: "A", Topics: topics}}}
	}
	for text, cfg := range map[string]bus.Config{
		"Config.Source is required":              {},
		"Config.Prefix is \"a b\"":               {Source: "//test", Prefix: "a b"},
		"Config.Prefix is \"a.\"":                {Source: "//test", Prefix: "a."},
		"Config.Middleware[0] is nil":            {Source: "//test", Middleware: []postrider.Middleware{nil}},
		"Config.Streams[0].Topics is empty":      topics(),
		"Config.Streams[0].Topics has \"a..b\"":  topics("a.>", "a..b"),
		"Config.Streams[0].Topics has \"a.>.b\"": topics("a.>.b"),
		"Config.Streams[0].Topics has \"a b\"":   topics("a b"),
		"Config.Streams[0].Topics has \"\"":      topics(""),
	} {
		if _, err := bus.New(nc, cfg); !errors.Is(err, postrider.InvalidArgument) || !strings.Contains(err.Error(), text) {
			t.Errorf("%v, want InvalidArgument that says %s", err, text)
		}
	}
	if _, err := bus.New(nil, topics("a.>")); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("without a connection: %v", err)
	}
	if _, err := bus.New(nc, topics("a.*.b", "b.>", "*")); err != nil {
		t.Errorf("with wildcards: %v", err)
	}
	b := newBus(t, nc)
	if err := b.Subscribe(collect(new(seen)), nil); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("with a nil option: %v", err)
	}
	if err := b.Publish(t.Context(), nil); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("publish nil: %v", err)
	}
	if err := b.Pause(t.Context(), "nobody", "notes.written.v1", time.Now().Add(time.Hour)); !errors.Is(err, postrider.NotFound) {
		t.Errorf("pause a group that is not there: %v", err)
	}
}

// nats.go gives up after MaxReconnects. A bus that went on then would handle nothing and say nothing.
func TestRunFailsOnceTheConnectionIsClosed(t *testing.T) {
	t.Parallel()
	srv := postridertest.NewNATS(t)
	nc := srv.Connect(nats.MaxReconnects(2), nats.ReconnectWait(time.Millisecond))
	b := newBus(t, nc)
	if err := b.Subscribe(collect(new(seen))); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- postrider.Run(t.Context(), b) }()
	select {
	case <-b.Started():
	case err := <-done:
		t.Fatal(err)
	}
	srv.Stop()
	check := func(done <-chan error) {
		select {
		case err := <-done:
			if !errors.Is(err, postrider.Unavailable) || !errors.Is(err, nats.ErrConnectionClosed) || !strings.Contains(err.Error(), "MaxReconnects") {
				t.Errorf("Run: %v, want Unavailable that says how to connect", err)
			}
		case <-time.After(30 * time.Second):
			t.Error("Run goes on with a closed connection")
		}
	}
	check(done)

	late := newBus(t, nc)
	go func() { done <- late.Run(t.Context()) }()
	check(done)
}

// A publish that ends while the server is away says that it is, and that nothing was sent.
func TestPublishWithoutServerSaysSo(t *testing.T) {
	t.Parallel()
	srv := postridertest.NewNATS(t)
	b := newBus(t, srv.Connect(), func(c *bus.Config) { c.PublishTimeout = 200 * time.Millisecond })
	srv.Stop()
	err := noted.Publish(context.Background(), b, &note{})
	var e *postrider.Error
	if !errors.As(err, &e) || e.Code != postrider.Unavailable || !e.Unprocessed || !strings.Contains(e.Error(), "not connected to NATS") {
		t.Errorf("%v, want Unavailable, not processed, that says why", err)
	}
}

// The consumer of group "svc-a" and topic "b.c.v1" has the name of that of group "svc" and topic "a-b.c.v1". The second must
// not take it over, which left the first without messages.
func TestConsumerOfAnotherTopicIsNotTaken(t *testing.T) {
	t.Parallel()
	srv := postridertest.NewNATS(t)
	first, second := postrider.NewTopic[note]("b.c.v1"), postrider.NewTopic[note]("a-b.c.v1")
	got := new(seen)
	begin := func(topic *postrider.Topic[note], group string) (*bus.Bus, chan error) {
		b := newBus(t, srv.Connect(), func(c *bus.Config) {
			c.Streams = []bus.Stream{{Name: "LETTERS", Topics: []string{"b.>", "a-b.>"}}}
		})
		if err := b.Subscribe(topic.Handler(func(_ context.Context, e postrider.Event[note]) error { got.add(*e.Value); return nil }), bus.Group(group)); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		ended := make(chan struct{})
		go func() { defer close(ended); done <- b.Run(ctx) }()
		t.Cleanup(func() { cancel(); <-ended })
		return b, done
	}
	b, _ := begin(first, "svc-a")
	<-b.Started()
	_, done := begin(second, "svc")
	if err := <-done; !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), "for another topic, b.c.v1") {
		t.Errorf("Run: %v, want FailedPrecondition that names the other topic", err)
	}
	if err := first.Publish(t.Context(), b, &note{N: 1}); err != nil {
		t.Fatal(err)
	}
	postridertest.Eventually(t, func() error {
		if got.count() != 1 {
			return errors.New("the first group has no messages any more")
		}
		return nil
	})
}
