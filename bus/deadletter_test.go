package bus_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// clerk is who acts in tests, without being kept waiting.
var clerk = bus.Action{By: "Zoë", Why: "the printer\nworks again", Rate: -1}

// waitLetters returns the dead letters once there are n.
func waitLetters(t testing.TB, b *bus.Bus, f bus.LetterFilter, n int) []bus.DeadLetter {
	t.Helper()
	var letters []bus.DeadLetter
	postridertest.Eventually(t, func() (err error) {
		if letters, _, err = b.DeadLetters().List(t.Context(), f, 0, 1000); err == nil && len(letters) != n {
			err = fmt.Errorf("%d dead letters, want %d", len(letters), n)
		}
		return err
	})
	return letters
}

// office is a bus whose group "tester" refuses notes while broken, and whose group "archive" takes everything.
type office struct {
	bus            *bus.Bus
	nc             *nats.Conn
	broken         atomic.Bool
	tester, filing seen
	attempts       chan postrider.Delivery
	ids            chan string
}

func newOffice(t *testing.T, change ...func(*bus.Config)) *office {
	t.Helper()
	nc := postridertest.NATS(t)
	o := &office{nc: nc, bus: newBus(t, nc, change...), attempts: make(chan postrider.Delivery, 1000), ids: make(chan string, 1000)}
	o.broken.Store(true)
	h := noted.Handler(func(_ context.Context, e postrider.Event[note]) error {
		o.attempts <- e.Delivery
		if o.broken.Load() {
			return postrider.Errorf(postrider.FailedPrecondition, "note %d: %q: the printer is on fire", e.Value.N, e.Value.Text)
		}
		o.tester.add(*e.Value)
		o.ids <- e.Source + " " + e.ID
		return nil
	})
	filing := noted.Handler(func(_ context.Context, e postrider.Event[note]) error { o.filing.add(*e.Value); return nil })
	if err := errors.Join(o.bus.Subscribe(h, quick), o.bus.Subscribe(filing, bus.Group("archive"))); err != nil {
		t.Fatal(err)
	}
	run(t, o.bus)
	<-o.bus.Started()
	return o
}

// publish publishes n notes and returns their dead letters.
func (o *office) publish(t *testing.T, n int) []bus.DeadLetter {
	t.Helper()
	for i := range n {
		if err := noted.Publish(t.Context(), o.bus, &note{N: i, Text: "x"}, postrider.MessageID(fmt.Sprintf("note-%d", i))); err != nil {
			t.Fatal(err)
		}
	}
	letters := waitLetters(t, o.bus, bus.LetterFilter{}, n)
	for range n {
		<-o.attempts
	}
	return letters
}

func TestReplayReachesOnlyTheGroupThatFailed(t *testing.T) {
	t.Parallel()
	for _, prefix := range []string{"", "staging"} {
		o := newOffice(t, func(c *bus.Config) { c.Prefix = prefix })
		letters := o.publish(t, 3)
		o.broken.Store(false)
		// All within the duplicate window of two minutes: under its own id the server would drop what it has seen.
		n, err := o.bus.DeadLetters().Replay(t.Context(), []uint64{letters[1].Sequence}, clerk)
		if n != 1 || err != nil {
			t.Fatalf("replayed %d, %v", n, err)
		}
		if id := <-o.ids; id != "//test/notes "+letters[1].Message.ID {
			t.Errorf("replayed event is %s: source and id must stay", id)
		}
		if d := <-o.attempts; d.Attempt != 1 || d.Group != "tester" {
			t.Errorf("delivery is %+v, want attempt 1", d)
		}
		if n, err := o.bus.DeadLetters().ReplayAll(t.Context(), bus.LetterFilter{Topic: "notes.>"}, clerk); n != 2 || err != nil {
			t.Fatalf("replayed %d, %v", n, err)
		}
		postridertest.Eventually(t, wantCount(o.tester.distinct, 3))
		waitLetters(t, o.bus, bus.LetterFilter{}, 0)
		if o.tester.count() != 3 || o.filing.count() != 3 {
			t.Errorf("handled %d times by the group that failed and %d times by the other, want 3 and 3", o.tester.count(), o.filing.count())
		}
		log, _, err := o.bus.DeadLetters().Log(t.Context(), bus.LetterFilter{Group: "tester"}, 0, 0)
		if err != nil || len(log) != 3 {
			t.Fatalf("log is %+v, %v", log, err)
		}
		e := log[0]
		if e.Done != "replay" || e.By != clerk.By || e.Why != clerk.Why || e.At.IsZero() || e.Letter.Sequence != letters[1].Sequence ||
			e.Letter.Message.ID != letters[1].Message.ID || !strings.Contains(e.Letter.Cause, "on fire") || len(e.Letter.Data) > 0 {
			t.Errorf("log entry is %+v", e)
		}
	}
}

