package bustest

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
)

// batches keeps what a handler of batches was given.
type batches struct {
	journal

	mu    sync.Mutex
	sizes []int
}

// handler returns one that succeeds.
func (j *batches) handler() postrider.Handler {
	return j.handlerOf(func(context.Context, []postrider.Event[note]) error { return nil })
}

func (j *batches) handlerOf(fn func(context.Context, []postrider.Event[note]) error) postrider.Handler {
	return written.BatchHandler(func(ctx context.Context, events []postrider.Event[note]) error {
		j.mu.Lock()
		j.sizes = append(j.sizes, len(events))
		j.mu.Unlock()
		for _, ev := range events {
			j.add(ev)
		}
		return fn(ctx, events)
	})
}

func (j *batches) taken() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return fmt.Sprint(j.sizes)
}

func batchIsWhatHasCome(e *env) {
	b := e.open()
	var full, rest, single batches
	e.must(b.Subscribe(full.handler(), bus.Group("full"), bus.Batch(10, time.Minute), all))
	e.must(b.Subscribe(rest.handler(), bus.Group("rest"), bus.Batch(100, 200*time.Millisecond), all))
	e.must(b.Subscribe(single.handler(), bus.Group("single"), bus.Batch(1, 0), all))
	e.publish(b, numbered(0, 30)...)
	e.run(b)
	began := time.Now()
	full.once(e, 30)
	if got := full.taken(); got != "[10 10 10]" || e.bubble && time.Since(began) > time.Second {
		e.Errorf("30 notes in batches of 10 came as %s after %v", got, time.Since(began))
	}
	rest.once(e, 30)
	if got := rest.taken(); got != "[30]" && e.bubble {
		e.Errorf("30 notes in batches of up to 100 came as %s", got)
	}
	single.once(e, 30)
	for _, j := range []*batches{&full, &rest, &single} {
		for i, s := range j.all() {
			if s.N != i {
				e.Fatalf("note %d came as number %d", s.N, i)
			}
		}
	}
}

func batchTellsEachEventsFate(e *env) {
	b := e.open()
	var j batches
	var done journal
	e.must(b.Subscribe(j.handlerOf(func(_ context.Context, events []postrider.Event[note]) error {
		fates := &postrider.BatchError{Errs: make([]error, len(events))}
		for i, ev := range events {
			switch {
			case ev.Value.Text == "never":
				fates.Errs[i] = postrider.Permanent(errWeather)
			case ev.Value.Text == "later" && ev.Delivery.Attempt < 3:
				fates.Errs[i] = errWeather
			default:
				done.add(ev)
			}
		}
		return fates
	}), quick, bus.Batch(20, 50*time.Millisecond), all))
	expired, err1 := written.Message(e.Context(), &note{N: 90}, postrider.Expires(time.Millisecond))
	broken, err2 := written.Message(e.Context(), &note{N: 91})
	e.must(errors.Join(err1, err2))
	broken.Data = []byte(`{"n":`)
	e.must(b.Publish(e.Context(), broken, expired))
	e.publish(b, numbered(0, 5)...)
	e.publish(b, &note{N: 5, Text: "never"}, &note{N: 6, Text: "later"})
	e.publish(b, numbered(7, 5)...)
	<-time.After(10 * time.Millisecond)
	e.run(b)
	done.once(e, 11)
	letters := map[postrider.Code]int{}
	for _, l := range e.letters(b, 3) {
		letters[l.Code]++
	}
	for _, code := range []postrider.Code{postrider.Unknown, postrider.DeadlineExceeded, postrider.InvalidArgument} {
		if letters[code] != 1 {
			e.Errorf("%d dead letters are %v, want 1", letters[code], code)
		}
	}
	if n := j.count(); n != 11+1+2 { // none of the neighbours came twice
		e.Errorf("the handler was given %d events, want 14: each once, and one three times", n)
	}
}

func batchFailsAsOne(e *env) {
	b := e.open()
	var j batches
	var done journal
	e.must(b.Subscribe(j.handlerOf(func(_ context.Context, events []postrider.Event[note]) error {
		for _, ev := range events {
			switch ev.Delivery.Attempt {
			case 1:
				return errWeather
			case 2:
				panic("ouch")
			}
		}
		for _, ev := range events {
			done.add(ev)
		}
		return nil
	}), quick, bus.Batch(10, 20*time.Millisecond), all))
	e.publish(b, numbered(0, 30)...)
	e.run(b)
	// Whoever shares a batch with one that fails has failed too: some may end in the dead letters.
	e.eventually("notes handled, or in the dead letters", func() int {
		letters, _, err := e.DeadLetters(b).List(e.Context(), bus.LetterFilter{}, 0, 0)
		e.must(err)
		return done.count() + len(letters)
	}, 30)
	if n := j.count(); n < 60 {
		e.Errorf("30 notes that fail twice were tried %d times", n)
	}
}

