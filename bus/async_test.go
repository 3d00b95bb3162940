package bus

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

// results collects what an Async reports.
type results struct {
	mu   sync.Mutex
	ids  []string
	errs map[string]error
}

func (r *results) add(m *postrider.Message, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.errs == nil {
		r.errs = map[string]error{}
	}
	r.ids = append(r.ids, m.ID)
	r.errs[m.ID] = err
}

func (r *results) of(id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.errs[id]
}

// number makes a message with the number as its id and data.
func number(n int, key string) *postrider.Message {
	id := strconv.Itoa(n)
	m := &postrider.Message{ID: id, Type: "s", Data: []byte(id)}
	if err := m.SetExtension(postrider.ExtPartitionKey, key); err != nil {
		panic(err)
	}
	return m
}

func TestAsyncReportsEachMessage(t *testing.T) {
	t.Parallel()
	_, nc, stored := fastLane(t, jetstream.StreamConfig{AllowBatchPublish: true, AllowAtomicPublish: true})
	b, err := New(nc, Config{Source: "//test"})
	if err != nil {
		t.Fatal(err)
	}
	var got results
	a := b.Async(100, got.add)
	const n = 3000
	for i := range n {
		m := number(i, "")
		switch i {
		case 10:
			m.Topic = "nowhere"
		case 20:
			m.Data = make([]byte, nc.MaxPayload())
		}
		if err := a.Publish(t.Context(), m); (err != nil) != (i == 20) {
			t.Errorf("message %d: %v", i, err)
		}
	}
	if err := a.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	sameStrings(t, stored(), upTo(n, 10, 20))
	sameStrings(t, got.ids, upTo(n, 20)) // it was not taken
	for id, err := range got.errs {
		if (err != nil) != (id == "10") || err != nil && !errors.Is(err, postrider.FailedPrecondition) {
			t.Errorf("message %s: %v", id, err)
		}
	}
}