func TestReplayToWildcardsAndOrdered(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	var broken atomic.Bool
	broken.Store(true)
	got := make(chan *postrider.Message, 10)
	h := postrider.RawHandler("notes.*.v1", func(_ context.Context, m *postrider.Message) error {
		if broken.Load() {
			return postrider.Permanent(errors.New("no"))
		}
		got <- m
		return nil
	})
	if err := b.Subscribe(h, bus.Ordered()); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	<-b.Started()
	for _, topic := range []string{"notes.written.v1", "notes.read.v1"} {
		if err := b.Publish(t.Context(), &postrider.Message{ID: topic, Type: topic}); err != nil {
			t.Fatal(err)
		}
	}
	waitLetters(t, b, bus.LetterFilter{}, 2)
	broken.Store(false)
	n, err := b.DeadLetters().ReplayAll(t.Context(), bus.LetterFilter{Topic: "notes.read.v1"}, clerk)
	if n != 1 || err != nil {
		t.Fatalf("replayed %d, %v", n, err)
	}
	if m := <-got; m.Topic != "notes.read.v1" || m.ID != "notes.read.v1" {
		t.Errorf("got %+v", m)
	}
}

func TestReplayThatFailsAgainComesBack(t *testing.T) {
	t.Parallel()
	o := newOffice(t)
	o.publish(t, 3)
	for round := 1; round <= 3; round++ {
		// What comes back while the replay runs is not taken again, or it would never end.
		n, err := o.bus.DeadLetters().ReplayAll(t.Context(), bus.LetterFilter{}, clerk)
		if n != 3 || err != nil {
			t.Fatalf("round %d: replayed %d, %v", round, n, err)
		}
		for range 3 {
			if d := <-o.attempts; d.Attempt != 1 {
				t.Errorf("round %d: attempt %d, want 1", round, d.Attempt)
			}
		}
		for _, l := range waitLetters(t, o.bus, bus.LetterFilter{}, 3) {
			if l.Redrives != round || l.Attempts != 1 || l.Topic != "notes.written.v1" || l.Stream != "NOTES" {
				t.Errorf("round %d: letter is %+v", round, l)
			}
		}
	}
}

func TestReplayTwiceIsHandledOnce(t *testing.T) {
	t.Parallel()
	o := newOffice(t)
	letter := o.publish(t, 1)[0]
	o.broken.Store(false)
	// A crash after the message was published again and before the letter was removed, by a log that is full.
	js, err := jetstream.New(o.nc)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(t.Context(), "DEAD_LETTERS")
	if err != nil {
		t.Fatal(err)
	}
	cfg := stream.CachedInfo().Config
	cfg.MaxMsgs = 1
	if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if n, err := o.bus.DeadLetters().Replay(t.Context(), []uint64{letter.Sequence}, clerk); n != 0 || err == nil {
		t.Fatalf("replayed %d, %v: the action could not be recorded", n, err)
	}
	<-o.ids
	waitLetters(t, o.bus, bus.LetterFilter{}, 1) // not lost
	cfg.MaxMsgs = -1
	if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if n, err := o.bus.DeadLetters().Replay(t.Context(), []uint64{letter.Sequence}, clerk); n != 1 || err != nil {
		t.Fatalf("replayed %d, %v", n, err)
	}
	waitLetters(t, o.bus, bus.LetterFilter{}, 0)
	own, err := js.Stream(t.Context(), "SCHEDULES")
	if err != nil {
		t.Fatal(err)
	}
	if n := own.CachedInfo().State.LastSeq; n != 1 {
		t.Errorf("%d re-drives were stored, want 1", n)
	}
}

func TestReplayWhatNobodyWouldGet(t *testing.T) {
	t.Parallel()
	o := newOffice(t)
	letters := o.publish(t, 2)
	js, err := o.nc.JetStream()
	if err != nil {
		t.Fatal(err)
	}
	retired := o.bus.DeadLetters()
	msg := nats.NewMsg("dead.retired.notes.written.v1")
	msg.Header.Set("Postrider-Group", "retired")
	msg.Header.Set("Postrider-Topic", "notes.written.v1")
	if _, err := js.PublishMsg(msg); err != nil {
		t.Fatal(err)
	}
	o.broken.Store(false)
	n, err := retired.ReplayAll(t.Context(), bus.LetterFilter{}, clerk)
	if n != 2 || !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), "group retired does not subscribe") {
		t.Errorf("replayed %d, %v: want the two that can be, and an error for the third", n, err)
	}
	postridertest.Eventually(t, wantCount(o.tester.distinct, 2))
	if left := waitLetters(t, o.bus, bus.LetterFilter{}, 1); left[0].Group != "retired" {
		t.Errorf("left is %+v", left[0])
	}
	if n, err := retired.Replay(t.Context(), []uint64{letters[0].Sequence}, clerk); n != 0 || !errors.Is(err, postrider.NotFound) {
		t.Errorf("replayed %d, %v: want NotFound for a letter that has gone", n, err)
	}
}

