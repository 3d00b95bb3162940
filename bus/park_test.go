package bus_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/internal/wiredoc"
	"github.com/postrider/postrider/postridertest"
)

// quickForever never gives up.
var quickForever = bus.Retry(postrider.RetryPolicy{Attempts: -1, Initial: time.Millisecond, Max: 5 * time.Millisecond})

var operator = bus.Action{By: "test", Why: "mended", Rate: -1}

// switches says of each key if its handler parks it.
type switches struct {
	mu  sync.Mutex
	bad map[string]bool
}

func (s *switches) set(key string, bad bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bad == nil {
		s.bad = map[string]bool{}
	}
	s.bad[key] = bad
}

func (s *switches) is(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bad[key]
}

// nothingParked waits until no key is parked, and no command is left.
func nothingParked(t *testing.T, nc *nats.Conn, b *bus.Bus) {
	t.Helper()
	postridertest.Eventually(t, func() error {
		keys, _, err := b.Parked().Keys(t.Context(), bus.ParkedFilter{}, "", 0)
		if err == nil && len(keys) > 0 {
			err = fmt.Errorf("still parked: %+v", keys)
		}
		return err
	})
	postridertest.Eventually(t, func() error { return commandsLeft(t, nc) })
}

// parkedKeys waits until so many messages are parked in all, and returns their keys.
func parkedKeys(t *testing.T, b *bus.Bus, f bus.ParkedFilter, messages int) []bus.ParkedKey {
	t.Helper()
	var keys []bus.ParkedKey
	postridertest.Eventually(t, func() (err error) {
		keys, _, err = b.Parked().Keys(t.Context(), f, "", 1000)
		n := 0
		for _, k := range keys {
			n += k.Messages
		}
		if err == nil && n != messages {
			err = fmt.Errorf("%d messages are parked, want %d: %+v", n, messages, keys)
		}
		return err
	})
	return keys
}

// A parked key waits, in order; other keys go on; a release brings all of it, in order, and what comes meanwhile.
func TestPark(t *testing.T) {
	t.Parallel()
	for _, concurrency := range []int{1, 8} {
		t.Run(fmt.Sprint(concurrency), func(t *testing.T) {
			t.Parallel()
			nc := postridertest.NATS(t)
			b := newBus(t, nc)
			d := newDiary()
			var broken switches
			broken.set("key-0", true)
			h := keyed.Handler(func(_ context.Context, e postrider.Event[note]) error {
				defer d.begin(e.Value)()
				if e.Value.N >= 2 && broken.is(e.Value.Text) {
					return fmt.Errorf("handling: %w", postrider.Park(postrider.Errorf(postrider.NotFound, "no customer %d", e.Value.N)))
				}
				d.finish(e.Value)
				return nil
			})
			if err := b.Subscribe(h, bus.Ordered(), bus.Concurrency(concurrency), bus.From(bus.DeliverAll)); err != nil {
				t.Fatal(err)
			}
			run(t, b)
			publishKeyed(t, b, 5, 0, 10)
			postridertest.Eventually(t, wantCount(d.handled, 42))
			k := parkedKeys(t, b, bus.ParkedFilter{Group: "tester", Topic: "notes.keyed.v1", Key: "key-0"}, 8)
			if k := k[0]; k.Group != "tester" || k.Topic != "notes.keyed.v1" || k.Key != "key-0" || k.Code != postrider.NotFound ||
				!strings.Contains(k.Cause, "no customer 2") || k.Attempts != 1 || k.Since.IsZero() {
				t.Errorf("parked is %+v", k)
			}
			messages, _, err := b.Parked().Messages(t.Context(), bus.ParkedFilter{Key: "key-0"}, 0, 0)
			if err != nil || len(messages) != 8 {
				t.Fatalf("%d messages, error %v", len(messages), err)
			}
			for i, m := range messages {
				e, err := keyed.Decode(m.Message)
				if err != nil || e.Value.N != i+2 || m.Key != "key-0" || (m.Code == postrider.OK) != (i > 0) {
					t.Errorf("parked message %d is %+v, error %v", i, m, err)
				}
			}
			if n := b.Stats(); n.Parked != 8 || n.DeadLettered != 0 {
				t.Errorf("stats are %+v", n)
			}

			// Another release of a key that is still broken changes nothing but the cause.
			if n, err := b.Parked().Release(t.Context(), bus.ParkedFilter{}, operator); n != 1 || err != nil {
				t.Fatalf("%d released, error %v", n, err)
			}
			postridertest.Eventually(t, func() error { return commandsLeft(t, nc) })
			parkedKeys(t, b, bus.ParkedFilter{Key: "key-0"}, 8)

			broken.set("key-0", false)
			if n, err := b.Parked().Release(t.Context(), bus.ParkedFilter{Key: "key-0"}, operator); n != 1 || err != nil {
				t.Fatalf("%d released, error %v", n, err)
			}
			for n := 10; n < 60; n += 5 { // while it is released
				publishKeyed(t, b, 5, n, 5)
			}
			postridertest.Eventually(t, wantCount(d.handled, 5*60))
			d.check(t)
			nothingParked(t, nc, b)
			log, _, err := b.Parked().Log(t.Context(), bus.ParkedFilter{Key: "key-0"}, 0, 0)
			if err != nil || len(log) != 2 || log[0].Done != "release" || log[0].By != "test" || log[0].Letter.Key != "key-0" {
				t.Errorf("the log is %+v, error %v", log, err)
			}
		})
	}
}

