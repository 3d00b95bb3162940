package bus

import (
	"context"
	"errors"
	"maps"
	"slices"
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
	l := newLane(newPublisher(nc, js), jetstream.StreamConfig{})
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
	pub := newPublisher(nc, js)
	l, grouping := newLane(pub, jetstream.StreamConfig{AllowBatchPublish: true}), newLane(pub, jetstream.StreamConfig{AllowAtomicPublish: true})
	silent := func() *entry { return &entry{msg: &nats.Msg{Subject: "silent"}} }
	for name, publish := range map[string]func() error{
		"alone":           func() error { return l.one(ctx, silent()) },
		"singly":          func() error { return l.publish(ctx, []*entry{silent()})[0] },
		"in a fast batch": func() error { return l.publish(ctx, []*entry{silent(), silent(), silent(), silent()})[3] },
		"in a group":      func() error { return grouping.join(ctx, []*entry{silent()}) },
	} {
		if err := publish(); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, postrider.DeadlineExceeded) {
			t.Errorf("%s: error is %v, want that of the context", name, err)
		}
	}
	if n := l.pace.singles.Load(); n != 0 {
		t.Errorf("%d messages count as on their way", n)
	}
	nc.Close() // ends the wait that goes on behind
}

// TestBatchOfUnknownOutcome has the acknowledgement of an atomic batch time out: messages with ids are sent again one by one,
// messages without are not, since the server would store them twice.
func TestBatchOfUnknownOutcome(t *testing.T) {
	t.Parallel()
	for name, header := range map[string]nats.Header{"with ids": {headerMsgID: {"1"}}, "without": {}} {
		nc := postridertest.NATS(t)
		js, err := jetstream.New(nc)
		if err != nil {
			t.Fatal(err)
		}
		pub := newPublisher(nc, js)
		var mu sync.Mutex
		singles := 0
		sub, err := nc.Subscribe("stand.in", func(m *nats.Msg) {
			if m.Header.Get(headerBatchID) == "" {
				mu.Lock()
				defer mu.Unlock()
				singles++
				_ = m.Respond([]byte(`{"stream":"S","seq":1}`))
			} else if m.Header.Get(headerBatchCommit) != "" {
				id, _ := strconv.ParseUint(strings.TrimPrefix(m.Reply, pub.acks.prefix), 10, 64)
				pub.acks.mu.Lock()
				w := pub.acks.waiters[id]
				pub.acks.mu.Unlock()
				w.resolve(&postrider.Error{Code: postrider.DeadlineExceeded, Msg: "no acknowledgement"})
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = sub.Unsubscribe() })
		entries := make([]*entry, minBatch)
		for i := range entries {
			entries[i] = &entry{msg: &nats.Msg{Subject: "stand.in", Header: maps.Clone(header)}}
		}
		l := dear(newLane(pub, jetstream.StreamConfig{AllowAtomicPublish: true}))
		errs := l.publish(t.Context(), entries)
		mu.Lock()
		sent := singles
		mu.Unlock()
		if unsure := errors.Is(errs[0], postrider.DeadlineExceeded); len(header) == 0 && (!unsure || sent > 0) || len(header) > 0 && (errs[0] != nil || sent != minBatch) {
			t.Errorf("%s: %v, %d were sent again", name, errs[0], sent)
		}
	}
}

// dear has a lane believe that nothing but atomic batches pays.
func dear(l *lane) *lane {
	l.pace.single.Store(int64(time.Hour))
	l.probed = time.Now().Add(time.Hour)
	return l
}

// TestBatchesOnARealServer has a lane that believes in batches.
func TestBatchesOnARealServer(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}, AllowAtomicPublish: true})
	if err != nil {
		t.Fatal(err)
	}
	entries := make([]*entry, 2*maxGroup+500)
	for i := range entries {
		entries[i] = &entry{msg: &nats.Msg{Subject: "s", Data: []byte(strconv.Itoa(i))}}
	}
	l := dear(newLane(newPublisher(nc, js), jetstream.StreamConfig{AllowAtomicPublish: true}))
	if err := errors.Join(l.publish(t.Context(), entries)...); err != nil {
		t.Fatal(err)
	}
	batches := map[string]bool{}
	for i := range entries {
		m, err := stream.GetMsg(t.Context(), uint64(i)+1)
		if err != nil {
			t.Fatal(err)
		}
		if string(m.Data) != strconv.Itoa(i) {
			t.Fatalf("message %d is %s", i, m.Data)
		}
		batches[m.Header.Get(headerBatchID)] = true
	}
	if len(batches) != 3 || batches[""] {
		t.Errorf("went out in the batches %v, want three", batches)
	}
}