func TestAsyncWaitsForRoom(t *testing.T) {
	t.Parallel()
	_, nc, stored := fastLane(t, jetstream.StreamConfig{})
	b, err := New(nc, Config{Source: "//test"})
	if err != nil {
		t.Fatal(err)
	}
	hold := make(chan struct{})
	a := b.Async(3, func(*postrider.Message, error) { <-hold })
	for i := range 3 {
		if err := a.Publish(t.Context(), number(i, "")); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err = a.Publish(ctx, number(99, ""), number(100, ""))
	var batch *postrider.BatchError
	if !errors.As(err, &batch) || !errors.Is(batch.Errs[0], context.DeadlineExceeded) || !notStored(batch.Errs[1]) {
		t.Errorf("a full window: %v", err)
	}
	if err := a.Flush(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Flush of messages without results: %v", err)
	}
	go close(hold)
	if err := a.Publish(t.Context(), number(3, "")); err != nil {
		t.Error(err)
	}
	if err := a.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	sameStrings(t, stored(), upTo(4))
}

// TestAsyncWaitsForRoomForBytes has messages that are few and large.
func TestAsyncWaitsForRoomForBytes(t *testing.T) {
	t.Parallel()
	_, nc, _ := fastLane(t, jetstream.StreamConfig{})
	b, err := New(nc, Config{Source: "//test"})
	if err != nil {
		t.Fatal(err)
	}
	hold := make(chan struct{})
	a := b.Async(0, func(*postrider.Message, error) { <-hold })
	data := make([]byte, nc.MaxPayload()-1000)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	n := 0
	for err == nil && n < 200 {
		m := number(n, "")
		m.Data = data
		if n == maxWindowBytes/len(data) {
			cancel() // there is no more room
		}
		if err = a.Publish(ctx, m); err == nil {
			n++
		}
	}
	if n != maxWindowBytes/len(data) {
		t.Errorf("took %d messages of %d bytes, and then: %v", n, len(data), err)
	}
	close(hold)
	if err := a.Flush(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestAsyncKeepsTheOrderOfAKey has a stand-in for a stream refuse a message for as long as the bus tries: what waits behind it
// with the same key fails, what has another key does not, and neither does what is published afterwards.
func TestAsyncKeepsTheOrderOfAKey(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b, err := New(nc, Config{Source: "//test", PublishTimeout: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	b.declared.Store(true)
	b.pub.known["s"] = newLane(b.pub, jetstream.StreamConfig{})
	var mu sync.Mutex
	var arrived []string
	refuse, began := true, make(chan struct{}, 100)
	sub, err := nc.Subscribe("s", func(m *nats.Msg) {
		mu.Lock()
		defer mu.Unlock()
		if string(m.Data) == "0" && refuse {
			_ = m.Respond([]byte(`{"error":{"code":503,"err_code":10008,"description":"system temporarily unavailable"}}`))
			began <- struct{}{}
			return
		}
		arrived = append(arrived, string(m.Data))
		_ = m.Respond([]byte(`{"stream":"S","seq":1}`))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	var got results
	a := b.Async(0, got.add)
	if err := a.Publish(t.Context(), number(0, "k")); err != nil {
		t.Fatal(err)
	}
	<-began // and what follows waits
	if err := a.Publish(t.Context(), number(1, "k"), number(2, "other"), number(3, "k")); err != nil {
		t.Fatal(err)
	}
	if err := a.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	for id, failed := range map[string]bool{"0": true, "1": true, "2": false, "3": true} {
		if err := got.of(id); failed != (err != nil) || failed && !postrider.Retryable(err) {
			t.Errorf("message %s: %v", id, err)
		}
	}
	mu.Lock()
	refuse = false
	mu.Unlock()
	if err := a.Publish(t.Context(), number(0, "k"), number(1, "k")); err != nil {
		t.Fatal(err)
	}
	if err := a.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	sameStrings(t, arrived, []string{"2", "0", "1"})
}

func TestAsyncFlushTellsFailures(t *testing.T) {
	t.Parallel()
	_, nc, _ := fastLane(t, jetstream.StreamConfig{})
	b, err := New(nc, Config{Source: "//test"})
	if err != nil {
		t.Fatal(err)
	}
	a := b.Async(0, nil)
	for i := range maxUnseen + 2 {
		m := number(i, "")
		m.Topic = "nowhere"
		if err := a.Publish(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	err = a.Flush(t.Context())
	if !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), "s 0: ") || !strings.Contains(err.Error(), "2 messages more") {
		t.Errorf("Flush says %v", err)
	}
	if err := a.Flush(t.Context()); err != nil {
		t.Errorf("the second Flush says %v", err)
	}
	if len(b.asyncs) > 0 {
		t.Error("the bus keeps an Async that has nothing to do")
	}
}

// TestRunFinishesAsync ends Run while messages are on their way: all of them are stored, and it tells of what failed.
func TestRunFinishesAsync(t *testing.T) {
	t.Parallel()
	_, nc, stored := fastLane(t, jetstream.StreamConfig{AllowBatchPublish: true})
	b, err := New(nc, Config{Source: "//test"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- b.Run(ctx) }()
	<-b.Started()
	a, idle := b.Async(0, nil), b.Async(0, nil)
	lost := number(0, "")
	lost.Topic = "nowhere"
	if err := idle.Publish(t.Context(), lost); err != nil {
		t.Fatal(err)
	}
	for i := range 3000 {
		if err := a.Publish(t.Context(), number(i, "")); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-ended; !errors.Is(err, postrider.FailedPrecondition) || strings.Count(err.Error(), "\n") > 0 {
		t.Errorf("Run says %v, want the one failure", err)
	}
	sameStrings(t, stored(), upTo(3000))
}

// TestAsyncWhileConnectionsBreak publishes while the connection breaks again and again: everything is stored once, and in its
// order.
func TestAsyncWhileConnectionsBreak(t *testing.T) {
	t.Parallel()
	_, nc, stored := fastLane(t, jetstream.StreamConfig{AllowBatchPublish: true, AllowAtomicPublish: true})
	b, err := New(nc, Config{Source: "//test", PublishTimeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	stop := breakConnection(nc)
	a := b.Async(0, nil)
	for i := range 2000 {
		if err := a.Publish(t.Context(), number(i, "k")); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	stop()
	sameStrings(t, stored(), upTo(2000))
}

// TestAsyncOfAClosedConnection closes the connection under messages: each has its result, and those without an error are stored.
func TestAsyncOfAClosedConnection(t *testing.T) {
	t.Parallel()
	_, other, stored := fastLane(t, jetstream.StreamConfig{AllowBatchPublish: true})
	nc, err := nats.Connect(other.ConnectedUrl())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	b, err := New(nc, Config{Source: "//test"})
	if err != nil {
		t.Fatal(err)
	}
	var got results
	a := b.Async(0, func(m *postrider.Message, err error) {
		if got.add(m, err); m.ID == "1000" {
			nc.Close()
		}
	})
	const n = 5000
	for i := range n {
		if err := a.Publish(t.Context(), number(i, "")); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	has := map[string]bool{}
	for _, id := range stored() {
		has[id] = true
	}
	if len(got.ids) != n {
		t.Errorf("%d results for %d messages", len(got.ids), n)
	}
	for id, err := range got.errs {
		if err == nil && !has[id] {
			t.Errorf("message %s has no error and is not stored", id)
		}
	}
	if err := got.of("0"); err != nil {
		t.Errorf("the first message: %v", err)
	}
	if got.of("4999") == nil {
		t.Error("the last message was published over a connection that was closed")
	}
}
