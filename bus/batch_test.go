package bus_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/binding/format/protobuf/v2/pb"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// calls counts how often a handler got each event.
type calls struct {
	mu    sync.Mutex
	times map[string]int
	order []string
}

func (c *calls) add(id string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.times == nil {
		c.times = map[string]int{}
	}
	c.times[id]++
	c.order = append(c.order, id)
	return c.times[id]
}

func (c *calls) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.order, " ")
}

// send stores a message as others would.
func send(t *testing.T, nc *nats.Conn, contentType string, data []byte) {
	t.Helper()
	msg := &nats.Msg{Subject: "notes.written.v1", Header: nats.Header{"Content-Type": {contentType}, "X-Trace": {"kept"}}, Data: data}
	if answer, err := nc.RequestMsg(msg, 5*time.Second); err != nil || strings.Contains(string(answer.Data), "error") {
		t.Fatal(err, answer)
	}
}

// eventJSON returns a note in structured JSON.
func eventJSON(id string, n int) string {
	return fmt.Sprintf(`{"specversion":"1.0","id":%q,"source":"//a","type":"notes.written.v1","data":{"n":%d}}`, id, n)
}

func protoBatch(t *testing.T, ids ...string) []byte {
	t.Helper()
	var batch []byte
	for i, id := range ids {
		event, err := proto.Marshal(&pb.CloudEvent{
			Id: id, Source: "//a", SpecVersion: "1.0", Type: "notes.written.v1",
			Data: &pb.CloudEvent_BinaryData{BinaryData: fmt.Appendf(nil, `{"n":%d}`, i)},
			Attributes: map[string]*pb.CloudEventAttributeValue{
				"datacontenttype": {Attr: &pb.CloudEventAttributeValue_CeString{CeString: "application/json"}},
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		batch = protowire.AppendBytes(protowire.AppendTag(batch, 1, protowire.BytesType), event)
	}
	return batch
}

func TestBatchOfEvents(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		contentType string
		data        []byte
		ordered     bool
	}{
		"JSON":          {"application/cloudevents-batch+json; charset=utf-8", []byte("[" + eventJSON("a", 0) + "," + eventJSON("b", 1) + "]"), false},
		"protobuf":      {"application/cloudevents-batch+protobuf", protoBatch(t, "a", "b"), false},
		"in their lane": {"application/cloudevents-batch+protobuf", protoBatch(t, "a", "b"), true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nc := postridertest.NATS(t)
			b := newBus(t, nc)
			var got calls
			opts := []bus.SubscribeOption{quick, bus.From(bus.DeliverAll)}
			if tt.ordered {
				opts = append(opts, bus.Ordered())
			}
			if err := b.Subscribe(noted.Handler(func(_ context.Context, e postrider.Event[note]) error {
				if times := got.add(e.ID); e.ID == "b" && times == 1 {
					return errors.New("not yet")
				}
				if e.Value.N != int(e.ID[0]-'a') || e.Source != "//a" || e.Delivery.Stream != "NOTES" {
					t.Errorf("got %+v with %+v", e.Message, e.Value)
				}
				return nil
			}), opts...); err != nil {
				t.Fatal(err)
			}
			run(t, b)
			<-b.Started()
			send(t, nc, tt.contentType, tt.data)
			// One event failed: the message came again, with the event that was done.
			postridertest.Eventually(t, func() error {
				if s := b.Stats(); got.String() != "a b a b" || s.Handled != 3 || s.Retried != 1 {
					return fmt.Errorf("handled %q, %+v", got.String(), s)
				}
				return nil
			})
			wantSettled(t, nc)
		})
	}
}

func jetStream(t *testing.T, nc *nats.Conn) jetstream.JetStream {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return js
}

// wantSettled waits until the group has nothing left to do.
func wantSettled(t *testing.T, nc *nats.Conn) {
	t.Helper()
	js := jetStream(t, nc)
	postridertest.Eventually(t, func() error {
		c, err := js.Consumer(t.Context(), "NOTES", durable)
		if err != nil {
			return err
		}
		info := c.CachedInfo()
		if info.NumPending > 0 || info.NumAckPending > 0 {
			return fmt.Errorf("%d are pending, %d are not acknowledged", info.NumPending, info.NumAckPending)
		}
		return nil
	})
}

// TestBatchDeadLetters has a batch in which one event cannot be read, one is refused and one never succeeds: each is in the
// dead letters by itself, and the others are done.
func TestBatchDeadLetters(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	var got calls
	if err := b.Subscribe(noted.Handler(func(_ context.Context, e postrider.Event[note]) error {
		got.add(e.ID)
		switch e.ID {
		case "refused":
			return postrider.Permanent(errors.New("no"))
		case "failing":
			return errors.New("never")
		}
		return nil
	}), quick, bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	<-b.Started()
	batch := []string{
		eventJSON("first", 0), eventJSON("refused", 1), `{"specversion":"1.0","id":"unreadable"}`, eventJSON("failing", 2),
		eventJSON("last", 3),
	}
	send(t, nc, "application/cloudevents-batch+json", []byte("["+strings.Join(batch, ",")+"]"))
	send(t, nc, "application/cloudevents-batch+json", []byte("[]"))
	send(t, nc, "application/cloudevents-batch+json", []byte("not JSON"))
	var letters []bus.DeadLetter
	postridertest.Eventually(t, func() (err error) {
		if letters, _, err = b.DeadLetters().List(t.Context(), bus.LetterFilter{}, 0, 0); err == nil && len(letters) != 4 {
			err = fmt.Errorf("%d dead letters, want 4", len(letters))
		}
		return err
	})
	wantSettled(t, nc)
	var ids []string
	for _, l := range letters {
		if l.Message.ID != "" {
			ids = append(ids, l.Message.ID)
		}
		if l.Message.ID == "failing" && (l.Attempts != 3 || string(l.Message.Data) != `{"n":2}` || !strings.Contains(l.Cause, "never")) {
			t.Errorf("the dead letter is %+v with %+v", l, l.Message)
		}
	}
	if slices.Sort(ids); !slices.Equal(ids, []string{"failing", "refused"}) {
		t.Errorf("dead letters %v: want the two that failed, and two that cannot be read", ids)
	}
	items := map[string]string{}
	for _, m := range stored(t, nc, "DEAD_LETTERS") {
		items[m.Header.Get("Postrider-Item")] = m.Header.Get("Content-Type")
		if m.Header.Get("X-Trace") != "kept" {
			t.Errorf("a header of the batch was lost: %v", m.Header)
		}
	}
	if items["1"] != "application/cloudevents+json" || items["2"] == "" || items["3"] == "" || items[""] != "application/cloudevents-batch+json" {
		t.Errorf("the items in the dead letters are %v", items)
	}
	if handled := b.Stats().Handled; handled != 6 { // first and last, at each of three attempts
		t.Errorf("handled %d, want 6", handled)
	}
}

func TestBatchIsBounded(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	if err := b.Subscribe(noted.Handler(func(context.Context, postrider.Event[note]) error {
		t.Error("an event of a batch that is too large was handled")
		return nil
	}), bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	<-b.Started()
	send(t, nc, "application/cloudevents-batch+protobuf", []byte(strings.Repeat("\x0a\x00", 10_001)))
	postridertest.Eventually(t, func() error {
		letters, _, err := b.DeadLetters().List(t.Context(), bus.LetterFilter{}, 0, 0)
		if err == nil && (len(letters) != 1 || !strings.Contains(letters[0].Cause, "10001 events")) {
			err = fmt.Errorf("dead letters are %+v", letters)
		}
		return err
	})
}

// TestBatchOfCommands has each command of a batch answered.
func TestBatchOfCommands(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	if err := b.Subscribe(tally.Handler(func(_ context.Context, n *note) (*note, error) {
		if n.N == 1 {
			return nil, postrider.Errorf(postrider.FailedPrecondition, "no")
		}
		return &note{N: 10 * n.N}, nil
	})); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	<-b.Started()
	var events []string
	for n := range 3 {
		events = append(events, fmt.Sprintf(
			`{"specversion":"1.0","id":"c%d","source":"//a","type":"notes.v1/Tally","replyto":"replies.a","data":{"n":%d}}`, n, n))
	}
	msg := &nats.Msg{
		Subject: "notes.v1.Tally", Header: nats.Header{"Content-Type": {"application/cloudevents-batch+json"}},
		Data: []byte("[" + strings.Join(events, ",") + "]"),
	}
	if _, err := nc.RequestMsg(msg, 5*time.Second); err != nil {
		t.Fatal(err)
	}
	postridertest.Eventually(t, func() error {
		got := map[string]string{}
		for _, m := range stored(t, nc, "NOTES") {
			if m.Subject == "replies.a" {
				got[m.Header.Get("ce-id")] = m.Header.Get("ce-errorcode") + string(m.Data)
			}
		}
		if got["c0.reply"] != `{"n":0}` || got["c2.reply"] != `{"n":20}` || !strings.HasPrefix(got["c1.reply"], "FAILED_PRECONDITION") {
			return fmt.Errorf("replies %v", got)
		}
		return nil
	})
}
