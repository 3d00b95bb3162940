package bus_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

const durable = "tester-notes_written_v1"

// quick is a policy that does not keep a test waiting.
var quick = bus.Retry(postrider.RetryPolicy{Attempts: 3, Initial: time.Millisecond, Max: 2 * time.Millisecond})

func wantCount(got func() int, want int) func() error {
	return func() error {
		if n := got(); n != want {
			return fmt.Errorf("got %d, want %d", n, want)
		}
		return nil
	}
}

func TestSubscribeHandlesEachMessageInEachGroup(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	const messages = 200
	var mails, bills seen
	for range 2 { // two instances of the service share each group
		b := newBus(t, nc)
		for group, s := range map[string]*seen{"mailer": &mails, "billing": &bills} {
			h := noted.Handler(func(_ context.Context, e postrider.Event[note]) error { s.add(*e.Value); return nil })
			if err := b.Subscribe(h, bus.Group(group)); err != nil {
				t.Fatal(err)
			}
		}
		run(t, b)
		<-b.Started()
	}
	b := newBus(t, nc)
	for i := range messages {
		if err := noted.Publish(t.Context(), b, &note{N: i}); err != nil {
			t.Fatal(err)
		}
	}
	postridertest.Eventually(t, wantCount(mails.distinct, messages))
	postridertest.Eventually(t, wantCount(bills.distinct, messages))
	if mails.count() != messages || bills.count() != messages {
		t.Errorf("handled %d and %d times, want %d: nothing failed", mails.count(), bills.count(), messages)
	}
}

func TestEventsAreLinkedToTheirCause(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	answered := postrider.NewTopic[note]("notes.answered.v1")
	got := make(chan *postrider.Message, 1)
	for _, h := range []postrider.Handler{
		noted.Handler(func(ctx context.Context, e postrider.Event[note]) error { return answered.Publish(ctx, b, e.Value) }),
		answered.Handler(func(_ context.Context, e postrider.Event[note]) error { got <- e.Message; return nil }),
	} {
		if err := b.Subscribe(h, bus.From(bus.DeliverAll)); err != nil {
			t.Fatal(err)
		}
	}
	run(t, b)
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	ctx := postrider.ContextWithTrace(t.Context(), parent, "vendor=1")
	if err := noted.Publish(ctx, b, &note{Text: "größer als 100 %"}, postrider.MessageID("first")); err != nil {
		t.Fatal(err)
	}
	m := <-got
	for name, want := range map[string]string{
		postrider.ExtCausationID: "first", postrider.ExtCorrelationID: "first",
		postrider.ExtTraceParent: parent, postrider.ExtTraceState: "vendor=1",
	} {
		if v := m.Extension(name); v != want {
			t.Errorf("%s = %q, want %q", name, v, want)
		}
	}
	if !strings.Contains(string(m.Data), "größer als 100 %") {
		t.Errorf("data is %s: the text was changed on the way", m.Data)
	}
}

