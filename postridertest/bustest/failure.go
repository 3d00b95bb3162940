package bustest

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
)

func failedMessageComesBack(e *env) {
	b := e.open()
	var j, done journal
	e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		j.add(ev)
		if ev.Delivery.Attempt < 3 {
			return errWeather
		}
		done.add(ev)
		return nil
	}), quick))
	e.run(b)
	e.publish(b, numbered(0, 10)...)
	done.once(e, 10)
	if n := j.count(); n != 30 {
		e.Errorf("10 notes that fail twice were tried %d times", n)
	}
	e.letters(b, 0)
}

// failing subscribes a handler that fails so many times with a plain error, publishes notes and waits until all succeeded.
func (e *env) failing(failures, notes int, opts ...bus.SubscribeOption) *journal {
	e.Helper()
	b := e.open()
	var j, done journal
	e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		j.add(ev)
		if ev.Delivery.Attempt <= failures {
			return errWeather
		}
		done.add(ev)
		return nil
	}), opts...))
	e.run(b)
	e.publish(b, numbered(0, notes)...)
	done.once(e, notes)
	e.letters(b, 0)
	return &j
}

func defaultPolicySpacesPlainErrors(e *env) {
	const notes = 60
	j := e.failing(2, notes)
	for attempt, bound := range map[int]time.Duration{1: 200 * time.Millisecond, 2: 400 * time.Millisecond} {
		waits := j.waits(attempt)
		// Drawn between zero and the bound: that the half of 60 is below a tenth happens once in 10^13 runs.
		if median := waits[len(waits)/2]; median < bound/10 {
			e.Errorf("half of the waits after attempt %d were below %v: want them spread up to %v", attempt, median, bound)
		}
		if longest := waits[len(waits)-1]; e.bubble && longest > bound {
			e.Errorf("a wait after attempt %d was %v, want at most %v", attempt, longest, bound)
		}
	}
}

func multiplierGrows(e *env) {
	const initial, notes, failures = 300 * time.Millisecond, 100, 5
	j := e.failing(failures, notes, bus.Retry(postrider.RetryPolicy{Attempts: failures + 1, Initial: initial, Multiplier: 1.5}))
	// Bounds of 300 and 1519 ms, medians of 150 and 759 ms. What a busy machine adds is in both: their difference tells.
	first, last := j.waits(1), j.waits(failures)
	if a, z := first[notes/2], last[notes/2]; z-a < 2*initial/3 {
		e.Errorf("the median wait was %v after the first attempt and %v after the fifth: a multiplier of 1.5 does not grow", a, z)
	}
	if longest := last[notes-1]; longest < initial {
		e.Errorf("no wait after the fifth attempt was longer than %v, the bound of the first", longest)
	}
}

func retryAfterIsKept(e *env) {
	const wait = 100 * time.Millisecond
	b := e.open()
	var j journal
	e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		j.add(ev)
		if ev.Delivery.Attempt == 1 {
			return postrider.RetryAfter(wait, errWeather)
		}
		return nil
	}), quick))
	e.run(b)
	e.publish(b, &note{})
	e.eventually("attempts", j.count, 2)
	if got := j.waits(1)[0]; got < wait {
		e.Errorf("the next attempt came after %v, the handler asked for %v", got, wait)
	}
}

