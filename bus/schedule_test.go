package bus_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// arrivals subscribes to noted and returns the channel that its messages come on.
func arrivals(t *testing.T, b *bus.Bus) <-chan *postrider.Message {
	t.Helper()
	got := make(chan *postrider.Message, 1000)
	h := noted.Handler(func(_ context.Context, e postrider.Event[note]) error { got <- e.Message; return nil })
	if err := b.Subscribe(h, bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	return got
}

func TestDelayedMessagesSurviveTheServer(t *testing.T) {
	t.Parallel()
	srv := postridertest.NewNATS(t)
	nc := srv.Connect()
	b := newBus(t, nc)
	got := arrivals(t, b)
	run(t, b)
	<-b.Started()
	const messages = 50
	at := time.Now().Add(time.Second)
	var msgs []*postrider.Message
	for i := range messages {
		m, err := noted.Message(t.Context(), &note{N: i}, postrider.At(at), postrider.MessageID(fmt.Sprintf("n %d.*", i)))
		if err != nil {
			t.Fatal(err)
		}
		msgs = append(msgs, m)
	}
	for range 2 { // what a relay sends twice is sent once
		if err := b.Publish(t.Context(), msgs...); err != nil {
			t.Fatal(err)
		}
	}
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(t.Context(), "NOTES")
	if err != nil {
		t.Fatal(err)
	}
	if n := stream.CachedInfo().State.Msgs; n != 0 && time.Now().Before(at) {
		t.Errorf("%d messages are in the stream before their time", n)
	}
	srv.Stop()
	srv.Start()
	ids := map[string]bool{}
	for range messages {
		m := <-got
		ids[m.ID] = true
		if m.Delivery.Stored.Before(at) {
			t.Errorf("message %s was stored %v early", m.ID, at.Sub(m.Delivery.Stored))
		}
		if m.Source != "//test/notes" || m.Topic != "notes.written.v1" || m.Delivery.Stream != "NOTES" || m.Delivery.Attempt != 1 {
			t.Errorf("message came as %+v", m)
		}
	}
	if len(ids) != messages {
		t.Errorf("%d different messages came, want %d", len(ids), messages)
	}
	// Sent once more, now that their time is over, they are known to the stream.
	if err := b.Publish(t.Context(), msgs...); err != nil {
		t.Fatal(err)
	}
	if n := len(stored(t, nc, "NOTES")); n != messages {
		t.Errorf("the stream has %d messages, want %d", n, messages)
	}
	emptyOwnStream(t, js)
}

func TestDelayedMessageTakesAnotherTime(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	got := arrivals(t, b)
	run(t, b)
	id := postrider.MessageID("n-1")
	if err := noted.Publish(t.Context(), b, &note{N: 1}, id, postrider.Delay(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if err := noted.Publish(t.Context(), b, &note{N: 2}, id, postrider.Delay(300*time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if m := <-got; string(m.Data) != `{"n":2}` {
		t.Errorf("got %s, want what was published last", m.Data)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	emptyOwnStream(t, js)
	// A time that has passed means at once.
	if err := noted.Publish(t.Context(), b, &note{N: 3}, postrider.At(time.Now().Add(-time.Hour))); err != nil {
		t.Fatal(err)
	}
	if n := len(stored(t, nc, "NOTES")); n != 2 {
		t.Errorf("the stream has %d messages, want 2", n)
	}
}

func TestCancel(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*bus.Config){
		"binary":        func(*bus.Config) {},
		"compact":       func(c *bus.Config) { c.Mode = bus.Compact },
		"no ids":        func(c *bus.Config) { c.AllowDuplicates = true },
		"with a prefix": func(c *bus.Config) { c.Prefix = "staging.eu" },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testCancel(t, change)
		})
	}
}

func testCancel(t *testing.T, change func(*bus.Config)) {
	t.Helper()
	nc := postridertest.NATS(t)
	b := newBus(t, nc, change)
	cancel := func(id string, want bool) {
		t.Helper()
		if in, err := b.Cancel(t.Context(), id); err != nil || in != want {
			t.Errorf("Cancel(%s) = %v, %v, want %v", id, in, err, want)
		}
	}
	cancel("before any schedule", false)
	got := arrivals(t, b)
	run(t, b)
	if err := noted.Publish(t.Context(), b, &note{N: 1}, postrider.MessageID("n 1"), postrider.Delay(time.Hour)); err != nil {
		t.Fatal(err)
	}
	cancel("n 2", false)
	cancel("n 1", true)
	cancel("n 1", false)
	if err := noted.Publish(t.Context(), b, &note{N: 2}, postrider.MessageID("n 1"), postrider.Delay(300*time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if m := <-got; string(m.Data) != `{"n":2}` {
		t.Errorf("got %s, want the second message", m.Data)
	}
	cancel("n 1", false)
}

// Cancel tells the truth also when it comes at the moment of delivery.
func TestCancelRace(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	arrived := arrivals(t, b)
	run(t, b)
	const messages = 200
	at := time.Now().Add(time.Second)
	var msgs []*postrider.Message
	for i := range messages {
		m, err := noted.Message(t.Context(), &note{N: i}, postrider.At(at), postrider.MessageID(fmt.Sprint(i)))
		if err != nil {
			t.Fatal(err)
		}
		msgs = append(msgs, m)
	}
	if err := b.Publish(t.Context(), msgs...); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	cancelled := map[string]bool{}
	var wg sync.WaitGroup
	start := time.NewTimer(time.Until(at.Add(-10 * time.Millisecond)))
	<-start.C
	for c := range 4 {
		wg.Go(func() {
			for i := c; i < messages; i += 4 {
				id := fmt.Sprint(messages - 1 - i) // against the order in which the server sends
				in, err := b.Cancel(t.Context(), id)
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				cancelled[id] = in
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	// The last message is due after all others: what it finds is all there will be.
	if err := noted.Publish(t.Context(), b, &note{N: -1}, postrider.MessageID("last"), postrider.Delay(time.Second)); err != nil {
		t.Fatal(err)
	}
	came := map[string]bool{}
	for !came["last"] {
		came[(<-arrived).ID] = true
	}
	in := 0
	for id, c := range cancelled {
		if c {
			in++
		}
		if c == came[id] {
			t.Errorf("message %s: cancelled is %v, delivered is %v", id, c, came[id])
		}
	}
	t.Logf("%d of %d were cancelled in time", in, messages)
}

func TestDelayErrors(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	stray := postrider.NewTopic[note]("stray.v1")
	for name, c := range map[string]struct {
		topic *postrider.Topic[note]
		opts  []postrider.PublishOption
		code  postrider.Code
		text  string
	}{
		"too far":        {noted, []postrider.PublishOption{postrider.At(time.Date(2300, 1, 1, 0, 0, 0, 0, time.UTC))}, postrider.InvalidArgument, "2261"},
		"no stream":      {stray, []postrider.PublishOption{postrider.Delay(time.Hour)}, postrider.FailedPrecondition, "no stream takes"},
		"negative delay": {noted, []postrider.PublishOption{postrider.Delay(-1)}, postrider.InvalidArgument, "Delay"},
		"zero time":      {noted, []postrider.PublishOption{postrider.At(time.Time{})}, postrider.InvalidArgument, "At"},
		"no time":        {noted, []postrider.PublishOption{postrider.WithExtension("deliverat", "soon")}, postrider.InvalidArgument, "deliverat"},
		"no expiry":      {noted, []postrider.PublishOption{postrider.Expires(0)}, postrider.InvalidArgument, "Expires"},
		"expires before": {noted, []postrider.PublishOption{postrider.Delay(time.Hour), postrider.Expires(time.Minute)}, postrider.InvalidArgument, "expires before"},
		"expired":        {noted, []postrider.PublishOption{postrider.WithExtension("expirytime", time.Now())}, postrider.DeadlineExceeded, "expired"},
	} {
		err := c.topic.Publish(t.Context(), b, &note{}, c.opts...)
		if !errors.Is(err, c.code) || !strings.Contains(err.Error(), c.text) || postrider.Retryable(err) {
			t.Errorf("%s: error is %v, want %v with %q, for good", name, err, c.code, c.text)
		}
	}
	// A stream of that name which cannot do it.
	other := postridertest.NATS(t)
	js, err := jetstream.New(other)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "SCHEDULES", Subjects: []string{"sched.>"}}); err != nil {
		t.Fatal(err)
	}
	err = noted.Publish(t.Context(), newBus(t, other), &note{}, postrider.Delay(time.Hour))
	if postrider.Retryable(err) || err == nil || !strings.Contains(err.Error(), "SCHEDULES") {
		t.Errorf("with another stream of that name: %v", err)
	}
}

func TestExpiredMessagesAreDeadLetters(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	expires := postrider.Expires(50 * time.Millisecond)
	if err := noted.Publish(t.Context(), b, &note{N: 1}, expires); err != nil {
		t.Fatal(err)
	}
	if err := tally.Send(t.Context(), b, &note{N: 2}, expires, postrider.ReplyTo("replies.test")); err != nil {
		t.Fatal(err)
	}
	if err := noted.Publish(t.Context(), b, &note{N: 3}, postrider.Expires(time.Hour)); err != nil {
		t.Fatal(err)
	}
	time50 := time.NewTimer(60 * time.Millisecond)
	<-time50.C
	got := arrivals(t, b)
	h := tally.Handler(func(context.Context, *note) (*note, error) { t.Error("the expired command ran"); return &note{}, nil })
	if err := b.Subscribe(h); err != nil {
		t.Fatal(err)
	}
	replies := make(chan *postrider.Message, 1)
	onReply := postrider.RawHandler("replies.test", func(_ context.Context, m *postrider.Message) error { replies <- m; return nil })
	if err := b.Subscribe(onReply, bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	if m := <-got; string(m.Data) != `{"n":3}` {
		t.Errorf("handled %s, want only what has not expired", m.Data)
	}
	if _, err := tally.Response(<-replies); !errors.Is(err, postrider.DeadlineExceeded) {
		t.Errorf("the sender of the expired command was told %v", err)
	}
	postridertest.Eventually(t, func() error {
		letters, _, err := b.DeadLetters().List(t.Context(), bus.LetterFilter{}, 0, 0)
		if err == nil && (len(letters) != 1 || letters[0].Code != postrider.DeadlineExceeded || !strings.Contains(letters[0].Cause, "expired")) {
			err = fmt.Errorf("dead letters are %+v, want the expired event", letters)
		}
		return err
	})
}

func TestSchedule(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	got := arrivals(t, b)
	run(t, b)
	schedule := func(spec, zone string, n int) error {
		m, err := noted.Message(t.Context(), &note{N: n})
		if err != nil {
			t.Fatal(err)
		}
		return b.Schedule(t.Context(), bus.Schedule{Name: "tick", Spec: spec, TimeZone: zone, Message: m})
	}
	for range 2 { // as at each start of a service
		if err := schedule("@every 1s", "", 1); err != nil {
			t.Fatal(err)
		}
	}
	if s := stored(t, nc, "SCHEDULES"); len(s) != 1 || s[0].Sequence != 1 {
		t.Errorf("the same schedule was stored again: %d messages", len(s))
	}
	first, second := <-got, <-got
	if first.ID == second.ID || !first.Time.Before(second.Time) || first.Source != "//test/notes" || first.Extension("schedule") != "tick" {
		t.Errorf("the messages are not each one of its own: %+v, %+v", first, second)
	}
	if err := schedule("* * * * * *", "Europe/Warsaw", 2); err != nil {
		t.Fatal(err)
	}
	for m := range got {
		if string(m.Data) == `{"n":2}` {
			break
		}
	}
	for _, want := range []bool{true, false} {
		if had, err := b.Unschedule(t.Context(), "tick"); err != nil || had != want {
			t.Errorf("Unschedule = %v, %v, want %v", had, err, want)
		}
	}
	for name, bad := range map[string][2]string{
		"too often": {"@every 10ms", ""}, "five fields": {"30 8 * * *", ""}, "one time": {"@at 2030-01-01T00:00:00Z", ""},
		"empty": {"", ""}, "unknown zone": {"0 30 8 * * *", "Europe/Atlantis"}, "never": {"0 0 0 31 2 *", ""},
		"zone of an interval": {"@every 1h", "Europe/Warsaw"},
	} {
		if err := schedule(bad[0], bad[1], 3); !errors.Is(err, postrider.InvalidArgument) {
			t.Errorf("%s: error is %v, want InvalidArgument", name, err)
		}
	}
	if err := b.Schedule(t.Context(), bus.Schedule{Name: "a.b", Spec: "@daily"}); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("bad name: %v", err)
	}
	if err := b.Schedule(t.Context(), bus.Schedule{Name: "none", Spec: "@daily"}); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("no message: %v", err)
	}
}