func commandsLeft(t *testing.T, nc *nats.Conn) error {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	stream, err := js.Stream(t.Context(), "SCHEDULES")
	if err != nil {
		return err
	}
	info, err := stream.Info(t.Context(), jetstream.WithSubjectFilter("group.>"))
	if err == nil && len(info.State.Subjects) > 0 {
		err = fmt.Errorf("commands are left: %v", info.State.Subjects)
	}
	return err
}

// Where there is no order to keep, Park is Permanent.
func TestParkWithoutOrder(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	parks := func(context.Context, postrider.Event[note]) error { return postrider.Park(errors.New("no")) }
	if err := b.Subscribe(keyed.Handler(parks)); err != nil { // not ordered
		t.Fatal(err)
	}
	if err := b.Subscribe(noted.Handler(parks), bus.Ordered()); err != nil { // no key
		t.Fatal(err)
	}
	run(t, b)
	<-b.Started()
	if err := keyed.Publish(t.Context(), b, &note{Text: "a"}); err != nil {
		t.Fatal(err)
	}
	if err := noted.Publish(t.Context(), b, &note{Text: "a"}); err != nil {
		t.Fatal(err)
	}
	postridertest.Eventually(t, wantCount(func() int { return int(b.Stats().DeadLettered) }, 2))
	if n := b.Stats(); n.Parked != 0 || n.Retried != 0 {
		t.Errorf("stats are %+v", n)
	}
}

// Keys park, fail and are released at random, over and over, and keep their order, while owners die and stop.
func TestParkedKeysKeepTheirOrder(t *testing.T) {
	t.Parallel()
	for _, partitions := range []int{0, 3} {
		t.Run(fmt.Sprintf("%d partitions", partitions), func(t *testing.T) {
			t.Parallel()
			parkedKeysKeepTheirOrder(t, func(c *bus.Config) { c.Streams[0].Partitions = partitions })
		})
	}
}