func TestDiscardDeadLetters(t *testing.T) {
	t.Parallel()
	o := newOffice(t)
	letters := o.publish(t, 3)
	d := o.bus.DeadLetters()
	if n, err := d.Discard(t.Context(), []uint64{letters[0].Sequence}, clerk); n != 1 || err != nil {
		t.Fatalf("discarded %d, %v", n, err)
	}
	if left := waitLetters(t, o.bus, bus.LetterFilter{}, 2); left[0].Sequence != letters[1].Sequence {
		t.Errorf("left are %+v", left)
	}
	if _, err := d.Get(t.Context(), letters[0].Sequence); !errors.Is(err, postrider.NotFound) {
		t.Errorf("get: %v, want NotFound", err)
	}
	if n, err := d.DiscardAll(t.Context(), bus.LetterFilter{Cause: "on fire"}, clerk); n != 2 || err != nil {
		t.Fatalf("discarded %d, %v", n, err)
	}
	waitLetters(t, o.bus, bus.LetterFilter{}, 0)
	log, next, err := d.Log(t.Context(), bus.LetterFilter{}, 0, 2)
	if err != nil || len(log) != 2 || next != log[1].Sequence || log[0].Done != "discard" || log[0].By != clerk.By {
		t.Fatalf("log is %+v, next %d, %v", log, next, err)
	}
	if _, err := d.Get(t.Context(), log[0].Sequence); !errors.Is(err, postrider.NotFound) {
		t.Errorf("a log entry is taken for a letter: %v", err)
	}
	if log, next, err = d.Log(t.Context(), bus.LetterFilter{}, next, 2); err != nil || len(log) != 1 || next != 0 {
		t.Errorf("second page is %+v, next %d, %v", log, next, err)
	}
}

func TestListDeadLetters(t *testing.T) {
	t.Parallel()
	o := newOffice(t)
	const letters = 600 // more than one request reads
	o.publish(t, letters)
	if err := o.nc.Publish("notes.written.v1", []byte("hello")); err != nil {
		t.Fatal(err)
	}
	waitLetters(t, o.bus, bus.LetterFilter{Group: "archive"}, 1)
	waitLetters(t, o.bus, bus.LetterFilter{Group: "tester", Code: postrider.InvalidArgument}, 1)
	d := o.bus.DeadLetters()
	var all []bus.DeadLetter
	for after, more := uint64(0), true; more; more = after != 0 {
		page, next, err := d.List(t.Context(), bus.LetterFilter{}, after, 250)
		if err != nil {
			t.Fatal(err)
		}
		all, after = append(all, page...), next
	}
	if len(all) != letters+2 {
		t.Fatalf("%d letters on all pages, want %d", len(all), letters+2)
	}
	var times []time.Time // in the order of the clock, which need not be that of the stream
	for i, l := range all {
		times = append(times, l.At)
		if i > 0 && l.Sequence <= all[i-1].Sequence {
			t.Fatalf("letter %d comes after %d", l.Sequence, all[i-1].Sequence)
		}
	}
	slices.SortFunc(times, time.Time.Compare)
	for name, c := range map[string]struct {
		f    bus.LetterFilter
		want int
	}{
		"group":       {bus.LetterFilter{Group: "archive"}, 1},
		"topic":       {bus.LetterFilter{Topic: "notes.*.v1"}, letters + 2},
		"no topic":    {bus.LetterFilter{Topic: "notes.other.v1"}, 0},
		"code":        {bus.LetterFilter{Code: postrider.FailedPrecondition}, letters},
		"cause":       {bus.LetterFilter{Cause: "note 17:"}, 1},
		"fingerprint": {bus.LetterFilter{Fingerprint: all[0].Fingerprint}, letters},
		"from":        {bus.LetterFilter{From: times[5]}, letters + 2 - 5},
		"to":          {bus.LetterFilter{To: times[5]}, 5},
		"both":        {bus.LetterFilter{From: times[2], To: times[5], Topic: "notes.>"}, 3},
	} {
		if got, _, err := d.List(t.Context(), c.f, 0, 1000); err != nil || len(got) != c.want {
			t.Errorf("%s: %d letters, %v, want %d", name, len(got), err, c.want)
		}
	}
	groups, err := d.Groups(t.Context(), bus.LetterFilter{})
	if err != nil || len(groups) != 2 {
		t.Fatalf("groups are %+v, %v", groups, err)
	}
	if g := groups[0]; g.Count != letters || g.Code != postrider.FailedPrecondition || g.First.After(g.Last) ||
		strings.Join(g.Groups, " ") != "tester" || strings.Join(g.Topics, " ") != "notes.written.v1" {
		t.Errorf("the largest group is %+v", g)
	}
	if g := groups[1]; g.Count != 2 || strings.Join(g.Groups, " ") != "archive tester" {
		t.Errorf("the other group is %+v", g)
	}
}

