package bustest

import (
	"bytes"
	"context"
	"errors"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
)

func publishTellsEachMessagesFate(e *env) {
	b := e.open()
	var j journal
	e.must(b.Subscribe(j.handler(), all))
	good1, err1 := written.Message(e.Context(), &note{N: 1})
	bad, err2 := written.Message(e.Context(), &note{N: 2}, postrider.MessageID("control\n"))
	homeless, err3 := written.Message(e.Context(), &note{N: 3})
	wild, err4 := written.Message(e.Context(), &note{N: 4})
	good2, err5 := written.Message(e.Context(), &note{N: 5})
	e.must(errors.Join(err1, err2, err3, err4, err5))
	homeless.Topic, wild.Topic = "nowhere.at.all", "conformance.*"
	var batch *postrider.BatchError
	if err := b.Publish(e.Context(), good1, bad, homeless, wild, good2); !errors.As(err, &batch) || len(batch.Errs) != 5 {
		e.Fatalf("error is %v, want a BatchError for 5 messages", err)
	}
	for i, want := range []error{nil, postrider.InvalidArgument, postrider.FailedPrecondition, postrider.InvalidArgument, nil} {
		if got := batch.Errs[i]; !errors.Is(got, want) {
			e.Errorf("message %d: %v, want %v", i, got, want)
		} else if got != nil && postrider.Retryable(got) {
			e.Errorf("message %d: %v invites to retry what cannot succeed", i, got)
		}
	}
	if err := b.Publish(e.Context(), homeless); !errors.Is(err, postrider.FailedPrecondition) || errors.As(err, &batch) {
		e.Errorf("one message alone: %v, want its own error", err)
	}
	e.run(b)
	j.once(e, 2)
}

func attributesArriveIntact(e *env) {
	b := e.open()
	got := make(chan *postrider.Message, 10)
	const topic = "conformance.raw"
	e.must(b.Subscribe(postrider.RawHandler(topic, func(_ context.Context, m *postrider.Message) error { got <- m; return nil }),
		all, bus.Concurrency(1)))
	e.run(b)
	bytesOfAll := make([]byte, 256)
	for i := range bytesOfAll {
		bytesOfAll[i] = byte(i)
	}
	for _, data := range [][]byte{bytesOfAll, nil} {
		m := &postrider.Message{
			ID: `zażółć "gęślą" 100%`, Source: "//größe.example/a%20b#ü", Type: "日本.v1", Subject: "  spaces, %41 and + 😀 ",
			ContentType: "text/plain; charset=utf-8", DataSchema: "https://example.org/schéma?a=b#c", Topic: topic,
			Time: time.Date(2026, 1, 2, 3, 4, 5, 678_901_234, time.FixedZone("", 2*3600)), Data: data,
		}
		if data == nil {
			m.ID += " again"
		}
		for name, value := range map[string]any{
			"quoted": `"a\b"`, "percent": "%E2%82%AC is not €", "flag": true, "number": -7, "blob": []byte{0, 255}, "edge": "\u00a0x\U0010FFFD",
			postrider.ExtPartitionKey: "Åse", postrider.ExtCorrelationID: "c 1",
		} {
			e.must(m.SetExtension(name, value))
		}
		e.must(b.Publish(e.Context(), m))
		r := <-got
		if !r.Time.Equal(m.Time) || !bytes.Equal(r.Data, m.Data) {
			e.Errorf("time %v and data %q became %v and %q", m.Time, m.Data, r.Time, r.Data)
		}
		if r.Delivery.Attempt != 1 || r.Delivery.Group != "tester" || r.Delivery.Stream != "CONFORMANCE" || r.Delivery.Stored.IsZero() {
			e.Errorf("delivery is %+v", r.Delivery)
		}
		want, have := m.Clone(), r.Clone()
		want.Time, want.Data, want.Delivery, have.Time, have.Data, have.Delivery = time.Time{}, nil, r.Delivery, time.Time{}, nil, r.Delivery
		if !reflect.DeepEqual(want, have) {
			e.Errorf("published\n%+v\nreceived\n%+v", want, have)
		}
	}
}