func longRetriesKeepIDAndAttempts(e *env) {
	const wait = 5 * time.Second // so long a wait is the scheduler's, on a server
	b := e.open()
	var j, other journal
	ids := map[string]bool{}
	e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		ids[ev.Source+" "+ev.ID] = true
		j.add(ev)
		if ev.Delivery.Attempt < 4 {
			return postrider.RetryAfter(wait/time.Duration(2-ev.Delivery.Attempt%2), errWeather) // long, short, long
		}
		return nil
	}), bus.Concurrency(1), bus.Retry(postrider.RetryPolicy{Attempts: 4})))
	e.must(b.Subscribe(other.handler(), bus.Group("other")))
	e.run(b)
	e.must(written.Publish(e.Context(), b, &note{}, postrider.MessageID("n-1")))
	e.eventually("attempts", j.count, 4)
	for i, s := range j.all() {
		if s.attempt != i+1 {
			e.Errorf("attempt %d says that it is number %d", i+1, s.attempt)
		}
	}
	if !ids["//conformance/tests n-1"] || len(ids) != 1 {
		e.Errorf("the attempts had the ids %v, want one", ids)
	}
	for _, attempt := range []int{1, 3} {
		if got := j.waits(attempt)[0]; got < wait {
			e.Errorf("attempt %d came after %v, the handler asked for %v", attempt+1, got, wait)
		}
	}
	other.once(e, 1) // nobody else sees the attempts
	e.letters(b, 0)
}

func expiredMessageIsADeadLetter(e *env) {
	b := e.open()
	var begun, j journal
	finish := make(chan struct{})
	e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		begun.add(ev)
		<-finish
		j.add(ev)
		return nil
	}), bus.Concurrency(1)))
	e.run(b)
	e.publish(b, &note{N: 0})
	e.must(written.Publish(e.Context(), b, &note{N: 1}, postrider.Expires(100*time.Millisecond)))
	e.must(written.Publish(e.Context(), b, &note{N: 2}, postrider.Expires(time.Hour)))
	<-time.After(200 * time.Millisecond) // it waits behind the first one until its time is over
	close(finish)
	e.eventually("notes handled", j.distinct, 2)
	if l := e.letters(b, 1)[0]; l.Code != postrider.DeadlineExceeded {
		e.Errorf("the dead letter is %+v, want the expired message", l)
	}
	begun.once(e, 2)
}

func poisonDoesNotHoldUpNeighbours(e *env) {
	b := e.open()
	var good, poison journal
	e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		if ev.Value.Text == "poison" {
			poison.add(ev)
			return postrider.RetryAfter(time.Hour, errWeather)
		}
		good.add(ev)
		return nil
	}), bus.Concurrency(1)))
	e.run(b)
	for i := range 5 {
		e.publish(b, &note{N: i, Text: "poison"})
		e.publish(b, numbered(10*i, 10)...)
	}
	good.once(e, 50)
	poison.once(e, 5)
}

func deadLettersHaveCauseAndMessage(e *env) {
	b := e.open()
	var good journal
	e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		switch ev.Value.Text {
		case "never":
			return errors.New("the printer is on fire: 火事")
		case "permanent":
			return postrider.Permanent(errWeather)
		case "park":
			return postrider.Park(errWeather) // there is no order to keep
		case "wrong":
			return postrider.Errorf(postrider.NotFound, "no such reader")
		case "panic":
			panic("ouch")
		}
		good.add(ev)
		return nil
	}), quick))
	e.run(b)
	want := map[string]struct {
		cause    string
		code     postrider.Code
		attempts int
	}{
		"never":     {"the printer is on fire: 火事", postrider.Unknown, 3},
		"permanent": {errWeather.Error(), postrider.Unknown, 1},
		"park":      {errWeather.Error(), postrider.Unknown, 1},
		"wrong":     {"no such reader", postrider.NotFound, 1},
		"panic":     {"ouch", postrider.Internal, 3},
	}
	for text := range want {
		e.must(written.Publish(e.Context(), b, &note{Text: text}, postrider.MessageID(text), postrider.Subject("größe")))
	}
	e.publish(b, numbered(0, 10)...)
	good.once(e, 10)
	for _, l := range e.letters(b, len(want)) {
		w, ok := want[l.Message.ID]
		if !ok || !strings.Contains(l.Cause, w.cause) || l.Code != w.code || l.Attempts != w.attempts {
			e.Errorf("the dead letter %s has the cause %q (%v) after %d attempts", l.Message.ID, l.Cause, l.Code, l.Attempts)
		}
		if l.Group != "tester" || l.Topic != written.Name() || l.Stream != "CONFORMANCE" || l.Origin == 0 || l.At.IsZero() {
			e.Errorf("the dead letter does not say where it comes from: %+v", l)
		}
		if ev, err := written.Decode(l.Message); err != nil || ev.Value.Text != l.Message.ID || ev.Subject != "größe" {
			e.Errorf("the message itself was changed: %+v, %v", l.Message, err)
		}
		delete(want, l.Message.ID) // each of them once
	}
}

