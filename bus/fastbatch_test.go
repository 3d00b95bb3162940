package bus

import (
	"errors"
	"fmt"
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

// fastLane returns a lane that knows that single messages are cheap, to a stream of the test's own, and what that has stored.
func fastLane(t *testing.T, cfg jetstream.StreamConfig) (l *lane, nc *nats.Conn, stored func() []string) {
	t.Helper()
	nc = postridertest.NewNATS(t).Connect(nats.ReconnectWait(10 * time.Millisecond))
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Name, cfg.Subjects = "S", []string{"s"}
	stream, err := js.CreateStream(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	l = newLane(newPublisher(nc, js), jetstream.StreamConfig{AllowBatchPublish: true})
	l.pace.single.Store(1)
	return l, nc, func() []string {
		info, err := stream.Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var data []string
		for seq := info.State.FirstSeq; seq <= info.State.LastSeq; seq++ {
			m, err := stream.GetMsg(t.Context(), seq)
			if err != nil {
				t.Fatal(err)
			}
			data = append(data, string(m.Data))
		}
		return data
	}
}

func numbered(n int) []*entry {
	entries := make([]*entry, n)
	for i := range entries {
		entries[i] = &entry{msg: &nats.Msg{Subject: "s", Data: []byte(strconv.Itoa(i)), Header: nats.Header{headerMsgID: {strconv.Itoa(i)}}}}
	}
	return entries
}

// upTo is what a stream has that stored n numbered messages but for some.
func upTo(n int, but ...int) []string {
	var want []string
	for i := range n {
		if len(but) > 0 && but[0] == i {
			but = but[1:]
			continue
		}
		want = append(want, strconv.Itoa(i))
	}
	return want
}

func sameStrings(t *testing.T, got, want []string) {
	t.Helper()
	if g, w := strings.Join(got, " "), strings.Join(want, " "); g != w {
		t.Errorf("stored %q, want %q", g, w)
	}
}

func TestFastBatch(t *testing.T) {
	t.Parallel()
	for _, n := range []int{minBatch, fastWindow/2 - 1, fastWindow / 2, fastWindow, 2*fastWindow + 1} {
		l, _, stored := fastLane(t, jetstream.StreamConfig{AllowBatchPublish: true})
		if err := errors.Join(l.publish(t.Context(), numbered(n))...); err != nil {
			t.Error(err)
		}
		sameStrings(t, stored(), upTo(n))
		if fast := l.pace.stored.Load(); fast != int64(n) {
			t.Errorf("%d of %d went in a fast batch", fast, n)
		}
	}
}

// TestFastBatchWithDuplicates has the stream know some of the messages, the first and the last among them.
func TestFastBatchWithDuplicates(t *testing.T) {
	t.Parallel()
	for _, known := range [][]int{{0}, {9}, {3, 4}, {0, 9}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}} {
		l, _, stored := fastLane(t, jetstream.StreamConfig{AllowBatchPublish: true})
		var want []string
		for _, i := range known {
			if err := l.one(t.Context(), numbered(10)[i]); err != nil {
				t.Fatal(err)
			}
			want = append(want, strconv.Itoa(i))
		}
		if err := errors.Join(l.publish(t.Context(), numbered(10))...); err != nil {
			t.Errorf("%v were known: %v", known, err)
		}
		sameStrings(t, stored(), append(want, upTo(10, known...)...))
	}
}

// TestFastBatchWithBadMessages has the server refuse some of the messages for good.
func TestFastBatchWithBadMessages(t *testing.T) {
	t.Parallel()
	for _, bad := range [][]int{{0}, {9}, {4}, {0, 1}, {3, 5, 9}} {
		l, _, stored := fastLane(t, jetstream.StreamConfig{AllowBatchPublish: true})
		entries := numbered(10)
		for _, i := range bad {
			entries[i].msg.Header["Nats-TTL"] = []string{"1h"} // the stream does not take it
		}
		left := bad
		for i, err := range l.publish(t.Context(), entries) {
			want := postrider.OK
			if len(left) > 0 && left[0] == i {
				want, left = postrider.FailedPrecondition, left[1:]
			}
			if postrider.CodeOf(err) != want {
				t.Errorf("%v are bad: message %d: %v", bad, i, err)
			}
		}
		sameStrings(t, stored(), upTo(10, bad...))
	}
}

// TestFastBatchIntoAFullStream has room for some of the messages.
func TestFastBatchIntoAFullStream(t *testing.T) {
	t.Parallel()
	l, _, stored := fastLane(t, jetstream.StreamConfig{AllowBatchPublish: true, MaxMsgs: 7, Discard: jetstream.DiscardNew})
	for i, err := range l.publish(t.Context(), numbered(1500)) {
		if (i < 7) != (err == nil) || err != nil && !errors.Is(err, postrider.ResourceExhausted) {
			t.Fatalf("message %d: %v", i, err)
		}
	}
	sameStrings(t, stored(), upTo(7))
}

// TestFastBatchThatTheStreamDoesNotTake has the stream changed since the lane was made.
func TestFastBatchThatTheStreamDoesNotTake(t *testing.T) {
	t.Parallel()
	l, _, stored := fastLane(t, jetstream.StreamConfig{})
	if err := errors.Join(l.publish(t.Context(), numbered(10))...); err != nil {
		t.Error(err)
	}
	sameStrings(t, stored(), upTo(10))
}

// TestFastBatchWithoutAStream wants an error that says that nothing was stored.
func TestFastBatchWithoutAStream(t *testing.T) {
	t.Parallel()
	l, _, _ := fastLane(t, jetstream.StreamConfig{})
	if err := l.pub.js.DeleteStream(t.Context(), "S"); err != nil {
		t.Fatal(err)
	}
	for i, err := range l.publish(t.Context(), numbered(10)) {
		if !errors.Is(err, postrider.Unavailable) || !notStored(err) {
			t.Errorf("message %d: %v", i, err)
		}
	}
}

// TestFastBatchThatEndsEarly has a stand-in for a stream end the batch in several ways: what is known to be stored is a
// success, and nothing overtakes a message whose failure passes.
func TestFastBatchThatEndsEarly(t *testing.T) {
	t.Parallel()
	const ack = `{"stream":"S","seq":3,"batch":"x","count":%d}`
	for name, tt := range map[string]struct {
		answers []string // to the third message
		stored  int      // that have no error
		unsure  bool     // the others may have been stored
		again   int      // that go out singly
	}{
		"an error that passes": {
			[]string{`{"type":"err","seq":3,"error":{"code":503,"err_code":10008,"description":"later"}}`, fmt.Sprintf(ack, 2)}, 2, false, 0,
		},
		"a gap": {[]string{`{"type":"gap","last_seq":3,"seq":4}`, fmt.Sprintf(ack, 2)}, 10, false, 8},
		"the batch is not known": {
			[]string{`{"type":"ack","seq":1,"msgs":1}`, `{"error":{"code":400,"err_code":10208,"description":"batch publish ID unknown"},"stream":"S"}`}, 1, true, 0,
		},
		"the connection is lost": {[]string{`{"type":"ack","seq":2,"msgs":1}`, "lost"}, 2, true, 0},
	} {
		nc := postridertest.NATS(t)
		js, err := jetstream.New(nc)
		if err != nil {
			t.Fatal(err)
		}
		l := newLane(newPublisher(nc, js), jetstream.StreamConfig{AllowBatchPublish: true})
		l.pace.single.Store(1)
		var mu sync.Mutex
		count, singles := 0, 0
		sub, err := nc.Subscribe("s", func(m *nats.Msg) {
			mu.Lock()
			defer mu.Unlock()
			if !strings.HasSuffix(m.Reply, "$FI") {
				singles++
				_ = m.Respond([]byte(`{"stream":"S","seq":1}`))
			} else if count++; count == 3 {
				for _, a := range tt.answers {
					if a == "lost" {
						postridertest.Eventually(t, func() error { // the answer before it counts
							if l.pace.stored.Load() < 2 {
								return errors.New("it is not there yet")
							}
							return nil
						})
						_ = nc.ForceReconnect()
					} else {
						_ = m.Respond([]byte(a))
					}
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = sub.Unsubscribe() })
		for i, err := range l.publish(t.Context(), numbered(10)) {
			if (i < tt.stored) != (err == nil) {
				t.Errorf("%s: message %d: %v", name, i, err)
			}
			if err != nil && !postrider.Retryable(err) || i == tt.stored && tt.unsure == notStored(err) && tt.unsure {
				t.Errorf("%s: message %d: %v", name, i, err)
			}
		}
		mu.Lock()
		if singles != tt.again {
			t.Errorf("%s: %d went out singly, want %d", name, singles, tt.again)
		}
		mu.Unlock()
	}
}

// TestPublishAllWhileConnectionsBreak publishes in fast batches while the connection breaks again and again: everything is
// stored once, and in its order.
func TestPublishAllWhileConnectionsBreak(t *testing.T) {
	t.Parallel()
	l, nc, stored := fastLane(t, jetstream.StreamConfig{AllowBatchPublish: true})
	b, err := New(nc, Config{Source: "//test", PublishTimeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	b.pub.lanes["S"] = l
	l.pub = b.pub
	stop := breakConnection(nc)
	const calls, each = 4, 500
	for c := range calls {
		msgs := make([]*postrider.Message, each)
		for i := range msgs {
			n := strconv.Itoa(c*each + i)
			msgs[i] = &postrider.Message{ID: n, Type: "s", Data: []byte(n)}
			_ = msgs[i].SetExtension(postrider.ExtPartitionKey, "k")
		}
		if err := b.Publish(t.Context(), msgs...); err != nil {
			t.Error(err)
		}
	}
	stop()
	sameStrings(t, stored(), upTo(calls*each))
}

// breakConnection breaks a connection ten times, or until stop is called.
func breakConnection(nc *nats.Conn) (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 10 {
			select {
			case <-done:
				return
			case <-time.After(20 * time.Millisecond):
				_ = nc.ForceReconnect()
			}
		}
	})
	return func() {
		close(done)
		wg.Wait()
	}
}