func parkedKeysKeepTheirOrder(t *testing.T, config func(*bus.Config)) {
	t.Helper()
	srv := postridertest.NewNATS(t)
	const keys, per = 10, 12
	d := newDiary()
	var calm atomic.Bool
	var fences fences
	type instance struct {
		nc   *nats.Conn
		stop func() error
	}
	start := func() instance {
		nc := srv.Connect()
		b := newBus(t, nc, config)
		h := keyed.Handler(func(_ context.Context, e postrider.Event[note]) error {
			if nc.IsClosed() {
				return errors.New("the dead do nothing")
			}
			defer d.begin(e.Value)()
			fences.check(t, e)
			if !calm.Load() {
				switch n := rand.IntN(20); {
				case n == 0:
					return postrider.Park(errors.New("not now"))
				case n < 4:
					return errors.New("again")
				}
			}
			d.finish(e.Value)
			return nil
		})
		if err := b.Subscribe(h, bus.Ordered(), bus.Concurrency(4), quickForever, bus.From(bus.DeliverAll)); err != nil {
			t.Fatal(err)
		}
		stop := run(t, b)
		<-b.Started()
		return instance{nc, stop}
	}
	pub := newBus(t, srv.Connect(), config)
	release := func() error {
		_, err := pub.Parked().Release(t.Context(), bus.ParkedFilter{}, operator)
		return err
	}
	progress := func(n int) {
		postridertest.Eventually(t, func() error {
			if got := d.handled(); got < n {
				return errors.Join(release(), fmt.Errorf("handled %d, want %d", got, n))
			}
			return nil
		})
	}
	old := start()
	rounds := []string{"crash", "stop", "crash", "none"}
	for i, how := range rounds {
		publishKeyed(t, pub, keys, i*per, per)
		progress(i*keys*per + keys*per/3)
		if err := release(); err != nil {
			t.Fatal(err)
		}
		next := old
		if how != "none" {
			next = start()
		}
		switch how {
		case "crash":
			old.nc.Close()
		case "stop":
			if err := old.stop(); err != nil {
				t.Fatal(err)
			}
		}
		old = next
	}
	calm.Store(true)
	progress(len(rounds) * keys * per)
	d.check(t)
	nothingParked(t, srv.Connect(), pub)
}

// fences knows the largest fencing token that each key has had.
type fences struct {
	mu   sync.Mutex
	most map[string]uint64
}

func (f *fences) check(t *testing.T, e postrider.Event[note]) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.most == nil {
		f.most = map[string]uint64{}
	}
	if most := f.most[e.Value.Text]; e.Delivery.Fence < most {
		t.Errorf("key %s: %d was handled with token %d after one of %d", e.Value.Text, e.Value.N, e.Delivery.Fence, most)
	}
	f.most[e.Value.Text] = e.Delivery.Fence
}

