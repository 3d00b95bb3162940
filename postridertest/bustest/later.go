package bustest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

func delayedMessageComesInItsTime(e *env) {
	const delay = 300 * time.Millisecond
	b := e.open()
	var j journal
	e.must(b.Subscribe(j.handler()))
	e.run(b)
	published := time.Now()
	e.must(written.Publish(e.Context(), b, &note{N: 1}, postrider.Delay(delay)))
	e.publish(b, &note{N: 0})
	j.once(e, 2)
	if got := j.all(); got[0].N != 0 || got[1].at.Sub(published) < delay {
		e.Errorf("handled note %d first, and note %d after %v: want the delayed one after %v", got[0].N, got[1].N, got[1].at.Sub(published), delay)
	}
}

func delayedMessageTakesAnotherTime(e *env) {
	b := e.open()
	var j journal
	e.must(b.Subscribe(j.handler(), all))
	e.run(b)
	later := func(n int, id string, d time.Duration) {
		m, err := written.Message(e.Context(), &note{N: n}, postrider.MessageID(id), postrider.Delay(d))
		e.must(err)
		for range 2 { // as one does that has not seen the acknowledgement
			e.must(b.Publish(e.Context(), m))
		}
	}
	later(9, "sooner", time.Hour)
	later(0, "sooner", 100*time.Millisecond)
	later(9, "later", 3*time.Second)
	later(9, "later", 24*time.Hour)
	later(1, "other", 4*time.Second)
	j.once(e, 2)
	if got := j.all(); got[0].N != 0 || got[1].N != 1 {
		e.Errorf("handled %v: want what was published last for its time, and nothing else", got)
	}
}

func cancelledMessageNeverComes(e *env) {
	b := e.open()
	var j journal
	e.must(b.Subscribe(j.handler(), all))
	e.run(b)
	const delay = 3 * time.Second // in which a busy machine gets to Cancel
	e.must(written.Publish(e.Context(), b, &note{N: 9}, postrider.MessageID("no"), postrider.Delay(delay)))
	e.must(written.Publish(e.Context(), b, &note{N: 0}, postrider.MessageID("yes"), postrider.Delay(delay)))
	for i, want := range []bool{true, false} { // the second time there is nothing left to take back
		if in, err := b.Cancel(e.Context(), "no"); err != nil || in != want {
			e.Errorf("Cancel %d = %v, %v, want %v", i, in, err, want)
		}
	}
	j.once(e, 1)
	for _, id := range []string{"yes", "never heard of"} {
		if in, err := b.Cancel(e.Context(), id); err != nil || in {
			e.Errorf("Cancel of %q = %v, %v, want false: it is too late", id, in, err)
		}
	}
	e.must(written.Publish(e.Context(), b, &note{N: 1}, postrider.MessageID("no"), postrider.Delay(delay/10))) // a new decision
	j.once(e, 2)
	if got := j.all(); got[0].N != 0 || got[1].N != 1 {
		e.Errorf("handled %v", got)
	}
}

func scheduleComesAgainAndAgain(e *env) {
	b := e.open()
	got := make(chan *postrider.Message, 100)
	e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error { got <- ev.Message; return nil }), all))
	stop := e.run(b)
	schedule := func(b Bus, spec, zone string, n int) error {
		m, err := written.Message(e.Context(), &note{N: n})
		e.must(err)
		return b.Schedule(e.Context(), bus.Schedule{Name: "tick", Spec: spec, TimeZone: zone, Message: m})
	}
	e.must(schedule(b, "@every 1s", "", 0))
	first, second := <-got, <-got
	if first.ID == second.ID || !first.Time.Before(second.Time) || first.Source != "//conformance/tests" || first.Extension(postrider.ExtSchedule) != "tick" {
		e.Errorf("the messages are not each one of its own: %+v, %+v", first, second)
	}
	e.must(stop())
	if e.Restart != nil {
		e.Restart()
	}
	// Another instance of the service goes on with it, and may change it.
	next := e.open()
	e.must(next.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error { got <- ev.Message; return nil }), all))
	e.run(next)
	e.must(schedule(next, "@every 1s", "", 0)) // as at each start
	if m := <-got; m.ID == first.ID || m.ID == second.ID {
		e.Errorf("after the restart message %s came again", m.ID)
	}
	e.must(schedule(next, "* * * * * *", "Europe/Warsaw", 1))
	for m := range got {
		if string(m.Data) == `{"n":1}` {
			break
		}
	}
	for i, want := range []bool{true, false} {
		if had, err := next.Unschedule(e.Context(), "tick"); err != nil || had != want {
			e.Errorf("Unschedule %d = %v, %v, want %v", i, had, err, want)
		}
	}
	for name, bad := range map[string][2]string{
		"too often": {"@every 10ms", ""}, "five fields": {"30 8 * * *", ""}, "one time": {"@at 2030-01-01T00:00:00Z", ""},
		"empty": {"", ""}, "unknown zone": {"0 30 8 * * *", "Europe/Atlantis"}, "never": {"0 0 0 31 2 *", ""},
		"zone of an interval": {"@every 1h", "Europe/Warsaw"}, "out of range": {"61 * * * * *", ""}, "backwards": {"0 0 5-3 * * *", ""},
	} {
		if err := schedule(next, bad[0], bad[1], 3); !errors.Is(err, postrider.InvalidArgument) {
			e.Errorf("%s: error is %v, want InvalidArgument", name, err)
		}
	}
	if had, err := next.Unschedule(e.Context(), "tick"); err != nil || had {
		e.Errorf("a refused schedule was kept: %v, %v", had, err)
	}
}

