package bus_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// TestCompactAndBinaryMeet has a group get the messages of publishers in both modes, keys in order, and a dead letter of each.
func TestCompactAndBinaryMeet(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	compact := newBus(t, nc, func(c *bus.Config) { c.Mode = bus.Compact })
	binary := newBus(t, nc)
	var mu sync.Mutex
	got := map[string][]int{}
	if err := binary.Subscribe(noted.Handler(func(_ context.Context, e postrider.Event[note]) error {
		if e.Value.N == 3 {
			return postrider.Permanent(errors.New("no"))
		}
		mu.Lock()
		defer mu.Unlock()
		got[e.Key()+e.Subject] = append(got[e.Key()+e.Subject], e.Value.N)
		return nil
	}), bus.Ordered(), bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, binary)
	<-binary.Started()
	for n := range 30 {
		b := []*bus.Bus{compact, binary}[n%2]
		key := fmt.Sprint("ключ ", n%4/2)
		if err := noted.Publish(t.Context(), b, &note{N: n}, postrider.Key(key), postrider.Subject("ü")); err != nil {
			t.Fatal(err)
		}
	}
	postridertest.Eventually(t, func() error {
		mu.Lock()
		defer mu.Unlock()
		const want = "map[ключ 0ü:[0 1 4 5 8 9 12 13 16 17 20 21 24 25 28 29] ключ 1ü:[2 6 7 10 11 14 15 18 19 22 23 26 27]]"
		if fmt.Sprint(got) != want {
			return fmt.Errorf("got %v, want %s", got, want)
		}
		return nil
	})
	letters, _, err := compact.DeadLetters().List(t.Context(), bus.LetterFilter{}, 0, 0)
	if err != nil || len(letters) != 1 || string(letters[0].Message.Data) != `{"n":3}` {
		t.Errorf("dead letters %+v, %v", letters, err)
	}
	for i, m := range stored(t, nc, "NOTES") {
		if isCompact := m.Header.Get("Content-Type") != ""; isCompact != (i%2 == 0) || isCompact == (m.Header.Get("ce-id") != "") {
			t.Errorf("message %d has the headers %v", i, m.Header)
		}
	}
}

// TestAllowDuplicates publishes without message ids: what is published twice is stored twice, and Publish itself does not
// send a message again whose outcome it does not know.
func TestAllowDuplicates(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	for i, mode := range []bus.Mode{bus.Binary, bus.Compact, bus.JSON} {
		b := newBus(t, nc, func(c *bus.Config) { c.AllowDuplicates, c.Mode = true, mode })
		msgs := make([]*postrider.Message, 20) // enough for an atomic batch
		for i := range msgs {
			m, err := noted.Message(t.Context(), &note{N: i})
			if err != nil {
				t.Fatal(err)
			}
			msgs[i] = m
		}
		before := 40 * i
		for range 2 {
			if err := b.Publish(t.Context(), msgs...); err != nil {
				t.Fatal(err)
			}
		}
		all := stored(t, nc, "NOTES")
		if len(all) != before+40 {
			t.Errorf("stored %d, want %d", len(all)-before, 40)
		}
		for _, m := range all {
			if m.Header.Get("Nats-Msg-Id") != "" {
				t.Fatalf("a message has an id: %v", m.Header)
			}
		}
	}
}

// standIn answers in a stream's place, once for each message; nil is silence.
func standIn(t *testing.T, nc *nats.Conn, subject string, answer func(n int) []byte) (sent func() int) {
	t.Helper()
	var mu sync.Mutex
	n := 0
	sub, err := nc.Subscribe(subject, func(m *nats.Msg) {
		mu.Lock()
		defer mu.Unlock()
		n++
		if a := answer(n); a != nil {
			_ = m.Respond(a)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	return func() int { mu.Lock(); defer mu.Unlock(); return n }
}

// TestUnknownOutcome has the first publish refused in a way that says nothing: with ids it is tried again, without it fails.
func TestUnknownOutcome(t *testing.T) {
	t.Parallel()
	for _, allow := range []bool{false, true} {
		nc := postridertest.NATS(t)
		b := newBus(t, nc, func(c *bus.Config) { c.AllowDuplicates = allow })
		if err := noted.Publish(t.Context(), b, &note{}); err != nil { // the bus knows the stream now
			t.Fatal(err)
		}
		js := jetStream(t, nc)
		if err := js.DeleteStream(t.Context(), "NOTES"); err != nil {
			t.Fatal(err)
		}
		sent := standIn(t, nc, "notes.written.v1", func(n int) []byte {
			if n == 1 {
				return []byte(`{"error":{"code":503,"err_code":10008,"description":"system temporarily unavailable"}}`)
			}
			return []byte(`{"stream":"NOTES","seq":1}`)
		})
		err := noted.Publish(t.Context(), b, &note{})
		if allow && (!errors.Is(err, postrider.Unavailable) || sent() != 1) {
			t.Errorf("without ids: %v, sent %d times, want Unavailable after the first", err, sent())
		}
		if !allow && (err != nil || sent() != 2) {
			t.Errorf("with ids: %v, sent %d times, want 2", err, sent())
		}
	}
}

// TestAllowDuplicatesWaitsForTheServer retries without ids what was provably not sent.
func TestAllowDuplicatesWaitsForTheServer(t *testing.T) {
	t.Parallel()
	srv := postridertest.NewNATS(t)
	nc := srv.Connect()
	b := newBus(t, nc, func(c *bus.Config) { c.AllowDuplicates = true })
	srv.Stop()
	postridertest.Eventually(t, func() error {
		if nc.IsConnected() {
			return errors.New("still connected")
		}
		return nil
	})
	done := make(chan error, 1)
	go func() { done <- noted.Publish(t.Context(), b, &note{N: 1}) }()
	srv.Start()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := len(stored(t, nc, "NOTES")); n != 1 {
		t.Errorf("stored %d messages, want 1", n)
	}
}

func TestLargeCompactMessage(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc, func(c *bus.Config) { c.Mode = bus.Compact })
	err := noted.Publish(t.Context(), b, &note{Text: strings.Repeat("x", int(nc.MaxPayload()))})
	if !errors.Is(err, postrider.ResourceExhausted) || !strings.Contains(err.Error(), "max_payload") {
		t.Errorf("error is %v, want one that names max_payload", err)
	}
	m := &postrider.Message{ID: "1", Type: "notes.written.v1", Time: time.Now(), Data: make([]byte, nc.MaxPayload()-1024)}
	if err := b.Publish(t.Context(), m); err != nil {
		t.Error(err)
	}
}
