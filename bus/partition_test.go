package bus_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/internal/wiredoc"
	"github.com/postrider/postrider/postridertest"
)

// inPartitions has the stream of a test divided.
func inPartitions(n int) func(*bus.Config) {
	return func(c *bus.Config) { c.Streams[0].Partitions = n }
}

// TestPartitionsAsDocumented publishes the keys of docs/wire.md and looks where they are.
func TestPartitionsAsDocumented(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc, inPartitions(16), func(c *bus.Config) {
		c.Streams[0].Name, c.Streams[0].Topics = "ORDERS", []string{"orders.placed.v1"}
	})
	var want, got []string
	for line := range strings.Lines(wiredoc.Text(t, "text partitions")) {
		key, subject, _ := strings.Cut(strings.TrimSpace(line), "->")
		want = append(want, strings.TrimSpace(subject))
		m := &postrider.Message{ID: postrider.NewID(), Type: "orders.placed.v1"}
		if key = strings.TrimSpace(key); key != "(none)" {
			if err := m.SetExtension(postrider.ExtPartitionKey, key); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.Publish(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range stored(t, nc, "ORDERS") {
		got = append(got, m.Subject)
	}
	if !slices.Equal(got, want) {
		t.Errorf("messages are at %q, docs/wire.md says %q", got, want)
	}
}

// TestPartitionsAreNoTopics has subscriptions of every other kind read a stream with partitions: each sees topics only.
func TestPartitionsAreNoTopics(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc, inPartitions(4), func(c *bus.Config) {
		c.Prefix, c.Streams[0].Topics = "test", []string{"notes.keyed.v1", "notes", "replies.>"}
	})
	var mu sync.Mutex
	got := map[string][]string{} // topics by group
	count := func(group string) func() int {
		return func() int { mu.Lock(); defer mu.Unlock(); return len(got[group]) }
	}
	subscribe := func(group, topic string, opts ...bus.SubscribeOption) {
		t.Helper()
		h := postrider.RawHandler(topic, func(_ context.Context, m *postrider.Message) error {
			mu.Lock()
			defer mu.Unlock()
			got[group] = append(got[group], m.Topic)
			if m.Subject == "fails" && m.Delivery.Attempt == 1 {
				return postrider.RetryAfter(time.Millisecond, errors.New("not the first time"))
			}
			return nil
		})
		if err := b.Subscribe(h, append(opts, bus.Group(group))...); err != nil {
			t.Fatal(err)
		}
	}
	subscribe("exact", "notes.keyed.v1")
	subscribe("wild", "notes.*.v1")
	subscribe("odd", "notes.*.*") // notes.partition.3 is none of these
	subscribe("each", "notes.keyed.v1", bus.Broadcast())
	subscribe("ordered", "notes.keyed.v1", bus.Ordered())
	run(t, b)
	<-b.Started()
	for i, key := range []string{"", "a", "b", "c", "d", "e", "f", "g"} {
		m := &postrider.Message{ID: postrider.NewID(), Type: "notes.keyed.v1"}
		short := &postrider.Message{ID: postrider.NewID(), Type: "notes", Topic: "notes"}
		if key != "" {
			_ = m.SetExtension(postrider.ExtPartitionKey, key)
			_ = short.SetExtension(postrider.ExtPartitionKey, key)
		}
		if i == 3 {
			m.Subject = "fails"
		}
		if err := b.Publish(t.Context(), m, short); err != nil {
			t.Fatal(err)
		}
	}
	for _, group := range []string{"exact", "wild", "odd", "each", "ordered"} {
		postridertest.Eventually(t, wantCount(count(group), 9))
	}
	mu.Lock()
	defer mu.Unlock()
	for group, topics := range got {
		for _, topic := range topics {
			if topic != "notes.keyed.v1" {
				t.Errorf("group %s got topic %q", group, topic)
			}
		}
	}
}

// TestPartitionedDetours sends keyed messages over the scheduler, into the dead letters and back.
func TestPartitionedDetours(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc, inPartitions(8))
	var got seen
	var broken sync.Map
	broken.Store("is", true)
	if err := b.Subscribe(keyed.Handler(func(_ context.Context, e postrider.Event[note]) error {
		if _, is := broken.Load("is"); is {
			return postrider.Permanent(errors.New("broken"))
		}
		got.add(*e.Value)
		return nil
	})); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	<-b.Started()
	if err := keyed.Publish(t.Context(), b, &note{Text: "a"}, postrider.Delay(time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	var letters []bus.DeadLetter
	postridertest.Eventually(t, func() (err error) {
		letters, _, err = b.DeadLetters().List(t.Context(), bus.LetterFilter{Topic: "notes.keyed.v1"}, 0, 10)
		return errors.Join(err, wantCount(func() int { return len(letters) }, 1)())
	})
	if s := stored(t, nc, "NOTES")[0].Subject; !strings.HasPrefix(s, "notes.keyed.v1.partition.") {
		t.Errorf("the delayed message is at %s, want a partition", s)
	}
	broken.Delete("is")
	if _, err := b.DeadLetters().Replay(t.Context(), []uint64{letters[0].Sequence}, bus.Action{By: "me", Why: "mended"}); err != nil {
		t.Fatal(err)
	}
	postridertest.Eventually(t, wantCount(got.count, 1))
	after := &postrider.Message{ID: "after", Type: "notes.keyed.v1"}
	_ = after.SetExtension(postrider.ExtPartitionKey, "a")
	if _, err := b.PublishAfter(t.Context(), 1, after); err != nil {
		t.Errorf("published after the only message of the partition: %v", err)
	}
}

func TestPartitionsStay(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	publish := func(partitions int) (*bus.Bus, error) {
		b := newBus(t, nc, inPartitions(partitions))
		return b, keyed.Publish(t.Context(), b, &note{Text: "a"})
	}
	if _, err := publish(8); err != nil {
		t.Fatal(err)
	}
	if _, err := publish(0); err != nil {
		t.Errorf("a bus that does not say how many partitions: %v", err)
	}
	for _, m := range stored(t, nc, "NOTES") {
		if !strings.HasPrefix(m.Subject, "notes.keyed.v1.partition.") {
			t.Errorf("a message is at %s, want a partition", m.Subject)
		}
	}
	_, err = publish(4)
	if !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), "8 -> 4") || !strings.Contains(err.Error(), "2 messages") {
		t.Errorf("other partitions: error is %v, want FailedPrecondition with both numbers", err)
	}
	s, err := js.Stream(t.Context(), "NOTES")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := publish(4); err != nil {
		t.Errorf("other partitions of an empty stream: %v", err)
	}
}

func TestPartitionsAreChecked(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	for _, n := range []int{-1, 65} {
		cfg := bus.Config{Source: "//test", Streams: []bus.Stream{{Name: "A", Topics: []string{"a.>"}, Partitions: n}}}
		if _, err := bus.New(nc, cfg); !errors.Is(err, postrider.InvalidArgument) || !strings.Contains(err.Error(), "Partitions") {
			t.Errorf("%d partitions: error is %v, want InvalidArgument", n, err)
		}
	}
	b := newBus(t, nc)
	if err := b.Publish(t.Context(), &postrider.Message{ID: "1", Type: "notes.a.partition.7"}); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("publish to what looks like a partition: error is %v, want InvalidArgument", err)
	}
	h := postrider.RawHandler("notes.a.partition.7", func(context.Context, *postrider.Message) error { return nil })
	if err := b.Subscribe(h); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("subscribe to what looks like a partition: error is %v, want InvalidArgument", err)
	}
}