func batchesKeepTheOrderOfKeys(e *env) {
	const keys, each = 8, 20
	b := e.open()
	var done journal
	var j batches
	e.must(b.Subscribe(j.handlerOf(func(_ context.Context, events []postrider.Event[note]) error {
		fates := &postrider.BatchError{Errs: make([]error, len(events))}
		seen := map[string]bool{}
		for i, ev := range events {
			if seen[ev.Key()] {
				e.Errorf("a batch has two events of key %s", ev.Key())
			}
			seen[ev.Key()] = true
			if ev.Value.N/keys%5 == 0 && ev.Delivery.Attempt == 1 {
				fates.Errs[i] = errWeather // the others of its key must wait for it, and no other
			} else {
				done.add(ev)
			}
		}
		return fates
	}), bus.Ordered(), quick, bus.Batch(5, 5*time.Millisecond), bus.Concurrency(2), all))
	e.run(b)
	for n := range keys * each {
		e.must(written.Publish(e.Context(), b, &note{N: n}, postrider.Key(strconv.Itoa(n%keys))))
	}
	e.eventually("notes handled", done.distinct, keys*each)
	var last [keys]int
	seen := map[int]bool{}
	for _, s := range done.all() {
		if seen[s.N] {
			continue // a machine so busy that the ownership ran out: older ones come again
		}
		seen[s.N] = true
		if key := s.N % keys; s.N < last[key] {
			e.Errorf("of key %d, note %d was handled after note %d", key, s.N, last[key])
		} else {
			last[key] = s.N
		}
	}
}

func closeGivesBatchesBack(e *env) {
	const rounds, each = 4, 60
	opts := []bus.SubscribeOption{bus.AckWait(10 * time.Minute), all} // a message that a closed instance kept would come too late
	p := e.open()
	var j batches
	tokens := make(chan struct{})
	deploy := func() (stop func() error) {
		b := e.open()
		e.must(b.Subscribe(j.handlerOf(func(context.Context, []postrider.Event[note]) error { <-tokens; return nil }),
			append(opts, bus.Batch(7, time.Millisecond), bus.Concurrency(2))...))
		return e.run(b)
	}
	for r := range rounds {
		e.publish(p, numbered(r*each, each)...)
		stop := deploy()
		tokens <- struct{}{}
		done := make(chan error, 1)
		go func() { done <- stop() }()
		for draining := true; draining; {
			select {
			case tokens <- struct{}{}:
			case err := <-done:
				e.must(err)
				draining = false
			}
		}
	}
	close(tokens)
	stop := deploy()
	j.once(e, rounds*each) // and a clean drain doubles nothing
	e.must(stop())

	// A batch that is being filled has not begun.
	patient := e.open()
	var never, heir batches
	e.must(patient.Subscribe(never.handler(), append(opts, bus.Batch(10, time.Minute))...))
	stop = e.run(patient)
	e.publish(p, numbered(rounds*each, 5)...)
	<-time.After(50 * time.Millisecond)
	e.must(stop())
	if n := never.count(); n != 0 {
		e.Errorf("%d events of a batch that was not full were handled at the end", n)
	}
	next := e.open()
	e.must(next.Subscribe(heir.handler(), append(opts, bus.Batch(5, time.Minute))...))
	e.run(next)
	heir.once(e, 5)
}

func batchOptionsAreChecked(e *env) {
	var j batches
	var single journal
	for name, c := range map[string]struct {
		h    postrider.Handler
		opts []bus.SubscribeOption
	}{
		"no handler of batches": {single.handler(), []bus.SubscribeOption{bus.Batch(10, time.Second)}},
		"none":                  {j.handler(), []bus.SubscribeOption{bus.Batch(0, time.Second)}},
		"too many":              {j.handler(), []bus.SubscribeOption{bus.Batch(1001, time.Second)}},
		"too long":              {j.handler(), []bus.SubscribeOption{bus.Batch(10, time.Hour)}},
		"negative":              {j.handler(), []bus.SubscribeOption{bus.Batch(10, -1)}},
		"too many at once":      {j.handler(), []bus.SubscribeOption{bus.Batch(1000, 0), bus.Concurrency(11)}},
	} {
		if err := e.open().Subscribe(c.h, c.opts...); !errors.Is(err, postrider.InvalidArgument) {
			e.Errorf("%s: %v, want InvalidArgument", name, err)
		}
	}
}
