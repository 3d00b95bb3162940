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
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// stored returns what the stream holds.
func stored(t testing.TB, nc *nats.Conn, stream string) []*jetstream.RawStreamMsg {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	info, err := s.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var msgs []*jetstream.RawStreamMsg
	for seq := info.State.FirstSeq; seq <= info.State.LastSeq; seq++ {
		m, err := s.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		msgs = append(msgs, m)
	}
	return msgs
}

func TestPublishManyCallers(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	const callers, each = 32, 20
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			for i := range each {
				if err := noted.Publish(t.Context(), b, &note{N: c*each + i}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	msgs := stored(t, nc, "NOTES")
	last, ids := map[int]int{}, map[string]bool{}
	for _, m := range msgs {
		ids[m.Header.Get("ce-id")] = true
		var n int
		if _, err := fmt.Sscanf(string(m.Data), `{"n":%d`, &n); err != nil {
			t.Fatal(err)
		}
		if before, ok := last[n/each]; ok && n <= before {
			t.Errorf("caller %d: %d is stored after %d", n/each, n, before)
		}
		last[n/each] = n
	}
	if len(msgs) != callers*each || len(ids) != len(msgs) {
		t.Errorf("stored %d messages with %d ids, want %d", len(msgs), len(ids), callers*each)
	}
}

func TestPublishKeepsTheOrderOfACall(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	notes := make([]*note, 2500)
	for i := range notes {
		notes[i] = &note{N: i}
	}
	if err := noted.PublishAll(t.Context(), b, notes); err != nil {
		t.Fatal(err)
	}
	msgs := stored(t, nc, "NOTES")
	if len(msgs) != len(notes) {
		t.Fatalf("stored %d, want %d", len(msgs), len(notes))
	}
	for i, m := range msgs {
		if want := fmt.Sprintf(`{"n":%d}`, i); string(m.Data) != want {
			t.Fatalf("message %d is %s, want %s", i, m.Data, want)
		}
	}
}

func TestPublishDuplicatesInABatch(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	msgs := make([]*postrider.Message, 500) // enough for a batch on any disk
	for i := range msgs {
		msgs[i], _ = noted.Message(t.Context(), &note{N: i})
	}
	if err := b.Publish(t.Context(), msgs[3]); err != nil {
		t.Fatal(err)
	}
	// The server refuses a batch that holds an id it knows; the others must come through all the same.
	if err := b.Publish(t.Context(), msgs...); err != nil {
		t.Fatal(err)
	}
	if n := len(stored(t, nc, "NOTES")); n != 500 {
		t.Errorf("stored %d messages, want 500", n)
	}
}

func TestPublishToleratesBadNeighbours(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	good := func(n int) *postrider.Message {
		m, err := noted.Message(t.Context(), &note{N: n})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	big := good(2)
	big.Data = make([]byte, nc.MaxPayload()+1)
	lost := good(3)
	lost.Topic = "nowhere.v1"
	invalid := good(4)
	invalid.Type = ""
	wild := good(5)
	wild.Topic = "notes.*"
	err := b.Publish(t.Context(), good(1), big, lost, invalid, wild, good(6))
	var batch *postrider.BatchError
	if !errors.As(err, &batch) {
		t.Fatalf("error is %v, want a *BatchError", err)
	}
	for i, want := range []postrider.Code{
		postrider.OK, postrider.ResourceExhausted, postrider.FailedPrecondition, postrider.InvalidArgument,
		postrider.InvalidArgument, postrider.OK,
	} {
		if got := postrider.CodeOf(batch.Errs[i]); got != want {
			t.Errorf("message %d: %v (%v), want %v", i, got, batch.Errs[i], want)
		}
		if batch.Errs[i] != nil && postrider.Retryable(batch.Errs[i]) {
			t.Errorf("message %d: %v invites to retry what cannot succeed", i, batch.Errs[i])
		}
	}
	if n := len(stored(t, nc, "NOTES")); n != 2 {
		t.Errorf("stored %d messages, want the 2 good ones", n)
	}
	if !strings.Contains(batch.Errs[1].Error(), "max_payload") || !strings.Contains(batch.Errs[2].Error(), "Streams") {
		t.Errorf("the errors do not say what to do: %v; %v", batch.Errs[1], batch.Errs[2])
	}
}

func TestPublishWhileNATSIsDown(t *testing.T) {
	t.Parallel()
	srv := postridertest.NewNATS(t)
	nc := srv.Connect(nats.ReconnectWait(20*time.Millisecond), nats.MaxReconnects(-1))
	b := newBus(t, nc)
	if err := noted.Publish(t.Context(), b, &note{N: 1}); err != nil {
		t.Fatal(err)
	}
	srv.Stop()
	postridertest.Eventually(t, func() error {
		if nc.IsConnected() {
			return errors.New("the client has not noticed yet")
		}
		return nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := noted.Publish(ctx, b, &note{N: 2}); !errors.Is(err, postrider.Unavailable) {
		t.Errorf("error is %v, want Unavailable", err)
	}
	// A publish whose time is not up yet goes through once the server is back.
	done := make(chan error, 1)
	go func() { done <- noted.Publish(t.Context(), b, &note{N: 3}) }()
	srv.Start()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := len(stored(t, nc, "NOTES")); n != 2 {
		t.Errorf("stored %d messages, want 2", n)
	}
}

func TestDeclareStreams(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	var wg sync.WaitGroup
	for range 8 { // instances start together
		wg.Go(func() {
			b := newBus(t, nc)
			if err := noted.Publish(t.Context(), b, &note{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	more := newBus(t, nc, func(c *bus.Config) {
		c.Streams = []bus.Stream{{Name: "NOTES", Topics: []string{"drafts.>"}, MaxAge: time.Hour}}
	})
	if err := more.Publish(t.Context(), &postrider.Message{ID: "1", Type: "drafts.v1"}); err != nil {
		t.Fatal(err)
	}
	js, _ := jetstream.New(nc)
	s, err := js.Stream(t.Context(), "NOTES")
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	if len(cfg.Subjects) != 3 || cfg.MaxAge != time.Hour {
		t.Errorf("subjects %v, max age %v: want the added topic beside the old ones, and 1h", cfg.Subjects, cfg.MaxAge)
	}
	other := newBus(t, nc, func(c *bus.Config) {
		c.Streams = []bus.Stream{{Name: "OTHER", Topics: []string{"notes.>"}}}
	})
	err = noted.Publish(t.Context(), other, &note{})
	if err == nil || !strings.Contains(err.Error(), "OTHER") || !strings.Contains(err.Error(), "overlap") {
		t.Errorf("error is %v, want one that names the stream and the overlap", err)
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	for name, cfg := range map[string]bus.Config{
		"Source":             {},
		"Group":              {Source: "//a", Group: "a.b"},
		"Streams[0].Name":    {Source: "//a", Streams: []bus.Stream{{Name: "a b"}}},
		"Streams[0].Topics":  {Source: "//a", Streams: []bus.Stream{{Name: "A"}}},
		"DeadLetters.Name":   {Source: "//a", DeadLetters: bus.Stream{Name: "a.b"}},
		"DeadLetters.Topics": {Source: "//a", DeadLetters: bus.Stream{Topics: []string{"x"}}},
		"PublishTimeout":     {Source: "//a", PublishTimeout: -1},
		"Monitors[0]":        {Source: "//a", Monitors: []string{"nats-1:8222"}},
	} {
		if _, err := bus.New(nc, cfg); !errors.Is(err, postrider.InvalidArgument) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: error is %v, want InvalidArgument that names the field", name, err)
		}
	}
}