func undecodableMessageStopsNobody(e *env) {
	b := e.open()
	var good journal
	e.must(b.Subscribe(good.handler(), bus.Concurrency(1)))
	e.run(b)
	e.publish(b, numbered(0, 5)...)
	broken, err1 := written.Message(e.Context(), &note{})
	odd, err2 := written.Message(e.Context(), &note{})
	e.must(errors.Join(err1, err2))
	broken.Data, odd.ContentType = []byte(`{"n":`), "application/x-unheard-of"
	e.must(b.Publish(e.Context(), broken, odd))
	causes := []string{"JSON", "application/x-unheard-of"}
	if e.Inject != nil {
		e.must(e.Inject(written.Name(), []byte("hello")))
		causes = append(causes, "not a CloudEvent")
	}
	e.publish(b, numbered(5, 5)...)
	good.once(e, 10)
	letters := e.letters(b, len(causes))
	for _, cause := range causes {
		found := false
		for _, l := range letters {
			found = found || strings.Contains(l.Cause, cause) && l.Code == postrider.InvalidArgument && l.Attempts == 1 && len(l.Message.Data) > 0
		}
		if !found {
			e.Errorf("no dead letter is InvalidArgument at the first attempt and says %q: %+v", cause, letters)
		}
	}
}

func deadLettersAreGroupedByCause(e *env) {
	b := e.open()
	for _, group := range []string{"mailer", "billing"} {
		e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
			if ev.Value.N == 0 {
				return postrider.Permanent(errWeather)
			}
			return postrider.Errorf(postrider.NotFound, "no reader %d in %q", ev.Value.N, group)
		}), bus.Group(group)))
	}
	e.run(b)
	e.publish(b, numbered(0, 4)...)
	letters, d := e.letters(b, 8), e.DeadLetters(b)
	groups, err := d.Groups(e.Context(), bus.LetterFilter{})
	if err != nil || len(groups) != 2 {
		e.Fatalf("grouped by cause: %+v, %v", groups, err)
	}
	g := groups[0]
	if g.Count != 6 || g.Code != postrider.NotFound || !strings.Contains(g.Cause, "no reader") || g.First.IsZero() || g.Last.Before(g.First) ||
		!slices.Equal(g.Groups, []string{"billing", "mailer"}) || !slices.Equal(g.Topics, []string{written.Name()}) {
		e.Errorf("the largest group is %+v", g)
	}
	if g := groups[1]; g.Count != 2 || g.Code != postrider.Unknown {
		e.Errorf("the other group is %+v", g)
	}
	for _, l := range letters {
		if (l.Fingerprint == g.Fingerprint) != (l.Code == postrider.NotFound) {
			e.Errorf("letter %d has the fingerprint %s: %s", l.Sequence, l.Fingerprint, l.Cause)
		}
	}
	if found, _, err := d.List(e.Context(), bus.LetterFilter{Fingerprint: g.Fingerprint, Group: "mailer"}, 0, 0); err != nil || len(found) != 3 {
		e.Errorf("found by fingerprint: %+v, %v", found, err)
	}
	if groups, err := d.Groups(e.Context(), bus.LetterFilter{Code: postrider.Internal}); err != nil || len(groups) > 0 {
		e.Errorf("groups of what is not there: %+v, %v", groups, err)
	}
}
