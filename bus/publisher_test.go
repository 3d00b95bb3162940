package bus

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

// TestSingleKeepsTheOrderOfAKey has a stand-in for a stream refuse one message for a moment: nothing of its key may be
// stored before it is, and other keys go on.
func TestSingleKeepsTheOrderOfAKey(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var arrived []string
	sub, err := nc.Subscribe("stand.in", func(m *nats.Msg) {
		mu.Lock()
		defer mu.Unlock()
		arrived = append(arrived, string(m.Data))
		ack := `{"stream":"S","seq":1}`
		if len(arrived) == 1 {
			ack = `{"error":{"code":503,"err_code":10008,"description":"system temporarily unavailable"}}`
		}
		_ = m.Respond([]byte(ack))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })

	var entries []*entry
	for _, name := range []string{"a1", "a2", "b1", "b2", "-1", "-2"} {
		e := &entry{msg: &nats.Msg{Subject: "stand.in", Data: []byte(name)}, key: strings.Trim(name, "-12")}
		entries = append(entries, e)
	}
	l := &lane{pub: newPublisher(nc, js)}
	errs := l.publish(t.Context(), entries)
	mu.Lock()
	got := strings.Join(arrived, " ")
	mu.Unlock()
	if got != "a1 b1 b2 -1 -2" {
		t.Errorf("sent %q: want all but a2, which must wait for a1", got)
	}
	for i, e := range entries {
		if failed := i < 2; failed != postrider.Retryable(errs[i]) {
			t.Errorf("%s: %v", e.msg.Data, errs[i])
		}
	}
}

// TestPublishHonoursItsContext has a stand-in for a stream that never answers.
func TestPublishHonoursItsContext(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	sub, err := nc.SubscribeSync("silent")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	l := &lane{pub: newPublisher(nc, js)}
	err = l.publish(ctx, []*entry{{msg: &nats.Msg{Subject: "silent"}}})[0]
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, postrider.DeadlineExceeded) {
		t.Errorf("error is %v, want that of the context", err)
	}
	nc.Close() // ends the wait that goes on behind
}
