package bustest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// parkedOf returns the parked keys of a bus, or skips the promise.
func (e *env) parkedOf(b Bus) Parked {
	e.Helper()
	if e.Parked == nil {
		e.Skip("this implementation parks no keys")
	}
	return e.Parked(b)
}

// parked waits until so many messages are parked, and returns their keys.
func (e *env) parked(b Bus, want int) []bus.ParkedKey {
	e.Helper()
	var keys []bus.ParkedKey
	postridertest.Eventually(e.T, func() (err error) {
		keys, _, err = e.parkedOf(b).Keys(e.Context(), bus.ParkedFilter{}, "", 0)
		n := 0
		for _, k := range keys {
			n += k.Messages
		}
		if err == nil && n != want {
			err = fmt.Errorf("%d messages are parked, want %d: %+v", n, want, keys)
		}
		return err
	})
	return keys
}

// release releases keys, and expects so many.
func (e *env) release(b Bus, f bus.ParkedFilter, want int) {
	e.Helper()
	if n, err := e.parkedOf(b).Release(e.Context(), f, operator); n != want || err != nil {
		e.Fatalf("%d keys released, %v, want %d", n, err, want)
	}
}

// publishKeyed publishes n notes, numbered from first, with each of the keys.
func (e *env) publishKeyed(b Bus, first, n int, keys ...string) {
	e.Helper()
	for _, v := range numbered(first, n) {
		for _, key := range keys {
			e.must(keyed.Publish(e.Context(), b, &note{N: v.N, Text: key}))
		}
	}
}

// inOrder fails the test unless n notes of each key were seen, in the order of their numbers. Some may have come again, as after
// any take-over; in a bubble there is none.
func (j *journal) inOrder(e *env, n int, keys ...string) {
	e.Helper()
	distinct := func() map[string][]int {
		got := map[string][]int{}
		for _, s := range j.all() {
			if !slices.Contains(got[s.Text], s.N) {
				got[s.Text] = append(got[s.Text], s.N)
			}
		}
		return got
	}
	e.eventually("notes handled", func() int {
		total := 0
		for _, ns := range distinct() {
			total += len(ns)
		}
		return total
	}, n*len(keys))
	for key, ns := range distinct() {
		if !slices.Contains(keys, key) || len(ns) != n || !slices.IsSorted(ns) {
			e.Errorf("key %s was handled as %v", key, ns)
		}
	}
	if got := j.count(); e.bubble && got != n*len(keys) {
		e.Errorf("%d notes were handled %d times", n*len(keys), got)
	}
}

func parkedKeyWaitsForItsRelease(e *env) {
	b := e.open()
	p := e.parkedOf(b)
	var j, parks journal
	var mended atomic.Bool
	e.must(b.Subscribe(keyed.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		if ev.Value.Text == "bad" && ev.Value.N >= 2 && !mended.Load() {
			parks.add(ev)
			return fmt.Errorf("handling: %w", postrider.Park(postrider.Errorf(postrider.NotFound, "no customer %d", ev.Value.N)))
		}
		j.add(ev)
		return nil
	}), bus.Ordered(), bus.Concurrency(4)))
	e.run(b)
	e.publishKeyed(b, 0, 6, "bad", "good", "fair")
	e.eventually("notes handled", j.count, 2+6+6)
	keys := e.parked(b, 4)
	if k := keys[0]; len(keys) != 1 || k.Group != "tester" || k.Topic != keyed.Name() || k.Key != "bad" || k.Code != postrider.NotFound ||
		!strings.Contains(k.Cause, "no customer 2") || k.Attempts != 1 || k.Since.IsZero() {
		e.Errorf("parked is %+v", keys)
	}
	messages, _, err := p.Messages(e.Context(), bus.ParkedFilter{Group: "tester", Topic: keyed.Name(), Key: "bad"}, 0, 0)
	e.must(err)
	for i, m := range messages {
		ev, err := keyed.Decode(m.Message)
		if err != nil || ev.Value.N != i+2 || m.Key != "bad" || m.Stream != "CONFORMANCE" || (m.Code == postrider.OK) != (i > 0) {
			e.Errorf("parked message %d is %+v, %v", i, m, err)
		}
	}
	if other, _, err := p.Messages(e.Context(), bus.ParkedFilter{Key: "good"}, 0, 0); len(other) > 0 || err != nil {
		e.Errorf("parked are %+v of a key that is not, %v", other, err)
	}
	if _, err := p.Release(e.Context(), bus.ParkedFilter{}, bus.Action{By: "somebody"}); !errors.Is(err, postrider.InvalidArgument) {
		e.Errorf("a release without a reason: %v", err)
	}

	e.release(b, bus.ParkedFilter{}, 1) // of what is still broken: one attempt, and it stays
	e.eventually("messages that parked", parks.count, 2)
	e.parked(b, 4)
	mended.Store(true)
	e.release(b, bus.ParkedFilter{Key: "bad"}, 1)
	e.publishKeyed(b, 6, 10, "bad", "good", "fair") // while it is released
	j.inOrder(e, 16, "bad", "good", "fair")
	e.parked(b, 0)
	e.letters(b, 0)
	log, _, err := p.Log(e.Context(), bus.ParkedFilter{Key: "bad"}, 0, 0)
	if err != nil || len(log) != 2 || log[0].Done != "release" || log[0].By != operator.By || log[0].Letter.Sequence != messages[0].Sequence {
		e.Errorf("the log is %+v, %v", log, err)
	}
}