func differentMessagesAreNotDuplicates(e *env) {
	b := e.open()
	var j journal
	e.must(b.Subscribe(j.handler(), all, bus.Concurrency(1)))
	for i, m := range []struct{ source, id string }{
		{"//a", "1"},
		{"//b", "1"},
		{"//a", "2"},
		{"//a#b", "c"},
		{"//a", "b#c"},
		{"//a", "b%23c"},
		{"//A", "1"},
		{"//a", "é"},
		{"//a", "%C3%A9"},
	} {
		for range 2 { // as one does that has not seen the acknowledgement
			msg, err := written.Message(e.Context(), &note{N: i}, postrider.MessageID(m.id))
			e.must(err)
			msg.Source = m.source
			e.must(b.Publish(e.Context(), msg))
		}
	}
	e.publish(b, &note{N: 9})
	e.run(b)
	j.once(e, 10)
}

func eachGroupHandlesEachMessageOnce(e *env) {
	const messages = 100
	var mails, bills journal
	for range 2 { // two instances of the service share each group
		b := e.open()
		e.must(b.Subscribe(mails.handler(), bus.Group("mailer"), all))
		e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
			bills.add(ev)
			clear(ev.Data) // its own copy
			return ev.SetExtension("spoilt", true)
		}), bus.Group("billing"), all))
		e.run(b)
	}
	e.publish(e.open(), numbered(0, messages)...)
	mails.once(e, messages)
	bills.once(e, messages)
}

func groupsBeginWhereTheySay(e *env) {
	b := e.open()
	e.publish(b, numbered(0, 3)...)
	e.must(tally.Send(e.Context(), b, &note{N: 7}))
	var fresh, past, third, recent journal
	var commands atomic.Int64
	e.must(b.Subscribe(fresh.handler(), bus.Group("fresh"), bus.Concurrency(1)))
	e.must(b.Subscribe(past.handler(), bus.Group("past"), all))
	e.must(b.Subscribe(third.handler(), bus.Group("third"), bus.FromSequence(3)))
	e.must(b.Subscribe(recent.handler(), bus.Group("recent"), bus.FromTime(time.Now().Add(-time.Hour))))
	e.must(b.Subscribe(tally.Handler(func(_ context.Context, n *note) (*note, error) { commands.Add(1); return n, nil })))
	e.run(b)
	e.publish(b, numbered(3, 2)...)
	e.eventually("notes in the group that begins with new ones", fresh.count, 2)
	past.once(e, 5)
	third.once(e, 3)
	recent.once(e, 5)
	if got := fresh.all(); got[0].N != 3 || got[1].N != 4 {
		e.Errorf("the group that begins with new messages got %v", got)
	}
	e.eventually("commands from before the start", func() int { return int(commands.Load()) }, 1)
}

func broadcastReachesEachInstance(e *env) {
	var journals [3]journal
	for i := range journals {
		b := e.open()
		e.must(b.Subscribe(journals[i].handler(), bus.Broadcast()))
		e.run(b)
	}
	e.publish(e.open(), numbered(0, 20)...)
	for i := range journals {
		journals[i].once(e, 20)
	}
}

func wildcardsMatch(e *env) {
	b := e.open()
	var mu sync.Mutex
	got := map[string][]string{}
	for _, pattern := range []string{"conformance.*.v1", "conformance.>"} {
		e.must(b.Subscribe(postrider.RawHandler(pattern, func(_ context.Context, m *postrider.Message) error {
			mu.Lock()
			defer mu.Unlock()
			got[pattern] = append(got[pattern], m.Topic)
			return nil
		}), bus.Concurrency(1)))
	}
	e.run(b)
	for _, topic := range []string{"conformance.a.v1", "conformance.a.v2", "conformance.b.v1", "conformance.v1"} {
		e.must(b.Publish(e.Context(), &postrider.Message{ID: topic, Type: topic}))
	}
	e.eventually("messages", func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(got["conformance.*.v1"]) + len(got["conformance.>"])
	}, 6)
	if list := strings.Join(got["conformance.*.v1"], " "); list != "conformance.a.v1 conformance.b.v1" {
		e.Errorf("conformance.*.v1 matched %s", list)
	}
}

func oneWorkerKeepsTheOrder(e *env) {
	b := e.open()
	var j journal
	e.must(b.Subscribe(j.handler(), bus.Concurrency(1)))
	e.run(b)
	for i := range 10 {
		e.publish(b, numbered(20*i, 20)...)
	}
	j.once(e, 200)
	for i, s := range j.all() {
		if s.N != i {
			e.Fatalf("note %d was handled as number %d", s.N, i)
		}
	}
}