func pauseHoldsAndResumeDelivers(e *env) {
	b := e.open()
	var held, other journal
	e.must(b.Subscribe(held.handler()))
	e.must(b.Subscribe(other.handler(), bus.Group("other")))
	e.run(b)
	e.must(b.Pause(e.Context(), "tester", written.Name(), time.Now().Add(time.Hour)))
	e.publish(b, numbered(0, 5)...)
	other.once(e, 5) // nobody else is held up
	if n := held.count(); n != 0 {
		e.Errorf("%d notes were handled during the pause", n)
	}
	e.must(b.Resume(e.Context(), "tester", written.Name()))
	held.once(e, 5)
	const pause = 500 * time.Millisecond
	until := time.Now().Add(pause)
	e.must(b.Pause(e.Context(), "tester", written.Name(), until))
	e.publish(b, &note{N: 5})
	held.once(e, 6)
	if at := held.all()[5].at; at.Before(until) {
		e.Errorf("a note was handled %v before the end of the pause", until.Sub(at))
	}
	for _, stranger := range [][2]string{{"nobody", written.Name()}, {"tester", "conformance.unheard.v1"}} {
		err := b.Pause(e.Context(), stranger[0], stranger[1], time.Now().Add(time.Hour))
		if !errors.Is(err, postrider.NotFound) || !strings.Contains(err.Error(), stranger[0]) || !strings.Contains(err.Error(), stranger[1]) {
			e.Errorf("pause of %v: %v, want NotFound that names both", stranger, err)
		}
	}
}

func oneOfSeveralWritersWins(e *env) {
	const writers = 8
	b := e.open()
	version := func(n int) *postrider.Message {
		m, err := written.Message(e.Context(), &note{N: n})
		e.must(err)
		m.Topic = "conformance.account.17"
		return m
	}
	e.publish(b, &note{}) // another address of the stream
	last, err := b.PublishAfter(e.Context(), 0, version(0))
	e.must(err)
	results := make(chan error, writers)
	for i := range writers { // all have read the same
		m := version(i)
		go func() {
			_, err := b.PublishAfter(e.Context(), last, m)
			results <- err
		}()
	}
	won := 0
	for range writers {
		switch err := <-results; {
		case err == nil:
			won++
		case !errors.Is(err, postrider.Aborted):
			e.Errorf("a loser is told %v, want Aborted", err)
		}
	}
	if won != 1 {
		e.Errorf("%d writers won", won)
	}
}

var operator = bus.Action{By: "conformance", Why: "the cause is gone", Rate: -1}

