package bus_test

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// A retry that is put off for long leaves the consumer, comes back to its group alone, and counts on.
func TestLongRetryLeavesTheConsumer(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	b := newBus(t, nc)
	var others atomic.Int64
	attempts := make(chan *postrider.Message, 10)
	failing := noted.Handler(func(_ context.Context, e postrider.Event[note]) error {
		attempts <- e.Message
		return postrider.RetryAfter(5*time.Second, errors.New("come back later"))
	})
	if err := b.Subscribe(failing, bus.Retry(postrider.RetryPolicy{Attempts: 2})); err != nil {
		t.Fatal(err)
	}
	other := noted.Handler(func(context.Context, postrider.Event[note]) error { others.Add(1); return nil })
	if err := b.Subscribe(other, bus.Group("other")); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	<-b.Started()
	if err := noted.Publish(t.Context(), b, &note{Text: "Straße"}, postrider.MessageID("n-1")); err != nil {
		t.Fatal(err)
	}
	if m := <-attempts; m.Delivery.Attempt != 1 {
		t.Errorf("the first attempt is %d", m.Delivery.Attempt)
	}
	consumer, err := js.Consumer(t.Context(), "NOTES", durable)
	if err != nil {
		t.Fatal(err)
	}
	postridertest.Eventually(t, func() error {
		info, err := consumer.Info(t.Context())
		if err == nil && (info.NumAckPending != 0 || info.AckFloor.Stream != 1) {
			err = fmt.Errorf("the consumer still holds %d messages, its floor is %d", info.NumAckPending, info.AckFloor.Stream)
		}
		return err
	})
	if waiting := stored(t, nc, "SCHEDULES"); len(waiting) != 1 {
		t.Errorf("%d messages wait in the scheduler's stream, want 1", len(waiting))
	}
	m := <-attempts
	if d := m.Delivery; d.Attempt != 2 || d.Stream != "NOTES" || d.Sequence != 1 || d.Group != "tester" {
		t.Errorf("the second delivery is %+v", d)
	}
	if m.ID != "n-1" || m.Topic != "notes.written.v1" || string(m.Data) != `{"n":0,"text":"Straße"}` {
		t.Errorf("the message was changed on the way: %+v, data %s", m, m.Data)
	}
	postridertest.Eventually(t, func() error {
		letters, _, err := b.DeadLetters().List(t.Context(), bus.LetterFilter{}, 0, 0)
		if err == nil && (len(letters) != 1 || letters[0].Attempts != 2 || letters[0].Stream != "NOTES" || letters[0].Origin != 1 ||
			letters[0].Topic != "notes.written.v1") {
			err = fmt.Errorf("dead letters are %+v, want one after 2 attempts", letters)
		}
		return err
	})
	emptyOwnStream(t, js)
	if n := others.Load(); n != 1 {
		t.Errorf("the other group handled it %d times, want once", n)
	}
}

// emptyOwnStream waits until nothing is left that is to be delivered later or to one group.
func emptyOwnStream(t *testing.T, js jetstream.JetStream) {
	t.Helper()
	stream, err := js.Stream(t.Context(), "SCHEDULES")
	if err != nil {
		t.Fatal(err)
	}
	postridertest.Eventually(t, func() error {
		info, err := stream.Info(t.Context())
		if err == nil && info.State.Msgs != 0 {
			err = fmt.Errorf("%d messages are left", info.State.Msgs)
		}
		return err
	})
}

// What is sent to a group reaches no other, at once or at its time, before the group exists or after, and shares the
// subscription's bound of handlers.
func TestSendToGroup(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	b := newBus(t, nc)
	const each = 20
	var running, most atomic.Int64
	got := make(chan *postrider.Message, 10*each)
	h := noted.Handler(func(_ context.Context, e postrider.Event[note]) error {
		if n := running.Add(1); n > most.Load() {
			most.Store(n)
		}
		got <- e.Message
		running.Add(-1)
		return nil
	})
	if err := b.Subscribe(h, bus.Concurrency(1), bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	other := noted.Handler(func(_ context.Context, e postrider.Event[note]) error {
		if e.Value.N < 0 {
			t.Errorf("the other group got message %d", e.Value.N)
		}
		return nil
	})
	if err := b.Subscribe(other, bus.Group("other"), bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	due := time.Now().Add(500 * time.Millisecond)
	for i := 1; i <= each; i++ {
		if err := noted.Publish(t.Context(), b, &note{N: i}); err != nil {
			t.Fatal(err)
		}
		msg := &nats.Msg{Data: fmt.Appendf(nil, `{"n":%d}`, -i), Header: nats.Header{
			"ce-specversion": {"1.0"}, "ce-id": {strconv.Itoa(i)}, "ce-source": {"//test"}, "ce-type": {"notes.written.v1"},
			"ce-datacontenttype": {"application/json"}, "Postrider-Topic": {"notes.written.v1"},
			"Nats-Msg-Id": {"send " + strconv.Itoa(i)}, "Nats-Expected-Last-Sequence": {"77"},
		}}
		at := time.Time{}
		if i%2 == 0 {
			at = due
			msg.Header.Set("Postrider-Attempts", "3")
		}
		for range 2 { // the second is a duplicate
			if err := b.SendToGroup(t.Context(), "tester", "notes.written.v1", msg, at); err != nil {
				t.Fatal(err)
			}
		}
	}
	run(t, b)
	for range 2 * each {
		m := <-got
		e, err := noted.Decode(m)
		if err != nil {
			t.Fatal(err)
		}
		want := 1
		if e.Value.N < 0 && e.Value.N%2 == 0 {
			want = 4
			if now := time.Now(); now.Before(due) {
				t.Errorf("message %d came %v early", e.Value.N, due.Sub(now))
			}
		}
		if m.Delivery.Attempt != want || m.Topic != "notes.written.v1" {
			t.Errorf("message %d of topic %s comes as attempt %d, want %d", e.Value.N, m.Topic, m.Delivery.Attempt, want)
		}
	}
	emptyOwnStream(t, js)
	if len(got) != 0 {
		t.Errorf("%d messages too many", len(got))
	}
	if n := most.Load(); n != 1 {
		t.Errorf("%d handlers ran at once, want 1", n)
	}
}

// What cannot be an address is not taken for one: its dead letter could never be published, and it would come for ever.
func TestGroupMessageWithABadTopic(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	if err := b.Subscribe(noted.Handler(func(context.Context, postrider.Event[note]) error { return nil })); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	awaitStart(t, b)
	for i, topic := range []string{"two words", "notes.*", "a..b"} {
		msg := &nats.Msg{Data: []byte("hello"), Header: nats.Header{"Postrider-Topic": {topic}, "Nats-Msg-Id": {strconv.Itoa(i)}}}
		if err := b.SendToGroup(t.Context(), "tester", noted.Name(), msg, time.Time{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range waitLetters(t, b, bus.LetterFilter{}, 3) {
		if l.Topic != "group.tester.notes.written.v1" || l.Attempts != 1 {
			t.Errorf("the letter is %+v", l)
		}
	}
}