// A key stays parked over a restart, also when its messages come again, and is released although nothing new comes.
func TestParkedKeyOutlivesItsOwner(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	d := newDiary()
	var broken switches
	broken.set("key-1", true)
	start := func() (*bus.Bus, func() error) {
		b := newBus(t, nc)
		h := keyed.Handler(func(_ context.Context, e postrider.Event[note]) error {
			defer d.begin(e.Value)()
			if broken.is(e.Value.Text) {
				return postrider.Park(errors.New("broken"))
			}
			d.finish(e.Value)
			return nil
		})
		if err := b.Subscribe(h, bus.Ordered(), bus.From(bus.DeliverAll)); err != nil {
			t.Fatal(err)
		}
		stop := run(t, b)
		<-b.Started()
		return b, stop
	}
	b, stop := start()
	publishKeyed(t, b, 3, 0, 10)
	postridertest.Eventually(t, wantCount(d.handled, 20))
	parkedKeys(t, b, bus.ParkedFilter{}, 10)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	broken.set("key-1", false) // only a release may bring it

	b, stop = start()
	publishKeyed(t, b, 3, 10, 10)
	postridertest.Eventually(t, wantCount(d.handled, 40))
	parkedKeys(t, b, bus.ParkedFilter{}, 20)
	if err := stop(); err != nil {
		t.Fatal(err)
	}

	// The group begins anew: all comes again, and is known to be parked, also when the server has forgotten its ids.
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(t.Context(), "PARKED")
	if err != nil {
		t.Fatal(err)
	}
	messages := stored(t, nc, "PARKED")
	if err := js.DeleteStream(t.Context(), "PARKED"); err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(t.Context(), stream.CachedInfo().Config); err != nil {
		t.Fatal(err)
	}
	for _, m := range messages {
		for _, h := range []string{"Nats-Msg-Id", jetstream.ExpectedLastSubjSeqHeader, jetstream.ExpectedLastSubjSeqSubjHeader} {
			m.Header.Del(h)
		}
		if _, err := js.PublishMsg(t.Context(), &nats.Msg{Subject: m.Subject, Header: m.Header, Data: m.Data}); err != nil {
			t.Fatal(err)
		}
	}
	if err := js.DeleteConsumer(t.Context(), "NOTES", "tester-notes_keyed_v1"); err != nil {
		t.Fatal(err)
	}
	b, stop = start()
	publishKeyed(t, b, 1, 20, 1) // of another key, behind all others
	postridertest.Eventually(t, wantCount(d.handled, 41))
	parkedKeys(t, b, bus.ParkedFilter{}, 20)
	if err := stop(); err != nil {
		t.Fatal(err)
	}

	if n, err := b.Parked().Release(t.Context(), bus.ParkedFilter{}, operator); n != 1 || err != nil {
		t.Fatalf("%d released, error %v", n, err)
	}
	b, _ = start() // nobody owns the consumer, which has nothing to deliver
	postridertest.Eventually(t, wantCount(d.handled, 61))
	nothingParked(t, nc, b)
	d.check(t)
}

// Groups park for themselves, and any key can be parked.
func TestParkOddKeys(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc, func(c *bus.Config) { c.Prefix = "odd" })
	long := strings.Repeat("straße. ", 128)
	odd := []string{"a b", "a.b", "*", ">", "%41", "A", "straße", "\u2028", long, long + "x", "\"quoted\"", ".messages"}
	var mended atomic.Bool
	var got seen
	for _, group := range []string{"parks", "other"} {
		h := keyed.Handler(func(_ context.Context, e postrider.Event[note]) error {
			if group == "parks" && !mended.Load() {
				return postrider.Park(errors.New("broken"))
			}
			got.add(*e.Value)
			return nil
		})
		if err := b.Subscribe(h, bus.Ordered(), bus.Group(group), bus.From(bus.DeliverAll)); err != nil {
			t.Fatal(err)
		}
	}
	run(t, b)
	for n := range 2 {
		for _, key := range odd {
			if err := keyed.Publish(t.Context(), b, &note{N: n, Text: key}); err != nil {
				t.Fatal(err)
			}
		}
	}
	postridertest.Eventually(t, wantCount(got.count, 2*len(odd)))
	keys := parkedKeys(t, b, bus.ParkedFilter{}, 2*len(odd))
	is := map[string]bool{}
	for _, k := range keys {
		is[k.Key] = true
		if k.Group != "parks" || k.Messages != 2 {
			t.Errorf("parked is %+v", k)
		}
	}
	for _, key := range odd {
		if !is[key] {
			t.Errorf("key %q is not parked", key)
		}
	}
	var pages []bus.ParkedKey
	for after := ""; ; {
		page, next, err := b.Parked().Keys(t.Context(), bus.ParkedFilter{Group: "parks"}, after, 5)
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, page...)
		if after = next; after == "" {
			break
		}
	}
	if len(pages) != len(odd) {
		t.Errorf("%d keys in pages, want %d", len(pages), len(odd))
	}
	mended.Store(true)
	for i, key := range odd {
		if n, err := b.Parked().Release(t.Context(), bus.ParkedFilter{Key: key}, operator); n != 1 || err != nil {
			t.Fatalf("%d released for key %q, error %v", n, key, err)
		}
		postridertest.Eventually(t, wantCount(got.count, 2*len(odd)+2*(i+1)))
	}
}