func orderedKeysKeepTheirOrder(e *env) {
	const keys, each = 8, 20
	b := e.open()
	var j journal
	var busy [keys]atomic.Int64
	e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		key := ev.Value.N % keys
		if busy[key].Add(1) > 1 {
			e.Errorf("two messages of key %d are handled at once", key)
		}
		defer busy[key].Add(-1)
		if ev.Value.N/keys%5 == 0 && ev.Delivery.Attempt == 1 {
			return errWeather // the others of its key must wait for it
		}
		j.add(ev)
		return nil
	}), bus.Ordered(), quick, all))
	e.run(b)
	for n := range keys * each {
		e.must(written.Publish(e.Context(), b, &note{N: n}, postrider.Key(strconv.Itoa(n%keys))))
	}
	e.eventually("notes handled", j.distinct, keys*each)
	var next [keys]int // of each key, counted among its notes
	for _, s := range j.all() {
		switch key, n := s.N%keys, s.N/keys; {
		case n > next[key]:
			e.Errorf("of key %d, note %d was handled before note %d", key, n, next[key])
		case n == next[key]: // else it comes again, after a take-over: a machine may stand still for so long
			next[key]++
		}
	}
}

func concurrencyIsReachedAndKept(e *env) {
	b := e.open()
	var inside, most atomic.Int64
	gate := make(chan struct{})
	var j journal
	e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		for n := inside.Add(1); ; {
			if m := most.Load(); n <= m || most.CompareAndSwap(m, n) {
				break
			}
		}
		<-gate
		inside.Add(-1)
		j.add(ev)
		return nil
	}), bus.Concurrency(4), all))
	e.publish(b, numbered(0, 20)...)
	e.run(b)
	e.eventually("handlers at once", func() int { return int(inside.Load()) }, 4)
	close(gate)
	j.once(e, 20)
	if n := most.Load(); n != 4 {
		e.Errorf("%d handlers at once, want 4", n)
	}
}

func eventsAreLinkedToTheirCause(e *env) {
	b := e.open()
	answered := postrider.NewTopic[note]("conformance.answered.v1")
	got := make(chan *postrider.Message, 1)
	e.must(b.Subscribe(written.Handler(func(ctx context.Context, ev postrider.Event[note]) error {
		return answered.Publish(ctx, b, ev.Value)
	})))
	e.must(b.Subscribe(answered.Handler(func(_ context.Context, ev postrider.Event[note]) error { got <- ev.Message; return nil })))
	e.run(b)
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	ctx := postrider.ContextWithTrace(e.Context(), parent, "vendor=1")
	e.must(written.Publish(ctx, b, &note{}, postrider.MessageID("first")))
	m := <-got
	for name, want := range map[string]string{
		postrider.ExtCausationID: "first", postrider.ExtCorrelationID: "first",
		postrider.ExtTraceParent: parent, postrider.ExtTraceState: "vendor=1",
	} {
		if v := m.Extension(name); v != want {
			e.Errorf("%s is %q, want %q", name, v, want)
		}
	}
}

func commandsAreAnswered(e *env) {
	b := e.open()
	var calls atomic.Int64
	answers := make(chan *postrider.Message, 10)
	e.must(b.Subscribe(tally.Handler(func(_ context.Context, n *note) (*note, error) {
		calls.Add(1)
		switch n.Text {
		case "no":
			return nil, postrider.Errorf(postrider.FailedPrecondition, "the book is closed")
		case "broken":
			return nil, errWeather
		}
		return &note{N: n.N + 1}, nil
	}), quick))
	e.must(b.Subscribe(postrider.RawHandler(replies, func(_ context.Context, m *postrider.Message) error { answers <- m; return nil }), all))
	for _, text := range []string{"yes", "no", "broken"} {
		e.must(tally.Send(e.Context(), b, &note{N: 1, Text: text}, postrider.MessageID(text), postrider.ReplyTo(replies),
			postrider.IdempotencyKey("key-"+text)))
	}
	e.must(tally.Send(e.Context(), b, &note{N: 1})) // nobody wants the answer to this one
	e.run(b)
	for range 3 {
		m := <-answers
		res, err := tally.Response(m)
		id := m.Extension(postrider.ExtCausationID)
		var ok bool
		switch id {
		case "yes":
			ok = err == nil && res.N == 2
		case "no":
			ok = errors.Is(err, postrider.FailedPrecondition) && strings.Contains(err.Error(), "the book is closed")
		case "broken": // exhausted: the outcome is unknown
			ok = postrider.Retryable(err) && strings.Contains(err.Error(), errWeather.Error())
		}
		if !ok || m.Extension(postrider.ExtIdempotencyKey) != "key-"+id {
			e.Errorf("the answer to %q is %+v, %v, with the idempotency key %q", id, res, err, m.Extension(postrider.ExtIdempotencyKey))
		}
	}
	e.eventually("calls, three of them for the broken command", func() int { return int(calls.Load()) }, 6)
	if l := e.letters(b, 1)[0]; !strings.Contains(l.Cause, errWeather.Error()) {
		e.Errorf("the dead letter is %+v, want the broken command: a refusal is an answer", l)
	}
}

