package bus

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

// TestBurstSendsForAll has many callers whose messages go out in bursts, each of which gets the answer to its own.
func TestBurstSendsForAll(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	refusal := []byte(`{"error":{"code":400,"err_code":10054,"description":"message size exceeds maximum allowed"}}`)
	sub, err := nc.Subscribe("stand.in", func(m *nats.Msg) {
		if n, _ := strconv.Atoi(string(m.Data)); n%3 == 0 {
			_ = m.Respond(refusal)
			return
		}
		_ = m.Respond([]byte(`{"stream":"S","seq":1}`))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	pub := newPublisher(nc, js)
	l := newLane(pub, jetstream.StreamConfig{})
	var wg sync.WaitGroup
	for n := range 64 {
		wg.Go(func() {
			for range 20 {
				e := &entry{msg: &nats.Msg{Subject: "stand.in", Data: strconv.AppendInt(nil, int64(n), 10)}}
				if err := l.one(t.Context(), e); (n%3 == 0) != errors.Is(err, postrider.ResourceExhausted) || (err == nil) != (n%3 != 0) {
					t.Errorf("message %d: %v", n, err)
				}
			}
		})
	}
	wg.Wait()
	if flying := l.pace.singles.Load(); flying != 0 || len(pub.burst.queue) != 0 {
		t.Errorf("%d messages count as on their way, %d wait to be sent", flying, len(pub.burst.queue))
	}
}

// TestBurstLetsGo has a caller give up before anybody has sent its message, which must not be sent any more then: its data
// are the caller's again.
func TestBurstLetsGo(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	pub := newPublisher(nc, js)
	l := newLane(pub, jetstream.StreamConfig{})
	first := pub.acks.add(l.pace.begin(0, shareOfMany), nil)
	first.msg = &nats.Msg{Subject: "stand.in"}
	pub.burst.queue = append(pub.burst.queue, first) // as if its caller had let others run
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := l.one(ctx, &entry{msg: &nats.Msg{Subject: "stand.in"}}); !errors.Is(err, postrider.DeadlineExceeded) {
		t.Errorf("error is %v, want that of the context", err)
	}
	if left := pub.burst.queue; len(left) != 1 || left[0] != first {
		t.Errorf("%d messages wait to be sent, want one", len(left))
	}
}