// A dead letter of an ordered group is re-driven in its key's turn, behind the key if that is parked.
func TestReplayInOrder(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	d := newDiary()
	var letters, parks, mended atomic.Bool
	letters.Store(true)
	handled := make(chan int, 100)
	hold := make(chan struct{})
	h := keyed.Handler(func(_ context.Context, e postrider.Event[note]) error {
		defer d.begin(e.Value)()
		switch n := e.Value.N; {
		case n == 0 && letters.Load():
			return postrider.Permanent(errors.New("not yet"))
		case n == 2:
			handled <- n
			<-hold
			return nil
		case n == 4 && !mended.Load():
			parks.Store(true)
			return postrider.Park(errors.New("broken"))
		}
		handled <- e.Value.N
		return nil
	})
	if err := b.Subscribe(h, bus.Ordered(), bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	publishKeyed(t, b, 1, 0, 4)
	for _, n := range []int{1, 2} {
		if got := <-handled; got != n {
			t.Fatalf("%d was handled, want %d", got, n)
		}
	}
	letters.Store(false)
	if n, err := b.DeadLetters().ReplayAll(t.Context(), bus.LetterFilter{}, operator); n != 1 || err != nil { // while 2 is being handled
		t.Fatalf("%d re-driven, error %v", n, err)
	}
	parkedKeys(t, b, bus.ParkedFilter{}, 1)
	close(hold)
	if a, b := <-handled, <-handled; a+b != 3 { // the letter has no order, and 3 may be before it
		t.Errorf("handled were %d and %d, want 0 and 3", a, b)
	}
	nothingParked(t, nc, b)

	// Behind a parked key.
	letters.Store(true)
	publishKeyed(t, b, 1, 0, 1)
	publishKeyed(t, b, 1, 4, 2)
	parkedKeys(t, b, bus.ParkedFilter{}, 2)
	letters.Store(false)
	if n, err := b.DeadLetters().ReplayAll(t.Context(), bus.LetterFilter{}, operator); n != 1 || err != nil {
		t.Fatalf("%d re-driven, error %v", n, err)
	}
	parkedKeys(t, b, bus.ParkedFilter{}, 3)
	postridertest.Eventually(t, func() error { return commandsLeft(t, nc) })
	mended.Store(true)
	if n, err := b.Parked().Release(t.Context(), bus.ParkedFilter{}, operator); n != 1 || err != nil {
		t.Fatalf("%d released, error %v", n, err)
	}
	for _, n := range []int{4, 5, 0} {
		if got := <-handled; got != n {
			t.Errorf("%d was handled, want %d", got, n)
		}
	}
	nothingParked(t, nc, b)
	d.check(t)
}

func TestWireDocumentParked(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	h := keyed.Handler(func(context.Context, postrider.Event[note]) error { return postrider.Park(errors.New("no")) })
	if err := b.Subscribe(h, bus.Ordered()); err != nil {
		t.Fatal(err)
	}
	stop := run(t, b)
	<-b.Started()
	for n := 1; n <= 2; n++ {
		m := &postrider.Message{
			ID: fmt.Sprintf("n-%d", n), Type: "notes.keyed.v1", ContentType: "application/json", Data: fmt.Appendf(nil, `{"n":%d,"text":"Zoë"}`, n),
		}
		m.SetExtension(postrider.ExtPartitionKey, "Zoë")
		if err := b.Publish(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	parkedKeys(t, b, bus.ParkedFilter{}, 2)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	headers, data, _ := strings.Cut(wiredoc.Text(t, "text parked"), "\n\n")
	messages := stored(t, nc, "PARKED")
	behind := messages[len(messages)-1]
	if behind.Header.Get("Postrider-Time") == "" {
		t.Error("the parked message has no time")
	}
	behind.Header.Set("Postrider-Time", headersOf(headers)["Postrider-Time"])
	compareStored(t, behind, "parked.tester.notes.keyed.v1.Zo%C3%AB.messages", headers, []byte(data))

	if n, err := b.Parked().Release(t.Context(), bus.ParkedFilter{}, operator); n != 1 || err != nil {
		t.Fatalf("%d released, error %v", n, err)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(t.Context(), "SCHEDULES")
	if err != nil {
		t.Fatal(err)
	}
	command, err := stream.GetLastMsgForSubject(t.Context(), "group.>")
	if err != nil {
		t.Fatal(err)
	}
	headers, data, _ = strings.Cut(wiredoc.Text(t, "text release"), "\n\n")
	if !strings.HasPrefix(command.Header.Get("Nats-Msg-Id"), "release.") {
		t.Errorf("the command's id is %q", command.Header.Get("Nats-Msg-Id"))
	}
	command.Header.Set("Nats-Msg-Id", headersOf(headers)["Nats-Msg-Id"])
	compareStored(t, command, "group.tester.notes.keyed.v1", headers, []byte(data))
}

// A dead letter that somebody publishes anew with all its headers is not what a key was parked for.
func TestParkedLetterPublishedAnew(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	var got seen
	h := keyed.Handler(func(_ context.Context, e postrider.Event[note]) error {
		if e.Value.N == 0 {
			return postrider.Park(errors.New("poison"))
		}
		got.add(*e.Value)
		return nil
	})
	if err := b.Subscribe(h, bus.Ordered(), bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	publishKeyed(t, b, 1, 0, 1)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	anew := &nats.Msg{Subject: "notes.keyed.v1", Data: []byte(`{"n":1,"text":"key-0"}`), Header: nats.Header{
		"ce-specversion": {"1.0"}, "ce-id": {"1"}, "ce-source": {"//test"}, "ce-type": {"notes.keyed.v1"},
		"ce-datacontenttype": {"application/json"}, "ce-partitionkey": {"key-0"},
		"Postrider-Code": {"NOT_FOUND"}, "Postrider-Letter": {"7"}, "Postrider-Payload": {"origin"}, "Postrider-Release": {"key"},
	}}
	if _, err := js.PublishMsg(t.Context(), anew); err != nil {
		t.Fatal(err)
	}
	parkedKeys(t, b, bus.ParkedFilter{}, 2)
	messages, _, err := b.Parked().Messages(t.Context(), bus.ParkedFilter{}, 0, 0)
	if err != nil || len(messages) != 2 || messages[1].Code != postrider.OK {
		t.Fatalf("parked are %+v, error %v", messages, err)
	}
	if n, err := b.Parked().Discard(t.Context(), []uint64{messages[0].Sequence}, operator); n != 1 || err != nil {
		t.Fatalf("%d discarded, error %v", n, err)
	}
	postridertest.Eventually(t, wantCount(got.count, 1))
	nothingParked(t, nc, b)
}

// A message that goes behind its key says nothing about the handler, and is no probe of a circuit breaker.
func TestParkBesideACircuitBreaker(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	var calls atomic.Int64
	h := keyed.Handler(func(_ context.Context, e postrider.Event[note]) error {
		switch {
		case e.Value.Text == "key-0":
			return postrider.Park(errors.New("broken"))
		case calls.Add(1) == 1:
			return errors.New("opens the circuit")
		}
		return nil
	})
	opts := []bus.SubscribeOption{bus.Ordered(), bus.Concurrency(1), quick, bus.CircuitBreaker(1, 50*time.Millisecond)}
	if err := b.Subscribe(h, append(opts, bus.From(bus.DeliverAll))...); err != nil {
		t.Fatal(err)
	}
	publishKeyed(t, b, 2, 0, 2) // the second of key-0 comes when the circuit is half open
	run(t, b)
	postridertest.Eventually(t, wantCount(func() int { return int(b.Stats().Handled) }, 2))
	parkedKeys(t, b, bus.ParkedFilter{}, 2)
}