func TestRetryThenSuccess(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	var attempts atomic.Int64
	done := make(chan int, 1)
	h := noted.Handler(func(_ context.Context, e postrider.Event[note]) error {
		if attempts.Add(1) < 3 {
			return errors.New("not yet")
		}
		done <- e.Delivery.Attempt
		return nil
	})
	if err := b.Subscribe(h, quick, bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	if err := noted.Publish(t.Context(), b, &note{}); err != nil {
		t.Fatal(err)
	}
	if attempt := <-done; attempt != 3 {
		t.Errorf("succeeded at attempt %d, want 3", attempt)
	}
	postridertest.Eventually(t, func() error {
		if s := b.Stats(); s.Retried != 2 || s.Handled != 1 || s.DeadLettered != 0 {
			return fmt.Errorf("stats are %+v, want 2 retried, 1 handled", s)
		}
		return nil
	})
}

func TestDeadLetters(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	var good seen
	h := noted.Handler(func(_ context.Context, e postrider.Event[note]) error {
		switch e.Value.Text {
		case "never":
			return errors.New("the printer is on fire")
		case "wrong":
			return postrider.Errorf(postrider.NotFound, "no such reader")
		case "panic":
			panic("ouch")
		}
		good.add(*e.Value)
		return nil
	})
	if err := b.Subscribe(h, quick, bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	for i, text := range []string{"never", "wrong", "panic", "Straße"} {
		if err := noted.Publish(t.Context(), b, &note{N: i, Text: text}); err != nil {
			t.Fatal(err)
		}
	}
	// What other programs send: broken JSON, an unknown encoding, and no CloudEvent at all.
	broken, _ := noted.Message(t.Context(), &note{})
	broken.Data = []byte(`{"n":`)
	odd, _ := noted.Message(t.Context(), &note{})
	odd.ContentType = "application/x-unheard-of"
	if err := b.Publish(t.Context(), broken, odd); err != nil {
		t.Fatal(err)
	}
	if err := nc.Publish("notes.written.v1", []byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := noted.Publish(t.Context(), b, &note{N: 7}); err != nil {
		t.Fatal(err)
	}
	postridertest.Eventually(t, wantCount(good.count, 2))
	var letters []bus.DeadLetter
	postridertest.Eventually(t, func() (err error) {
		if letters, _, err = b.DeadLetters().List(t.Context(), bus.LetterFilter{}, 0, 0); err == nil && len(letters) != 6 {
			err = fmt.Errorf("%d dead letters, want 6", len(letters))
		}
		return err
	})
	want := []struct {
		cause    string
		code     postrider.Code
		attempts int
	}{
		{"the printer is on fire", postrider.Unknown, 3},
		{"no such reader", postrider.NotFound, 1},
		{"ouch", postrider.Internal, 3},
		{"JSON", postrider.InvalidArgument, 1},
		{`no codec for content type "application/x-unheard-of": known are application/json`, postrider.InvalidArgument, 1},
		{"not a CloudEvent", postrider.InvalidArgument, 1},
	}
	for _, w := range want {
		found := false
		for _, l := range letters {
			if strings.Contains(l.Cause, w.cause) {
				found = true
				if l.Code != w.code || l.Attempts != w.attempts || l.Group != "tester" || l.Topic != "notes.written.v1" ||
					l.Stream != "NOTES" || l.Origin == 0 || l.At.IsZero() {
					t.Errorf("dead letter is %+v, want code %v after %d attempts", l, w.code, w.attempts)
				}
			}
		}
		if !found {
			t.Errorf("no dead letter has the cause %q", w.cause)
		}
	}
	for _, l := range letters {
		if strings.Contains(l.Cause, "printer") && (l.Message.Type != "notes.written.v1" || string(l.Message.Data) != `{"n":0,"text":"never"}`) {
			t.Errorf("the message itself was changed: %+v", l.Message)
		}
	}
	// The list may show a dead letter before its acknowledgement is here.
	postridertest.Eventually(t, wantCount(func() int { return int(b.Stats().DeadLettered) }, 6))
}

func TestRawHandlerTakesAnything(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	got := make(chan *postrider.Message, 1)
	h := postrider.RawHandler("notes.raw", func(_ context.Context, m *postrider.Message) error { got <- m; return nil })
	if err := b.Subscribe(h, bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	<-b.Started()
	if err := nc.Publish("notes.raw", []byte("hello")); err != nil {
		t.Fatal(err)
	}
	if m := <-got; string(m.Data) != "hello" || m.Topic != "notes.raw" || m.ID != "" {
		t.Errorf("got %+v", m)
	}
}

func TestWildcards(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	var mu sync.Mutex
	got := map[string][]string{}
	for _, pattern := range []string{"notes.>", "notes.*.v1", "notes.raw"} {
		h := postrider.RawHandler(pattern, func(_ context.Context, m *postrider.Message) error {
			mu.Lock()
			defer mu.Unlock()
			got[pattern] = append(got[pattern], m.Topic)
			return nil
		})
		if err := b.Subscribe(h, bus.From(bus.DeliverAll)); err != nil {
			t.Fatal(err)
		}
	}
	run(t, b)
	<-b.Started()
	for _, topic := range []string{"notes.raw", "notes.written.v1", "notes.a.b.c"} {
		if err := b.Publish(t.Context(), &postrider.Message{ID: topic, Type: topic}); err != nil {
			t.Fatal(err)
		}
	}
	postridertest.Eventually(t, wantCount(func() int { return int(b.Stats().Handled) }, 5))
	mu.Lock()
	defer mu.Unlock()
	for pattern, want := range map[string]int{"notes.>": 3, "notes.*.v1": 1, "notes.raw": 1} {
		if len(got[pattern]) != want {
			t.Errorf("%s got %v, want %d messages", pattern, got[pattern], want)
		}
	}
}

func TestReadsWhatTheGoSDKWrites(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	got := make(chan *postrider.Message, 1)
	h := noted.Handler(func(_ context.Context, e postrider.Event[note]) error { got <- e.Message; return nil })
	if err := b.Subscribe(h, bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	<-b.Started()
	msg := nats.NewMsg("notes.written.v1") // the SDK does not encode values
	for k, v := range map[string]string{
		"ce-specversion": "1.0", "ce-id": "x", "ce-source": "//sdk", "ce-type": "t", "ce-city": "zażółć gęślą 100%",
		"ce-datacontenttype": "application/json",
	} {
		msg.Header[k] = []string{v}
	}
	msg.Data = []byte(`{"n":5}`)
	if err := nc.PublishMsg(msg); err != nil {
		t.Fatal(err)
	}
	if m := <-got; m.Extension("city") != "zażółć gęślą 100%" || m.Source != "//sdk" {
		t.Errorf("got %+v", m)
	}
}

func TestCommandsAreAnswered(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	var calls atomic.Int64
	h := tally.Handler(func(_ context.Context, n *note) (*note, error) {
		calls.Add(1)
		switch n.Text {
		case "no":
			return nil, postrider.Errorf(postrider.FailedPrecondition, "the book is closed")
		case "broken":
			return nil, errors.New("out of ink")
		}
		return &note{N: n.N + 1}, nil
	})
	replies := make(chan *postrider.Message, 10)
	r := postrider.RawHandler("replies.clerk", func(_ context.Context, m *postrider.Message) error { replies <- m; return nil })
	if err := errors.Join(b.Subscribe(h, quick), b.Subscribe(r, bus.From(bus.DeliverAll))); err != nil {
		t.Fatal(err)
	}
	// A command is not lost because its service starts later.
	for _, text := range []string{"yes", "no", "broken"} {
		err := tally.Send(t.Context(), b, &note{N: 1, Text: text}, postrider.MessageID(text),
			postrider.ReplyTo("replies.clerk"), postrider.IdempotencyKey("key-"+text))
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := tally.Send(t.Context(), b, &note{N: 1}); err != nil { // nobody wants the answer to this one
		t.Fatal(err)
	}
	run(t, b)
	for range 3 {
		m := <-replies
		res, err := tally.Response(m)
		switch m.Extension(postrider.ExtCausationID) {
		case "yes":
			if err != nil || res.N != 2 {
				t.Errorf("yes: %+v, %v", res, err)
			}
		case "no":
			if !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), "the book is closed") {
				t.Errorf("no: %v", err)
			}
		case "broken":
			if !postrider.Retryable(err) || !strings.Contains(err.Error(), "out of ink") {
				t.Errorf("broken: %v, want the unknown outcome", err)
			}
		}
		if key := m.Extension(postrider.ExtIdempotencyKey); key != "key-"+m.Extension(postrider.ExtCausationID) {
			t.Errorf("reply to %s has the idempotency key %q", m.Extension(postrider.ExtCausationID), key)
		}
	}
	postridertest.Eventually(t, wantCount(func() int { return int(calls.Load()) }, 6)) // three of them for the broken one
	letters, _, err := b.DeadLetters().List(t.Context(), bus.LetterFilter{}, 0, 0)
	if err != nil || len(letters) != 1 || !strings.Contains(letters[0].Cause, "out of ink") {
		t.Errorf("dead letters are %+v, %v: want the broken command only, a refusal is an answer", letters, err)
	}
}

func TestSlowHandlersKeepTheirMessages(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	var runs atomic.Int64
	started, finish := make(chan struct{}, 10), make(chan struct{})
	h := noted.Handler(func(context.Context, postrider.Event[note]) error {
		runs.Add(1)
		started <- struct{}{}
		<-finish
		return nil
	})
	// One worker, so that the second message waits in the queue while the first is handled.
	if err := b.Subscribe(h, bus.AckWait(time.Second), bus.Concurrency(1), bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	for i := range 2 {
		if err := noted.Publish(t.Context(), b, &note{N: i}); err != nil {
			t.Fatal(err)
		}
	}
	<-started
	// Three times AckWait: the server would have sent both messages again twice.
	timeout := time.NewTimer(3 * time.Second)
	<-timeout.C
	close(finish)
	postridertest.Eventually(t, wantCount(func() int { return int(b.Stats().Handled) }, 2))
	if n := runs.Load(); n != 2 {
		t.Errorf("2 messages were handled %d times", n)
	}
}

func TestDrainLosesNothing(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	const messages = 300
	var got seen
	subscribe := func() *bus.Bus {
		b := newBus(t, nc)
		h := noted.Handler(func(_ context.Context, e postrider.Event[note]) error { got.add(*e.Value); return nil })
		// A message that the first instance kept would come back only after the test's patience.
		if err := b.Subscribe(h, bus.AckWait(10*time.Minute), bus.Concurrency(4), bus.From(bus.DeliverAll)); err != nil {
			t.Fatal(err)
		}
		return b
	}
	pub := newBus(t, nc)
	for i := range messages {
		if err := noted.Publish(t.Context(), pub, &note{N: i}); err != nil {
			t.Fatal(err)
		}
	}
	for range 5 { // rolling deploys in the middle of the work
		before := got.count()
		stop := run(t, subscribe())
		postridertest.Eventually(t, func() error {
			if n := got.count(); n < min(before+20, messages) {
				return fmt.Errorf("handled %d", n)
			}
			return nil
		})
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	}
	run(t, subscribe())
	postridertest.Eventually(t, wantCount(got.distinct, messages))
	if got.count() != messages {
		t.Errorf("handled %d times, want %d: a clean drain doubles nothing", got.count(), messages)
	}
}

func TestDrainWaitsForHandlers(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc, func(c *bus.Config) { c.DrainTimeout = time.Second })
	started, finish := make(chan struct{}), make(chan struct{})
	cancelled := make(chan error, 1)
	h := noted.Handler(func(ctx context.Context, e postrider.Event[note]) error {
		close(started)
		if e.Value.N == 0 {
			<-finish
			return ctx.Err() // must not be cancelled by the end of Run's context
		}
		<-ctx.Done()
		cancelled <- ctx.Err()
		return nil
	})
	if err := b.Subscribe(h, bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	if err := noted.Publish(t.Context(), b, &note{N: 0}); err != nil {
		t.Fatal(err)
	}
	<-started
	cancel()
	select {
	case err := <-done:
		t.Fatalf("Run returned (%v) while a handler was running", err)
	default:
		close(finish)
	}
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if n := b.Stats().Handled; n != 1 {
		t.Errorf("handled %d, want 1", n)
	}
	// A handler that will not end is cancelled at DrainTimeout, and Run says so.
	b = newBus(t, nc, func(c *bus.Config) { c.DrainTimeout = 50 * time.Millisecond })
	started = make(chan struct{})
	if err := b.Subscribe(h, bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	go func() { done <- b.Run(ctx) }()
	if err := noted.Publish(t.Context(), b, &note{N: 1}); err != nil {
		t.Fatal(err)
	}
	<-started
	cancel()
	if err := <-cancelled; !errors.Is(err, context.Canceled) {
		t.Errorf("the handler's context ended with %v", err)
	}
	if err := <-done; !errors.Is(err, postrider.DeadlineExceeded) {
		t.Errorf("Run returned %v, want DeadlineExceeded", err)
	}
}

func TestConsumerSurvivesServerAndConsumerLoss(t *testing.T) {
	t.Parallel()
	srv := postridertest.NewNATS(t)
	nc := srv.Connect(nats.ReconnectWait(20*time.Millisecond), nats.MaxReconnects(-1))
	b := newBus(t, nc)
	var got seen
	h := noted.Handler(func(_ context.Context, e postrider.Event[note]) error { got.add(*e.Value); return nil })
	if err := b.Subscribe(h, bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	if err := noted.Publish(t.Context(), b, &note{N: 1}); err != nil {
		t.Fatal(err)
	}
	postridertest.Eventually(t, wantCount(got.distinct, 1))
	srv.Stop()
	srv.Start()
	if err := noted.Publish(t.Context(), b, &note{N: 2}); err != nil {
		t.Fatal(err)
	}
	postridertest.Eventually(t, wantCount(got.distinct, 2))
	js, err := nc.JetStream()
	if err != nil {
		t.Fatal(err)
	}
	if err := js.DeleteConsumer("NOTES", durable); err != nil {
		t.Fatal(err)
	}
	if err := noted.Publish(t.Context(), b, &note{N: 3}); err != nil {
		t.Fatal(err)
	}
	postridertest.Eventually(t, wantCount(got.distinct, 3))
}

func TestSubscribeErrors(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	h := noted.Handler(func(context.Context, postrider.Event[note]) error { return nil })
	b := newBus(t, nc)
	if err := b.Subscribe(h); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		h    postrider.Handler
		opt  bus.SubscribeOption
		code postrider.Code
	}{
		"zero handler": {postrider.Handler{}, bus.Group("x"), postrider.InvalidArgument},
		"second":       {h, bus.Group("tester"), postrider.AlreadyExists},
		"group":        {h, bus.Group("a.b"), postrider.InvalidArgument},
		"concurrency":  {h, bus.Concurrency(-1), postrider.InvalidArgument},
		"ack wait":     {h, bus.AckWait(time.Millisecond), postrider.InvalidArgument},
		"position":     {h, bus.From(9), postrider.InvalidArgument},
		"rate":         {h, bus.RateLimit(-1), postrider.InvalidArgument},
		"breaker":      {h, bus.CircuitBreaker(1, 0), postrider.InvalidArgument},
		"retry":        {h, bus.Retry(postrider.RetryPolicy{Multiplier: 0.5}), postrider.InvalidArgument},
	} {
		if err := b.Subscribe(c.h, c.opt); !errors.Is(err, c.code) {
			t.Errorf("%s: error is %v, want %v", name, err, c.code)
		}
	}
	stop := run(t, b)
	<-b.Started()
	if err := b.Subscribe(h, bus.Group("late")); !errors.Is(err, postrider.FailedPrecondition) {
		t.Errorf("after Run: %v", err)
	}
	if err := b.Run(t.Context()); !errors.Is(err, postrider.FailedPrecondition) {
		t.Errorf("second Run: %v", err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	lost := newBus(t, nc)
	if err := lost.Subscribe(postrider.RawHandler("elsewhere", func(context.Context, *postrider.Message) error { return nil })); err != nil {
		t.Fatal(err)
	}
	if err := lost.Run(t.Context()); !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), "elsewhere") {
		t.Errorf("Run without a stream: %v", err)
	}
}

func TestMiddlewareSeesEveryMessage(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	var mu sync.Mutex
	var calls []string
	mw := func(name string) postrider.Middleware {
		return func(next postrider.HandlerFunc) postrider.HandlerFunc {
			return func(ctx context.Context, m *postrider.Message) (*postrider.Message, error) {
				mu.Lock()
				calls = append(calls, name)
				mu.Unlock()
				return next(ctx, m)
			}
		}
	}
	b := newBus(t, nc, func(c *bus.Config) { c.Middleware = []postrider.Middleware{mw("outer"), mw("inner")} })
	if err := b.Subscribe(noted.Handler(func(context.Context, postrider.Event[note]) error { return nil }), bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	if err := noted.Publish(t.Context(), b, &note{}); err != nil {
		t.Fatal(err)
	}
	postridertest.Eventually(t, wantCount(func() int { return int(b.Stats().Handled) }, 1))
	mu.Lock()
	defer mu.Unlock()
	if strings.Join(calls, " ") != "outer inner" {
		t.Errorf("called %v", calls)
	}
}