func redriveIsNotSwallowed(e *env) {
	b := e.open()
	var mails, bills journal
	broken := make(chan struct{})
	e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		select {
		case <-broken:
			mails.add(ev)
			return nil
		default:
			return postrider.Permanent(errWeather)
		}
	}), bus.Group("mailer")))
	e.must(b.Subscribe(bills.handler(), bus.Group("billing")))
	e.run(b)
	e.publish(b, numbered(0, 3)...)
	letters := e.letters(b, 3)
	bills.once(e, 3)
	// It fails again, and comes back as another letter.
	d := e.DeadLetters(b)
	if n, err := d.Replay(e.Context(), []uint64{letters[0].Sequence}, operator); n != 1 || err != nil {
		e.Fatalf("replayed %d, %v", n, err)
	}
	postridertest.Eventually(e.T, func() error {
		again, _, err := d.List(e.Context(), bus.LetterFilter{}, letters[2].Sequence, 0)
		if err == nil && (len(again) != 1 || again[0].Redrives != 1 || again[0].Attempts != 1 || again[0].Message.ID != letters[0].Message.ID) {
			err = fmt.Errorf("letters after the re-drive are %+v, want the first one again", again)
		}
		return err
	})
	// All of this is within the duplicate window of two minutes, under the same source and id.
	close(broken)
	if n, err := d.ReplayAll(e.Context(), bus.LetterFilter{Group: "mailer"}, operator); n != 3 || err != nil {
		e.Fatalf("replayed %d, %v", n, err)
	}
	mails.once(e, 3)
	for _, s := range mails.all() {
		if s.attempt != 1 {
			e.Errorf("note %d came as attempt %d: the attempts of a re-drive begin anew", s.N, s.attempt)
		}
	}
	e.letters(b, 0)
	bills.once(e, 3) // the group that had handled them gets nothing
	if n, err := d.Replay(e.Context(), []uint64{letters[0].Sequence}, operator); n != 0 || !errors.Is(err, postrider.NotFound) {
		e.Errorf("replayed %d, %v, want NotFound for a letter that is gone", n, err)
	}
	if n, err := d.Replay(e.Context(), nil, bus.Action{By: "somebody"}); n != 0 || !errors.Is(err, postrider.InvalidArgument) {
		e.Errorf("replayed %d, %v, want InvalidArgument without a reason", n, err)
	}
}

func redriveTakesItsTurn(e *env) {
	b := e.open()
	var begun, done journal
	broken, finish := make(chan struct{}), make(chan struct{})
	e.must(b.Subscribe(keyed.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		begun.add(ev)
		switch ev.Value.N {
		case 0:
			select {
			case <-broken:
			default:
				return postrider.Permanent(errWeather)
			}
		case 1:
			<-finish
		}
		done.add(ev)
		return nil
	}), bus.Ordered(), bus.Concurrency(4)))
	e.run(b)
	e.must(keyed.Publish(e.Context(), b, &note{N: 0, Text: "a"}))
	letter := e.letters(b, 1)[0]
	e.must(keyed.Publish(e.Context(), b, &note{N: 1, Text: "a"}))
	e.eventually("begun", begun.count, 2) // the key is being worked on
	close(broken)
	if n, err := e.DeadLetters(b).Replay(e.Context(), []uint64{letter.Sequence}, operator); n != 1 || err != nil {
		e.Fatalf("replayed %d, %v", n, err)
	}
	e.must(keyed.Publish(e.Context(), b, &note{N: 2, Text: "b"}))
	e.eventually("done, another key", done.count, 1)
	<-time.After(200 * time.Millisecond) // in which it could begin
	if n := begun.count(); n != 3 {
		e.Errorf("%d attempts have begun, want 3: the re-drive runs beside another message of its key", n)
	}
	close(finish)
	e.eventually("done", done.count, 3)
	if got := done.all(); got[1].N != 1 || got[2].N != 0 {
		e.Errorf("done %v, want the message of the key that was being handled before the re-drive", got)
	}
}

func deadLettersAreSelectedAndDiscarded(e *env) {
	b := e.open()
	for _, group := range []string{"mailer", "billing"} {
		e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
			return postrider.Errorf(postrider.NotFound, "no reader %d", ev.Value.N)
		}), bus.Group(group), bus.Concurrency(1)))
	}
	e.run(b)
	e.publish(b, numbered(0, 5)...)
	letters, d := e.letters(b, 10), e.DeadLetters(b)
	for name, c := range map[string]struct {
		filter bus.LetterFilter
		want   int
	}{
		"group":         {bus.LetterFilter{Group: "mailer"}, 5},
		"another group": {bus.LetterFilter{Group: "nobody"}, 0},
		"topic":         {bus.LetterFilter{Topic: "conformance.*.v1"}, 10},
		"another topic": {bus.LetterFilter{Topic: "conformance.read.v1"}, 0},
		"code":          {bus.LetterFilter{Code: postrider.NotFound}, 10},
		"another code":  {bus.LetterFilter{Code: postrider.Internal}, 0},
		"cause":         {bus.LetterFilter{Cause: "reader 3", Group: "billing"}, 1},
		"past":          {bus.LetterFilter{To: letters[0].At.Add(-time.Hour)}, 0},
		"since":         {bus.LetterFilter{From: letters[0].At.Add(-time.Hour)}, 10},
	} {
		if got, _, err := d.List(e.Context(), c.filter, 0, 0); err != nil || len(got) != c.want {
			e.Errorf("%s: %d letters, %v, want %d", name, len(got), err, c.want)
		}
	}
	seen, after := 0, uint64(0)
	for more := true; more; more = after > 0 {
		page, next, err := d.List(e.Context(), bus.LetterFilter{}, after, 3)
		e.must(err)
		seen, after = seen+len(page), next
	}
	if seen != 10 {
		e.Errorf("pages of 3 had %d letters, want 10", seen)
	}
	l, err := d.Get(e.Context(), letters[0].Sequence)
	if err != nil || l.Message.ID != letters[0].Message.ID || l.Cause != letters[0].Cause || l.Subscription != written.Name() {
		e.Errorf("the first letter is %+v, %v", l, err)
	}
	if n, err := d.Discard(e.Context(), []uint64{l.Sequence}, operator); n != 1 || err != nil {
		e.Errorf("discarded %d, %v", n, err)
	}
	if _, err := d.Get(e.Context(), l.Sequence); !errors.Is(err, postrider.NotFound) {
		e.Errorf("a discarded letter: %v, want NotFound", err)
	}
	if n, err := d.DiscardAll(e.Context(), bus.LetterFilter{Topic: "conformance.>"}, operator); n != 9 || err != nil {
		e.Errorf("discarded %d, %v", n, err)
	}
	e.letters(b, 0)
}

