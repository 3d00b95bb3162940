package bustest

import (
	"context"
	"errors"
	"iter"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/postrider/postrider"
)

// async returns a publisher that does not wait, or skips the promise.
func (e *env) async(b Bus, window int, result func(m *postrider.Message, err error)) Async {
	e.Helper()
	if e.Async == nil {
		e.Skip("this implementation has no Async")
	}
	return e.Async(b, window, result)
}

func asyncTellsEachMessagesFate(e *env) {
	const messages, homeless, refused = 500, 10, 20
	b := e.open()
	var j journal
	e.must(b.Subscribe(j.handler(), all))
	var mu sync.Mutex
	var told []string
	var failed error
	a := e.async(b, 50, func(m *postrider.Message, err error) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, m.ID)
		if (err != nil) != (m.ID == strconv.Itoa(homeless)) {
			e.Errorf("message %s: %v", m.ID, err)
		}
		failed = errors.Join(failed, err)
	})
	var want []string
	for n := range messages {
		id := strconv.Itoa(n)
		m, err := written.Message(e.Context(), &note{N: n}, postrider.MessageID(id))
		e.must(err)
		switch n {
		case homeless:
			m.Topic = "nowhere.at.all"
		case refused:
			m.ID = "control\n"
		}
		if err := a.Publish(e.Context(), m); errors.Is(err, postrider.InvalidArgument) != (n == refused) || err != nil && n != refused {
			e.Errorf("message %d: %v", n, err)
		}
		if n != refused {
			want = append(want, id)
		}
	}
	e.must(a.Flush(e.Context()))
	mu.Lock()
	if !slices.Equal(told, want) {
		e.Errorf("the callback was told of %v, want all that were taken, in their order", told)
	}
	if !errors.Is(failed, postrider.FailedPrecondition) {
		e.Errorf("a message that no stream takes: %v", failed)
	}
	mu.Unlock()
	e.run(b)
	j.once(e, messages-2)
}

func asyncWaitsForRoom(e *env) {
	b := e.open()
	var j journal
	e.must(b.Subscribe(j.handler(), all))
	hold := make(chan struct{})
	a := e.async(b, 3, func(*postrider.Message, error) { <-hold })
	for _, n := range numbered(0, 3) {
		e.must(written.Publish(e.Context(), a, n))
	}
	ctx, cancel := context.WithTimeout(e.Context(), 50*time.Millisecond)
	defer cancel()
	var batch *postrider.BatchError
	err := written.PublishAll(ctx, a, numbered(90, 2))
	if !errors.As(err, &batch) || !errors.Is(batch.Errs[0], context.DeadlineExceeded) || !errors.Is(batch.Errs[1], postrider.DeadlineExceeded) {
		e.Errorf("a full window: %v", err)
	}
	if err := a.Flush(ctx); !errors.Is(err, context.DeadlineExceeded) {
		e.Errorf("a flush of messages without results: %v", err)
	}
	close(hold)
	e.must(written.Publish(e.Context(), a, &note{N: 3}))
	e.must(a.Flush(e.Context()))
	e.run(b)
	j.once(e, 4)
}

func asyncFailuresAreTold(e *env) {
	b := e.open()
	a := e.async(b, 0, nil)
	homeless := func() *postrider.Message {
		m, err := written.Message(e.Context(), &note{})
		e.must(err)
		m.Topic = "nowhere.at.all"
		return m
	}
	e.must(a.Publish(e.Context(), homeless()))
	if err := a.Flush(e.Context()); !errors.Is(err, postrider.FailedPrecondition) {
		e.Errorf("the flush after a failure: %v", err)
	}
	if err := a.Flush(e.Context()); err != nil {
		e.Errorf("the next flush: %v", err)
	}
	ctx, cancel := context.WithCancel(e.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	<-b.Started()
	e.must(a.Publish(e.Context(), homeless()))
	cancel()
	if err := <-done; !errors.Is(err, postrider.FailedPrecondition) {
		e.Errorf("Run ends with %v, want the failure that nobody has seen", err)
	}
}

func streamIsRead(e *env) {
	b := e.open()
	r, ok := b.(interface {
		Read(ctx context.Context, stream string, since time.Time) iter.Seq2[*postrider.Message, error]
	})
	if !ok {
		e.Skip("this implementation has no Read")
	}
	read := func(since time.Time) (ns []int, last time.Time) {
		e.Helper()
		for m, err := range r.Read(e.Context(), "CONFORMANCE", since) {
			e.must(err)
			ev, err := written.Decode(m)
			e.must(err)
			ns, last = append(ns, ev.Value.N), m.Delivery.Stored
			if m.Delivery.Stream != "CONFORMANCE" || m.Delivery.Sequence != uint64(ev.Value.N) {
				e.Errorf("message %d is in %s at %d", ev.Value.N, m.Delivery.Stream, m.Delivery.Sequence)
			}
		}
		return ns, last
	}
	e.publish(b, numbered(1, 5)...)
	<-time.After(10 * time.Millisecond)
	e.publish(b, numbered(6, 1)...)
	got, last := read(time.Time{})
	if !slices.Equal(got, []int{1, 2, 3, 4, 5, 6}) {
		e.Errorf("read %v", got)
	}
	if got, _ := read(last); !slices.Equal(got, []int{6}) {
		e.Errorf("read since the last one was stored: %v", got)
	}
	for m, err := range r.Read(e.Context(), "NOWHERE", time.Time{}) {
		if m != nil || !errors.Is(err, postrider.NotFound) {
			e.Errorf("of a stream that is not there: %v, %v", m, err)
		}
	}
}