func parkedKeyOutlivesItsOwner(e *env) {
	var j journal
	var mended atomic.Bool
	start := func() (Bus, func() error) {
		b := e.open()
		e.parkedOf(b)
		e.must(b.Subscribe(keyed.Handler(func(_ context.Context, ev postrider.Event[note]) error {
			if ev.Value.Text == "bad" && !mended.Load() {
				return postrider.Park(errWeather)
			}
			j.add(ev)
			return nil
		}), bus.Ordered()))
		return b, e.run(b)
	}
	b, stop := start()
	e.publishKeyed(b, 0, 5, "bad", "good")
	e.eventually("notes handled", j.count, 5)
	e.parked(b, 5)
	e.must(stop())
	mended.Store(true) // only a release may bring it
	b, stop = start()
	e.publishKeyed(b, 5, 5, "bad", "good")
	e.eventually("notes handled", j.count, 10)
	e.parked(b, 10)
	e.must(stop())
	e.release(b, bus.ParkedFilter{}, 1) // for when somebody runs
	b, _ = start()
	j.inOrder(e, 10, "bad", "good")
	e.parked(b, 0)
}

func crashInAReleaseLosesNothing(e *env) {
	if e.Crash == nil {
		e.Skip("this implementation cannot crash")
	}
	const notes = 10
	var j journal
	var mended atomic.Bool
	reached, dead := make(chan struct{}), make(chan struct{})
	start := func(victim bool) Bus {
		b := e.open()
		e.parkedOf(b)
		e.must(b.Subscribe(keyed.Handler(func(_ context.Context, ev postrider.Event[note]) error {
			switch {
			case !mended.Load():
				return postrider.Park(errWeather)
			case victim && ev.Value.N == notes/2:
				close(reached)
				<-dead
				return errWeather
			}
			j.add(ev)
			return nil
		}), bus.Ordered(), bus.AckWait(time.Second)))
		e.run(b)
		return b
	}
	victim := start(true)
	pub := e.open()
	e.publishKeyed(pub, 0, notes, "a")
	e.parked(pub, notes)
	mended.Store(true)
	e.release(pub, bus.ParkedFilter{}, 1)
	<-reached
	e.publishKeyed(pub, notes, notes, "a") // behind the rest, wherever that is
	heir := start(false)
	e.crash(victim)
	close(dead)
	j.inOrder(e, 2*notes, "a")
	e.parked(heir, 0)
}

func failuresParkTheirKey(e *env) {
	b := e.open()
	p := e.parkedOf(b)
	var j journal
	var mended atomic.Bool
	h := keyed.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		switch {
		case mended.Load():
		case ev.Value.Text == "fails":
			return errWeather
		case ev.Value.Text == "permanent":
			return postrider.Permanent(errWeather)
		}
		j.add(ev)
		return nil
	})
	if err := b.Subscribe(h, bus.ParkFailures()); !errors.Is(err, postrider.InvalidArgument) {
		e.Errorf("a subscription without order that parks: %v", err)
	}
	e.must(b.Subscribe(h, bus.Ordered(), bus.ParkFailures(), quick))
	e.run(b)
	broken, err := keyed.Message(e.Context(), &note{Text: "broken"})
	e.must(err)
	broken.Data = []byte("{")
	e.must(b.Publish(e.Context(), broken))
	e.publishKeyed(b, 0, 3, "fails", "permanent", "broken", "good")
	keys := e.parked(b, 3+3+4)
	if len(keys) != 3 || keys[0].Key != "broken" || keys[0].Code != postrider.InvalidArgument ||
		keys[1].Key != "fails" || keys[1].Attempts != 3 || keys[2].Attempts != 1 {
		e.Errorf("parked are %+v", keys)
	}
	first, next, err := p.Keys(e.Context(), bus.ParkedFilter{}, "", 2)
	if err != nil || len(first) != 2 || next == "" {
		e.Errorf("a page of two keys is %+v, %q, %v", first, next, err)
	}
	if rest, next, err := p.Keys(e.Context(), bus.ParkedFilter{}, next, 2); err != nil || len(rest) != 1 || next != "" || rest[0].Key != "permanent" {
		e.Errorf("the next page is %+v, %q, %v", rest, next, err)
	}
	e.eventually("notes handled", j.count, 3)
	mended.Store(true)
	e.release(b, bus.ParkedFilter{}, 3)
	e.eventually("notes handled", j.count, 9)
	e.parked(b, 4)
	if n, err := p.DiscardAll(e.Context(), bus.ParkedFilter{Key: "broken"}, operator); n != 4 || err != nil {
		e.Errorf("%d discarded, %v", n, err)
	}
	e.parked(b, 0)
	e.letters(b, 0)
	j.inOrder(e, 3, "fails", "permanent", "good")
}