// TestGroupsOfManyCallers has callers who publish one message at a time, some of which the server refuses: groups go out while
// they form, and nobody suffers for another.
func TestGroupsOfManyCallers(t *testing.T) {
	t.Parallel()
	cheap, _, stored := fastLane(t, jetstream.StreamConfig{AllowAtomicPublish: true})
	l := dear(newLane(cheap.pub, jetstream.StreamConfig{AllowAtomicPublish: true}))
	l.pace.batch.Store(1)
	const callers, each = 32, 30
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			for i := range each {
				n := strconv.Itoa(c*each + i)
				e := &entry{msg: &nats.Msg{Subject: "s", Data: []byte(n), Header: nats.Header{headerMsgID: {n}}}}
				bad := c == 7 && i%10 == 5
				if bad {
					e.msg.Header["Nats-TTL"] = []string{"1h"} // the stream does not take it
				}
				if _ = l.join(t.Context(), []*entry{e}); (e.err != nil) != bad {
					t.Errorf("message %s: %v", n, e.err)
				}
			}
		})
	}
	wg.Wait()
	last, count := map[int]int{}, 0
	for _, data := range stored() {
		n, err := strconv.Atoi(data)
		if err != nil {
			t.Fatal(err)
		}
		if before, ok := last[n/each]; ok && n <= before {
			t.Errorf("caller %d: %d is stored after %d", n/each, n, before)
		}
		last[n/each] = n
		count++
	}
	if count != callers*each-3 {
		t.Errorf("stored %d messages, want all but the 3 bad ones of %d", count, callers*each)
	}
	if l.pace.batches.Load() == 0 {
		t.Error("nothing went out as a batch")
	}
}

// TestLateAcknowledgementIsNobodyElses has a stand-in for a stream answer a message after its caller has given up: the next message
// waits under another subject. One that was answered in time is used again.
func TestLateAcknowledgementIsNobodyElses(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	sub, err := nc.SubscribeSync("stand.in")
	if err != nil {
		t.Fatal(err)
	}
	l := newLane(newPublisher(nc, js), jetstream.StreamConfig{})
	var replies []string
	publish := func(ctx context.Context) (result chan error, m *nats.Msg) {
		t.Helper()
		result = make(chan error, 1)
		go func() { result <- l.one(ctx, &entry{msg: &nats.Msg{Subject: "stand.in"}}) }()
		m, err := sub.NextMsg(time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		return result, m
	}
	ctx, cancel := context.WithCancel(t.Context())
	result, late := publish(ctx)
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("the caller who gave up gets %v", err)
	}
	result, second := publish(t.Context())
	const refusal = `{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 1"},"stream":"S","seq":0}`
	for _, answer := range []struct {
		to   *nats.Msg
		data string
	}{{late, `{"stream":"S","seq":1}`}, {second, "thank you"}, {second, `{"error":"none"}`}, {second, `{}`}, {second, refusal}} {
		if err := answer.to.Respond([]byte(answer.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-result; !errors.Is(err, postrider.Aborted) {
		t.Errorf("the second message: %v, want the stream's own answer", err)
	}
	for range 2 { // the second one after an acknowledgement
		var m *nats.Msg
		result, m = publish(t.Context())
		if err := m.Respond([]byte(`{"stream":"S","seq":3}`)); err != nil {
			t.Fatal(err)
		}
		if err := <-result; err != nil {
			t.Error(err)
		}
		replies = append(replies, m.Reply)
	}
	if replies = append(replies, late.Reply, second.Reply); replies[0] != replies[1] || len(slices.Compact(slices.Sorted(slices.Values(replies)))) != 3 {
		t.Errorf("the messages wait under %v: want a new subject unless a stream has acknowledged", replies)
	}
}

// TestLargeMessagesAreNotTakenForSynced: what the bytes take must not look like a sync.
func TestLargeMessagesAreNotTakenForSynced(t *testing.T) {
	t.Parallel()
	const ahead, each = 15, 75 * time.Microsecond
	for bytes, cheap := range map[int]bool{16 << 10: true, 128: false} {
		p := &pace{}
		found := false
		for range 1000 { // a pause of this process makes one too dear
			p.singles.Add(1)
			trip{pace: p, began: time.Now().Add(-ahead * each), ahead: ahead, bytes: bytes, share: shareOfFew}.end()
			found = found || p.isCheap()
		}
		if found != cheap {
			t.Errorf("%d bytes in %v each: cheap is %v (%v without the bytes)", bytes, each, found, time.Duration(p.single.Load()))
		}
	}
}

// TestSlowFirstMessageDoesNotHideSyncs: the first message of all may take longer than many later ones together, which must not
// look as if they took nothing.
func TestSlowFirstMessageDoesNotHideSyncs(t *testing.T) {
	t.Parallel()
	const ahead, each = 15, 250 * time.Microsecond
	p := &pace{}
	p.singles.Add(1)
	trip{pace: p, began: time.Now().Add(-time.Second), share: shareOfMany}.end()
	for range probeSize {
		p.singles.Add(1)
		trip{pace: p, began: time.Now().Add(-ahead * each), ahead: ahead, share: shareOfFew}.end()
		if p.isCheap() {
			t.Fatalf("%v each passes for %v", each, time.Duration(p.single.Load()))
		}
	}
}