func deadLettersAreEditedAndLogged(e *env) {
	b := e.open()
	var mended journal
	e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		if ev.Value.N < 100 {
			return postrider.Errorf(postrider.NotFound, "no reader %d", ev.Value.N)
		}
		mended.add(ev)
		return nil
	}), bus.Concurrency(1)))
	e.run(b)
	e.publish(b, numbered(1, 3)...)
	letters, d := e.letters(b, 3), e.DeadLetters(b)
	mend := func(m *postrider.Message) error {
		repaired, err := written.Message(e.Context(), &note{N: 107})
		m.Data = repaired.Data
		return err
	}
	for name, c := range map[string]struct {
		change func(m *postrider.Message) error
		action bus.Action
		want   postrider.Code
	}{
		"another topic": {func(m *postrider.Message) error { m.Topic = "conformance.read.v1"; return nil }, operator, postrider.InvalidArgument},
		"no id":         {func(m *postrider.Message) error { m.ID = ""; return nil }, operator, postrider.InvalidArgument},
		"no reason":     {mend, bus.Action{By: "somebody"}, postrider.InvalidArgument},
		"own error":     {func(*postrider.Message) error { return postrider.Errorf(postrider.Aborted, "no") }, operator, postrider.Aborted},
	} {
		if _, err := d.Edit(e.Context(), letters[0].Sequence, c.change, c.action); postrider.CodeOf(err) != c.want {
			e.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	copied, err := d.Edit(e.Context(), letters[0].Sequence, mend, operator)
	e.must(err)
	l, err := d.Get(e.Context(), copied)
	if err != nil || l.CopyOf != letters[0].Sequence || l.Cause != letters[0].Cause || l.Message.ID != letters[0].Message.ID {
		e.Errorf("the copy is %+v, %v", l, err)
	}
	if _, err := d.Get(e.Context(), letters[0].Sequence); !errors.Is(err, postrider.NotFound) {
		e.Errorf("an edited letter: %v, want NotFound", err)
	}
	if n, err := d.Discard(e.Context(), []uint64{letters[1].Sequence}, operator); n != 1 || err != nil {
		e.Errorf("discarded %d, %v", n, err)
	}
	if n, err := d.Replay(e.Context(), []uint64{copied}, operator); n != 1 || err != nil {
		e.Errorf("replayed %d, %v", n, err)
	}
	e.eventually("handled", mended.count, 1)
	if got := mended.all()[0]; got.N != 107 {
		e.Errorf("handled %+v", got)
	}
	log, next, err := d.Log(e.Context(), bus.LetterFilter{Code: postrider.NotFound}, 0, 2)
	e.must(err)
	rest, _, err := d.Log(e.Context(), bus.LetterFilter{}, next, 0)
	e.must(err)
	log = append(log, rest...)
	if len(log) != 3 {
		e.Fatalf("the log has %d entries: %+v", len(log), log)
	}
	for i, want := range []bus.LogEntry{
		{Done: "edit", Letter: letters[0], Copy: copied}, {Done: "discard", Letter: letters[1]}, {Done: "replay", Letter: l},
	} {
		got := log[i]
		if got.Done != want.Done || got.Copy != want.Copy || got.By != operator.By || got.Why != operator.Why || got.At.IsZero() ||
			got.Letter.Sequence != want.Letter.Sequence || got.Letter.Cause != want.Letter.Cause || (len(got.Letter.Data) > 0) != (i == 0) {
			e.Errorf("entry %d is %+v, want %+v", i, got, want)
		}
	}
}
