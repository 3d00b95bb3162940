package bus_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/internal/wiredoc"
	"github.com/postrider/postrider/postridertest"
)

func TestEditDeadLetter(t *testing.T) {
	t.Parallel()
	o := newOffice(t)
	d := o.bus.DeadLetters()
	o.broken.Store(false)
	// Broken JSON, with a header of its own; and no CloudEvent at all.
	broken := nats.NewMsg("notes.written.v1")
	for k, v := range map[string]string{
		"ce-specversion": "1.0", "ce-id": "broken", "ce-source": "//elsewhere", "ce-type": "notes.written.v1",
		"ce-datacontenttype": "application/json", "X-Tenant": "blue",
	} {
		broken.Header[k] = []string{v}
	}
	broken.Data = []byte(`{"n":`)
	if err := errors.Join(o.nc.PublishMsg(broken), o.nc.Publish("notes.written.v1", []byte("hello"))); err != nil {
		t.Fatal(err)
	}
	byID := func(a, b bus.DeadLetter) int { return strings.Compare(b.Message.ID, a.Message.ID) } // they came in any order
	letters := waitLetters(t, o.bus, bus.LetterFilter{Group: "tester"}, 2)
	slices.SortFunc(letters, byID)
	if m := letters[1].Message; m.ID != "" || string(m.Data) != "hello" || m.Topic != "notes.written.v1" {
		t.Errorf("the letter of no event has the message %+v", m)
	}
	first, err := d.Edit(t.Context(), letters[0].Sequence, func(m *postrider.Message) error {
		if m.ID != "broken" {
			t.Errorf("to edit is %+v", m)
		}
		m.Data = []byte(`{"n":1}`)
		return m.SetExtension("edited", true)
	}, clerk)
	if err != nil {
		t.Fatal(err)
	}
	second, err := d.Edit(t.Context(), letters[1].Sequence, func(m *postrider.Message) error {
		m.ID, m.Source, m.Type, m.ContentType = "new", "//test/Zoë", "notes.written.v1", "application/json"
		m.Data = []byte(`{"n":2}`)
		return nil
	}, clerk)
	if err != nil {
		t.Fatal(err)
	}
	copies := waitLetters(t, o.bus, bus.LetterFilter{Group: "tester"}, 2) // instead of the originals
	if copies[0].Sequence != first || copies[0].CopyOf != letters[0].Sequence || copies[0].Message.Extension("edited") != "true" ||
		copies[0].Header["X-Tenant"][0] != "blue" || copies[0].Cause != letters[0].Cause || copies[1].Sequence != second {
		t.Errorf("copies are %+v", copies)
	}
	if n, err := d.Replay(t.Context(), []uint64{first, second}, clerk); n != 2 || err != nil {
		t.Fatalf("replayed %d, %v", n, err)
	}
	if a, b := <-o.ids, <-o.ids; a != "//elsewhere broken" && b != "//elsewhere broken" || a != "//test/Zoë new" && b != "//test/Zoë new" {
		t.Errorf("handled %q and %q", a, b)
	}
	postridertest.Eventually(t, wantCount(o.tester.distinct, 2))
	log, _, err := d.Log(t.Context(), bus.LetterFilter{Group: "tester"}, 0, 0)
	if err != nil || len(log) != 4 {
		t.Fatalf("log is %+v, %v", log, err)
	}
	if e := log[0]; e.Done != "edit" || e.Copy != first || e.Letter.Sequence != letters[0].Sequence || string(e.Letter.Data) != `{"n":` {
		t.Errorf("the log has %+v: want the original whole, and its copy", e)
	}
	for name, change := range map[string]func(m *postrider.Message) error{
		"topic":   func(m *postrider.Message) error { m.Topic = "notes.other.v1"; return nil },
		"source":  func(m *postrider.Message) error { m.ID = "only an id"; return nil },
		"own way": func(*postrider.Message) error { return postrider.Errorf(postrider.InvalidArgument, "own way") },
	} {
		left := waitLetters(t, o.bus, bus.LetterFilter{Group: "archive"}, 2)
		slices.SortFunc(left, byID)
		_, err := d.Edit(t.Context(), left[1].Sequence, change, clerk)
		if !errors.Is(err, postrider.InvalidArgument) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
	waitLetters(t, o.bus, bus.LetterFilter{Group: "archive"}, 2)
}

func TestEditOfStructuredMode(t *testing.T) {
	t.Parallel()
	o := newOffice(t)
	msg := nats.NewMsg("notes.written.v1")
	msg.Header.Set("Content-Type", "application/cloudevents+json")
	msg.Data = []byte(`{"specversion":"1.0","id":"1","source":"//s","type":"notes.written.v1","datacontenttype":"application/json","data":{"n":1}}`)
	if err := o.nc.PublishMsg(msg); err != nil {
		t.Fatal(err)
	}
	letter := waitLetters(t, o.bus, bus.LetterFilter{}, 1)[0]
	edited, err := o.bus.DeadLetters().Edit(t.Context(), letter.Sequence, func(m *postrider.Message) error {
		m.ID = "2"
		return nil
	}, clerk)
	if err != nil {
		t.Fatal(err)
	}
	o.broken.Store(false)
	if n, err := o.bus.DeadLetters().Replay(t.Context(), []uint64{edited}, clerk); n != 1 || err != nil {
		t.Fatalf("replayed %d, %v", n, err)
	}
	if id := <-o.ids; id != "//s 2" {
		t.Errorf("handled %s", id)
	}
}

func TestEditOfWhatRawHandlersGet(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	got := make(chan *postrider.Message, 1)
	h := postrider.RawHandler("notes.raw", func(_ context.Context, m *postrider.Message) error {
		if string(m.Data) == "hello" {
			return postrider.Permanent(errors.New("no greetings"))
		}
		got <- m
		return nil
	})
	if err := b.Subscribe(h); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	<-b.Started()
	if err := nc.Publish("notes.raw", []byte("hello")); err != nil {
		t.Fatal(err)
	}
	letter := waitLetters(t, b, bus.LetterFilter{}, 1)[0]
	edited, err := b.DeadLetters().Edit(t.Context(), letter.Sequence, func(m *postrider.Message) error {
		m.Data[0] = 'j' // the letter's own data must not change
		return nil
	}, clerk)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := b.DeadLetters().Replay(t.Context(), []uint64{edited}, clerk); n != 1 || err != nil {
		t.Fatalf("replayed %d, %v", n, err)
	}
	if m := <-got; string(m.Data) != "jello" || m.Topic != "notes.raw" || m.ID != "" {
		t.Errorf("got %+v", m)
	}
	log, _, err := b.DeadLetters().Log(t.Context(), bus.LetterFilter{}, 0, 1)
	if err != nil || len(log) != 1 || string(log[0].Letter.Data) != "hello" {
		t.Errorf("the log has %+v, %v: want the original", log, err)
	}
}

func TestWireDocumentDeadLetters(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	h := noted.Handler(func(context.Context, postrider.Event[note]) error {
		return postrider.Errorf(postrider.NotFound, "no reader %q", "Zoë")
	})
	if err := b.Subscribe(h); err != nil {
		t.Fatal(err)
	}
	stop := run(t, b)
	<-b.Started()
	m := &postrider.Message{ID: "n 1", Type: "notes.written.v1", ContentType: "application/json", Data: []byte(`{"n":1}`)}
	if err := b.Publish(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	waitLetters(t, b, bus.LetterFilter{}, 1)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	letter := stored(t, nc, "DEAD_LETTERS")[0]
	headers, data, _ := strings.Cut(wiredoc.Text(t, "text letter"), "\n\n")
	if letter.Header.Get("Postrider-Time") == "" {
		t.Error("the letter has no time")
	}
	letter.Header.Set("Postrider-Time", headersOf(headers)["Postrider-Time"])
	compareStored(t, letter, "dead.tester.notes.written.v1", headers, []byte(data))
	// The letter as the page has it, with the time that the re-drive's id comes from.
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(t.Context(), "DEAD_LETTERS")
	if err != nil {
		t.Fatal(err)
	}
	if err := js.DeleteStream(t.Context(), "DEAD_LETTERS"); err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(t.Context(), stream.CachedInfo().Config); err != nil {
		t.Fatal(err)
	}
	msg := nats.NewMsg(letter.Subject)
	for k, v := range headersOf(headers) {
		msg.Header[k] = []string{v}
	}
	msg.Data = []byte(data)
	if _, err := js.PublishMsg(t.Context(), msg); err != nil {
		t.Fatal(err)
	}
	if n, err := b.DeadLetters().Replay(t.Context(), []uint64{1}, clerk); n != 1 || err != nil {
		t.Fatalf("replayed %d, %v", n, err)
	}
	headers, data, _ = strings.Cut(wiredoc.Text(t, "text redrive"), "\n\n")
	compareStored(t, stored(t, nc, "SCHEDULES")[0], "group.tester.notes.written.v1", headers, []byte(data))
	entry, err := stream.GetMsg(t.Context(), 2)
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{
		"Postrider-Action": "replay", "Postrider-By": `"Zoë"`, "Postrider-Why": `"the printer\nworks again"`, "Postrider-Letter": "1",
		"Postrider-Cause": msg.Header.Get("Postrider-Cause"),
	} {
		if got := entry.Header.Get(key); got != want {
			t.Errorf("header %s of the log is %q, want %q", key, got, want)
		}
	}
	if entry.Subject != "deadlog.tester.notes.written.v1" || len(entry.Data) > 0 {
		t.Errorf("the log has %s: %s", entry.Subject, entry.Data)
	}
}