func misuseIsAnError(e *env) {
	b := e.open()
	var j journal
	e.must(b.Subscribe(j.handler()))
	for name, c := range map[string]struct {
		h    postrider.Handler
		opt  bus.SubscribeOption
		code postrider.Code
	}{
		"zero handler":    {postrider.Handler{}, bus.Group("x"), postrider.InvalidArgument},
		"a second":        {j.handler(), bus.Group("tester"), postrider.AlreadyExists},
		"bad group":       {j.handler(), bus.Group("a.b"), postrider.InvalidArgument},
		"bad concurrency": {j.handler(), bus.Concurrency(-1), postrider.InvalidArgument},
		"bad ack wait":    {j.handler(), bus.AckWait(time.Millisecond), postrider.InvalidArgument},
		"bad policy":      {j.handler(), bus.Retry(postrider.RetryPolicy{Multiplier: 0.5}), postrider.InvalidArgument},
	} {
		if err := b.Subscribe(c.h, c.opt); !errors.Is(err, c.code) {
			e.Errorf("%s: error is %v, want %v", name, err, c.code)
		}
	}
	e.run(b)
	if err := b.Subscribe(j.handler(), bus.Group("late")); !errors.Is(err, postrider.FailedPrecondition) {
		e.Errorf("Subscribe after Run: %v", err)
	}
	if err := b.Run(e.Context()); !errors.Is(err, postrider.FailedPrecondition) {
		e.Errorf("second Run: %v", err)
	}
	lost := e.open()
	e.must(lost.Subscribe(postrider.RawHandler("elsewhere", func(context.Context, *postrider.Message) error { return nil })))
	if err := lost.Run(e.Context()); !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), "elsewhere") {
		e.Errorf("Run without a stream for a topic: %v", err)
	}
}

func filterTakesWhatIsWanted(e *env) {
	b := e.open()
	var mails, bills journal
	var many batches
	wanted := bus.Filter(func(m *postrider.Message) bool {
		if m.Subject == "panic" && m.Delivery.Attempt < 3 {
			panic("ouch")
		}
		return m.Subject != "unwanted"
	})
	e.must(b.Subscribe(mails.handler(), bus.Group("mailer"), wanted, quick, all))
	e.must(b.Subscribe(many.handler(), bus.Group("report"), wanted, quick, bus.Batch(10, 20*time.Millisecond), all))
	e.must(b.Subscribe(bills.handler(), bus.Group("billing"), all))
	for i := range 20 {
		subject := "wanted"
		if i%2 == 1 {
			subject = "unwanted"
		}
		e.must(written.Publish(e.Context(), b, &note{N: i / 2}, postrider.Subject(subject)))
	}
	e.must(written.Publish(e.Context(), b, &note{N: 10}, postrider.Subject("panic")))
	expired, err := written.Message(e.Context(), &note{N: 90}, postrider.Subject("unwanted"), postrider.Expires(time.Millisecond))
	e.must(err)
	e.must(b.Publish(e.Context(), expired))
	<-time.After(10 * time.Millisecond)
	e.run(b)
	mails.once(e, 11) // and the one that the filter could not bear at first
	many.once(e, 11)
	e.eventually("notes handled without a filter", bills.count, 21)
	if l := e.letters(b, 1)[0]; l.Group != "billing" {
		e.Errorf("the group %s has a dead letter: what it does not want may expire", l.Group)
	}
	if s, ok := b.(interface{ Stats() bus.Stats }); ok {
		e.eventually("messages filtered", func() int { return int(s.Stats().Filtered) }, 2*11)
	}
}
