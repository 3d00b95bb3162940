package bus_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// readAll returns what Read returns, each message as its sequence, topic and id.
func readAll(t *testing.T, b *bus.Bus, stream string, since time.Time) (got []string) {
	t.Helper()
	for m, err := range b.Read(t.Context(), stream, since) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprint(m.Delivery.Sequence, " ", m.Topic, " ", m.ID))
	}
	return got
}

func TestRead(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc, inPartitions(4), func(c *bus.Config) { c.Prefix = "test" })
	ctx := t.Context()
	for m, err := range b.Read(ctx, "NOTES", time.Time{}) {
		if !errors.Is(err, postrider.NotFound) || m != nil {
			t.Errorf("without a stream: %v, %v", m, err)
		}
	}
	publish := func(id string) {
		t.Helper()
		if err := noted.Publish(ctx, b, &note{Text: id}, postrider.MessageID(id), postrider.Key(id)); err != nil {
			t.Fatal(err)
		}
	}
	publish("a")
	publish("b")
	const batch = `[{"specversion":"1.0","id":"c","source":"//x","type":"t"},{"specversion":"1.0","id":"d","source":"//x","type":"t"}]`
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	for _, msg := range []*nats.Msg{
		{Subject: "test.notes.x", Data: []byte(batch), Header: nats.Header{"Content-Type": {"application/cloudevents-batch+json"}}},
		{Subject: "test.notes.raw", Data: []byte("raw")},
		{Subject: "test.notes.bad", Data: []byte("{"), Header: nats.Header{"Content-Type": {"application/cloudevents+json"}}},
	} {
		if _, err := js.PublishMsg(ctx, msg); err != nil {
			t.Fatal(err)
		}
	}
	publish("e")
	all := []string{
		"1 notes.written.v1 a", "2 notes.written.v1 b", "3 notes.x c", "3 notes.x d", "4 notes.raw ", "5 notes.bad ", "6 notes.written.v1 e",
	}
	if got := readAll(t, b, "NOTES", time.Time{}); !slices.Equal(got, all) {
		t.Errorf("all are %q", got)
	}
	stream, err := js.Stream(ctx, "NOTES")
	if err != nil {
		t.Fatal(err)
	}
	second, err := stream.GetMsg(ctx, 2)
	if err != nil {
		t.Fatal(err)
	}
	if got := readAll(t, b, "NOTES", second.Time); !slices.Equal(got, all[1:]) {
		t.Errorf("since the second are %q", got)
	}
	if got := readAll(t, b, "NOTES", time.Now().Add(time.Hour)); len(got) > 0 {
		t.Errorf("in the future are %q", got)
	}
	n := 0
	for range b.Read(ctx, "NOTES", time.Time{}) {
		if n++; n == 2 {
			break
		}
	}
	publish("f")
	published := false
	var got []string
	for m, err := range b.Read(ctx, "NOTES", time.Time{}) {
		if err != nil {
			t.Fatal(err)
		}
		if got = append(got, m.ID); !published { // what comes while it reads is for the next time
			publish("g")
			published = true
		}
	}
	if want := []string{"a", "b", "c", "d", "", "", "e", "f"}; !slices.Equal(got, want) {
		t.Errorf("while the stream grows: %q", got)
	}
	if err := stream.DeleteMsg(ctx, 7); err != nil {
		t.Fatal(err)
	}
	if err := stream.DeleteMsg(ctx, 8); err != nil { // the last
		t.Fatal(err)
	}
	if got := readAll(t, b, "NOTES", time.Time{}); !slices.Equal(got, all) {
		t.Errorf("after the last were deleted: %q", got)
	}
}

// A connection that breaks in the middle loses and repeats nothing.
func TestReadOverARestart(t *testing.T) {
	t.Parallel()
	srv := postridertest.NewNATS(t)
	b := newBus(t, srv.Connect())
	const n = 3000
	text := strings.Repeat("x", 6<<10) // more than is asked for at once
	notes := make([]*note, n)
	for i := range notes {
		notes[i] = &note{N: i, Text: text}
	}
	if err := noted.PublishAll(t.Context(), b, notes); err != nil {
		t.Fatal(err)
	}
	next := 0
	for m, err := range b.Read(t.Context(), "NOTES", time.Time{}) {
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf(`{"n":%d,`, next); !strings.HasPrefix(string(m.Data), want) {
			t.Fatalf("got %.20s, want %s", m.Data, want)
		}
		if next++; next == 20 {
			srv.Stop()
			srv.Start()
		}
	}
	if next != n {
		t.Errorf("%d messages, want %d", next, n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, err := range b.Read(ctx, "NOTES", time.Time{}) {
		if !errors.Is(err, postrider.Canceled) {
			t.Errorf("after its context has ended: %v", err)
		}
	}
}