func TestDeadLetterOfTheLargestMessage(t *testing.T) {
	t.Parallel()
	o := newOffice(t)
	o.broken.Store(false)
	msg := &nats.Msg{Subject: "notes.written.v1", Data: make([]byte, o.nc.MaxPayload())}
	if err := o.nc.PublishMsg(msg); err != nil {
		t.Fatal(err)
	}
	letter := waitLetters(t, o.bus, bus.LetterFilter{Group: "tester"}, 1)[0]
	d := o.bus.DeadLetters()
	whole, err := d.Get(t.Context(), letter.Sequence)
	if err != nil || len(whole.Data) != len(msg.Data) {
		t.Fatalf("data of %d bytes, %v, want %d", len(whole.Data), err, len(msg.Data))
	}
	edited, err := d.Edit(t.Context(), letter.Sequence, func(m *postrider.Message) error {
		m.ID, m.Source, m.Type, m.ContentType = "1", "//test", "notes.written.v1", "application/json"
		m.Data = []byte(`{"n":5}`)
		return nil
	}, clerk)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := d.Replay(t.Context(), []uint64{edited}, clerk); n != 1 || err != nil {
		t.Fatalf("replayed %d, %v", n, err)
	}
	postridertest.Eventually(t, wantCount(o.tester.distinct, 1))
	// Its own size leaves no room for a header.
	other := waitLetters(t, o.bus, bus.LetterFilter{Group: "archive"}, 1)[0]
	if n, err := d.Replay(t.Context(), []uint64{other.Sequence}, clerk); n != 0 || !errors.Is(err, postrider.ResourceExhausted) {
		t.Errorf("replayed %d, %v", n, err)
	}
	js, err := jetstream.New(o.nc)
	if err != nil {
		t.Fatal(err)
	}
	notes, err := js.Stream(t.Context(), "NOTES")
	if err != nil {
		t.Fatal(err)
	}
	if err := notes.DeleteMsg(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Get(t.Context(), other.Sequence); !errors.Is(err, postrider.DataLoss) {
		t.Errorf("get: %v, want DataLoss", err)
	}
}

func TestActionsAndFiltersAreChecked(t *testing.T) {
	t.Parallel()
	b := newBus(t, postridertest.NATS(t))
	d := b.DeadLetters()
	ctx := t.Context()
	if letters, next, err := d.List(ctx, bus.LetterFilter{}, 0, 0); len(letters) != 0 || next != 0 || err != nil {
		t.Errorf("without a stream: %v, %v", letters, err)
	}
	if _, err := d.Get(ctx, 1); !errors.Is(err, postrider.NotFound) {
		t.Errorf("without a stream: %v", err)
	}
	for _, a := range []bus.Action{{By: "me"}, {Why: "because"}, {By: "me", Why: strings.Repeat("x", 1<<20)}} {
		_, replay := d.ReplayAll(ctx, bus.LetterFilter{}, a)
		_, discard := d.Discard(ctx, nil, a)
		_, edit := d.Edit(ctx, 1, func(*postrider.Message) error { return nil }, a)
		for _, err := range []error{replay, discard, edit} {
			if !errors.Is(err, postrider.InvalidArgument) || !strings.Contains(err.Error(), "Action.") {
				t.Errorf("error is %v", err)
			}
		}
	}
	for _, f := range []bus.LetterFilter{{Group: "*"}, {Topic: "a b"}} {
		if _, _, err := d.List(ctx, f, 0, 0); !errors.Is(err, postrider.InvalidArgument) {
			t.Errorf("list %+v: %v", f, err)
		}
	}
	if _, _, err := d.List(ctx, bus.LetterFilter{}, 0, -1); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("limit -1: %v", err)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := d.Replay(cancelled, []uint64{1}, clerk); !errors.Is(err, postrider.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestDeadLetterRetention(t *testing.T) {
	t.Parallel()
	o := newOffice(t, func(c *bus.Config) { c.DeadLetters = bus.Stream{Name: "LOST", MaxAge: time.Hour} })
	js, err := jetstream.New(o.nc)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), "LOST")
	if err != nil {
		t.Fatal(err)
	}
	if cfg := s.CachedInfo().Config; cfg.MaxAge != time.Hour {
		t.Errorf("the stream keeps letters for %v", cfg.MaxAge)
	}
}