func parkedMessagesAreDiscarded(e *env) {
	b := e.open()
	p := e.parkedOf(b)
	var j journal
	e.must(b.Subscribe(keyed.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		if ev.Value.N == 0 {
			return postrider.Park(errWeather)
		}
		j.add(ev)
		return nil
	}), bus.Ordered()))
	e.run(b)
	e.publishKeyed(b, 0, 5, "a", "b")
	e.parked(b, 10)
	messages, next, err := p.Messages(e.Context(), bus.ParkedFilter{Key: "a"}, 0, 4)
	if err != nil || len(messages) != 4 || next != messages[3].Sequence {
		e.Fatalf("a page of four has %d messages, next %d, %v", len(messages), next, err)
	}
	discard := func(m bus.DeadLetter) {
		e.Helper()
		if n, err := p.Discard(e.Context(), []uint64{m.Sequence}, operator); n != 1 || err != nil {
			e.Fatalf("%d discarded, %v", n, err)
		}
	}
	discard(messages[2])
	e.parked(b, 9)
	if n := j.count(); n != 0 {
		e.Errorf("%d were handled while the first was there", n)
	}
	discard(messages[0]) // the rest of the key goes on
	e.eventually("notes handled", j.count, 3)
	for i, n := range []int{1, 3, 4} {
		if got := j.all()[i]; got.N != n || got.Text != "a" || got.attempt != 1 {
			e.Errorf("handled were %v", j.all())
		}
	}
	if _, err := p.Discard(e.Context(), []uint64{messages[0].Sequence}, operator); !errors.Is(err, postrider.NotFound) {
		e.Errorf("a second discard: %v, want NotFound", err)
	}
	if n, err := p.DiscardAll(e.Context(), bus.ParkedFilter{Key: "b"}, operator); n != 5 || err != nil {
		e.Errorf("%d discarded, %v", n, err)
	}
	e.parked(b, 0)
	e.publishKeyed(b, 5, 1, "a", "b")
	e.eventually("notes handled", j.count, 5)
	log, _, err := p.Log(e.Context(), bus.ParkedFilter{}, 0, 0)
	if err != nil || len(log) != 7 || log[0].Done != "discard" || log[0].Letter.Sequence != messages[2].Sequence || len(log[0].Letter.Data) > 0 {
		e.Errorf("the log is %+v, %v", log, err)
	}
}

func redriveWaitsBehindItsParkedKey(e *env) {
	b := e.open()
	e.parkedOf(b)
	var j journal
	var dead, mended atomic.Bool
	dead.Store(true)
	e.must(b.Subscribe(keyed.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		switch {
		case ev.Value.N == 9 && dead.Load():
			return postrider.Permanent(errWeather)
		case ev.Value.N == 0 && !mended.Load():
			return postrider.Park(errWeather)
		}
		j.add(ev)
		return nil
	}), bus.Ordered()))
	e.run(b)
	e.publishKeyed(b, 9, 1, "a")
	letter := e.letters(b, 1)[0]
	if letter.Key != "a" {
		e.Errorf("the dead letter has the key %q, want a", letter.Key)
	}
	e.publishKeyed(b, 0, 2, "a")
	e.parked(b, 2)
	dead.Store(false)
	if n, err := e.DeadLetters(b).Replay(e.Context(), []uint64{letter.Sequence}, operator); n != 1 || err != nil {
		e.Fatalf("replayed %d, %v", n, err)
	}
	e.parked(b, 3)
	if n := j.count(); n != 0 {
		e.Errorf("%d were handled of a key that is parked", n)
	}
	mended.Store(true)
	e.release(b, bus.ParkedFilter{}, 1)
	j.inOrder(e, 3, "a") // 0, 1, and then 9
	e.parked(b, 0)
	e.letters(b, 0)
}

func batchesParkTheirKeys(e *env) {
	b := e.open()
	e.parkedOf(b)
	var j journal
	var mended atomic.Bool
	e.must(b.Subscribe(keyed.BatchHandler(func(_ context.Context, events []postrider.Event[note]) error {
		if !mended.Load() {
			return postrider.Park(errWeather)
		}
		for _, ev := range events {
			j.add(ev)
		}
		return nil
	}), bus.Ordered()))
	e.run(b)
	e.publishKeyed(b, 0, 4, "a", "b", "c")
	e.parked(b, 12)
	mended.Store(true)
	e.release(b, bus.ParkedFilter{}, 3)
	e.publishKeyed(b, 4, 4, "a", "b", "c")
	j.inOrder(e, 8, "a", "b", "c")
	e.parked(b, 0)
}
