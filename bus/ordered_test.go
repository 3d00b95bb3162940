package bus_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// keyed is a note whose N is its place among those of its Text, the key.
var keyed = postrider.NewTopic[note]("notes.keyed.v1", postrider.KeyBy(func(n *note) string { return n.Text }))

// diary notes what was handled, key by key, and what should not have happened.
type diary struct {
	mu      sync.Mutex
	running map[string]bool
	done    map[string]int // the next N of each key
	total   int
	most    int // keys handled at once
	wrong   []string
}

func newDiary() *diary { return &diary{running: map[string]bool{}, done: map[string]int{}} }

// begin opens the handling of a note; the returned function closes it.
func (d *diary) begin(n *note) (end func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.running[n.Text] {
		d.wrong = append(d.wrong, fmt.Sprintf("two of key %s at once", n.Text))
	}
	d.running[n.Text] = true
	d.most = max(d.most, len(d.running))
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.running, n.Text)
	}
}

// finish notes that a note was handled. One that comes again after a take-over is no news; one that comes too early is wrong.
func (d *diary) finish(n *note) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch next := d.done[n.Text]; {
	case n.N == next:
		d.done[n.Text]++
		d.total++
	case n.N > next:
		d.wrong = append(d.wrong, fmt.Sprintf("key %s: %d was handled before %d", n.Text, n.N, next))
	}
}

func (d *diary) handled() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.total
}

func (d *diary) check(t *testing.T) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, w := range d.wrong {
		t.Error(w)
	}
}

// publishKeyed publishes per notes of each of some keys, the keys mixed.
func publishKeyed(t *testing.T, b *bus.Bus, keys, from, per int) {
	t.Helper()
	var notes []*note
	for n := from; n < from+per; n++ {
		for k := range keys {
			notes = append(notes, &note{N: n, Text: fmt.Sprintf("key-%d", k)})
		}
	}
	if err := keyed.PublishAll(t.Context(), b, notes); err != nil {
		t.Fatal(err)
	}
}

func TestOrderedKeepsTheOrderOfEachKey(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	const keys, per = 20, 25
	d := newDiary()
	failures := map[note]int{}
	var mu sync.Mutex
	together := make(chan struct{}) // closed when two keys run at once
	var once sync.Once
	h := keyed.Handler(func(_ context.Context, e postrider.Event[note]) error {
		defer d.begin(e.Value)()
		d.mu.Lock()
		if len(d.running) > 1 {
			once.Do(func() { close(together) })
		}
		d.mu.Unlock()
		<-together
		mu.Lock()
		failures[*e.Value]++
		fail := failures[*e.Value] == 1 && rand.IntN(10) == 0
		mu.Unlock()
		if fail {
			return errors.New("not the first time")
		}
		d.finish(e.Value)
		return nil
	})
	if err := b.Subscribe(h, bus.Ordered(), quick, bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	publishKeyed(t, b, keys, 0, per)
	postridertest.Eventually(t, wantCount(d.handled, keys*per))
	d.check(t)
}

func TestOrderedFailureHoldsItsKeyOnly(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	d := newDiary()
	var mended sync.Map
	var attempts []int
	h := keyed.Handler(func(_ context.Context, e postrider.Event[note]) error {
		if e.Value.Text == "key-0" && e.Value.N == 0 {
			if _, ok := mended.Load("key-0"); !ok {
				attempts = append(attempts, e.Delivery.Attempt)
				return errors.New("broken")
			}
		}
		d.finish(e.Value)
		return nil
	})
	patient := bus.Retry(postrider.RetryPolicy{Attempts: -1, Initial: time.Millisecond, Max: 5 * time.Millisecond})
	if err := b.Subscribe(h, bus.Ordered(), bus.Concurrency(2), patient, bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	publishKeyed(t, b, 5, 0, 10)
	postridertest.Eventually(t, wantCount(d.handled, 40)) // all but those of the broken key
	mended.Store("key-0", true)
	postridertest.Eventually(t, wantCount(d.handled, 50))
	d.check(t)
	for i, a := range attempts {
		if a != i+1 {
			t.Fatalf("attempts were counted as %v", attempts)
		}
	}
}

func TestOrderedDeadLetterFreesItsKey(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	var got seen
	h := keyed.Handler(func(_ context.Context, e postrider.Event[note]) error {
		if e.Value.N == 0 {
			return errors.New("never")
		}
		got.add(*e.Value)
		return nil
	})
	if err := b.Subscribe(h, bus.Ordered(), quick, bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	publishKeyed(t, b, 1, 0, 3)
	postridertest.Eventually(t, wantCount(got.count, 2))
	if n := b.Stats().DeadLettered; n != 1 {
		t.Errorf("%d dead letters, want 1", n)
	}
}

// TestOrderedTakeOver has three instances, of which one is active, dies or stops in the middle, and is replaced.
func TestOrderedTakeOver(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"dies", "stops"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			srv := postridertest.NewNATS(t)
			const keys, per = 12, 60
			d := newDiary()
			active := make(chan int, 1) // the instance that handled last
			var fences [3]atomic.Uint64
			type instance struct {
				nc   *nats.Conn
				stop func() error
			}
			var instances []instance
			for i := range 3 {
				nc := srv.Connect()
				b := newBus(t, nc)
				h := keyed.Handler(func(ctx context.Context, e postrider.Event[note]) error {
					if nc.IsClosed() {
						return errors.New("the dead do nothing")
					}
					defer d.begin(e.Value)()
					fences[i].Store(e.Delivery.Fence)
					select {
					case <-active:
					default:
					}
					select {
					case active <- i:
					default:
					}
					d.finish(e.Value)
					return ctx.Err()
				})
				if err := b.Subscribe(h, bus.Ordered(), bus.Concurrency(8), bus.From(bus.DeliverAll)); err != nil {
					t.Fatal(err)
				}
				instances = append(instances, instance{nc, run(t, b)})
				<-b.Started()
			}
			pub := newBus(t, srv.Connect())
			publishKeyed(t, pub, keys, 0, per)
			postridertest.Eventually(t, func() error {
				if n := d.handled(); n < keys*per/4 {
					return fmt.Errorf("handled %d", n)
				}
				return nil
			})
			first := <-active
			began := time.Now()
			if how == "dies" {
				instances[first].nc.Close()
			} else if err := instances[first].stop(); err != nil {
				t.Fatal(err)
			}
			publishKeyed(t, pub, keys, per, per)
			postridertest.Eventually(t, wantCount(d.handled, 2*keys*per))
			t.Logf("the active instance %s: everything was handled %v later", how, time.Since(began).Round(time.Millisecond))
			d.check(t)
			second := <-active
			if second == first {
				t.Errorf("instance %d went on although it is gone", second)
			}
			if old, now := fences[first].Load(), fences[second].Load(); old == 0 || now <= old {
				t.Errorf("the fence went from %d to %d with the take-over, want it to grow", old, now)
			}
		})
	}
}

// TestOrderedStopsSlowly has an owner stop while its handler needs longer than the pin lasts: until it is done, nobody else
// may begin with its key.
func TestOrderedStopsSlowly(t *testing.T) {
	t.Parallel()
	srv := postridertest.NewNATS(t)
	d := newDiary()
	began, finish := make(chan struct{}), make(chan struct{})
	var once sync.Once
	h := keyed.Handler(func(_ context.Context, e postrider.Event[note]) error {
		defer d.begin(e.Value)()
		once.Do(func() { close(began); <-finish })
		d.finish(e.Value)
		return nil
	})
	start := func() (stop func() error) {
		b := newBus(t, srv.Connect())
		if err := b.Subscribe(h, bus.Ordered(), bus.From(bus.DeliverAll)); err != nil {
			t.Fatal(err)
		}
		stop = run(t, b)
		<-b.Started()
		return stop
	}
	stop := start()
	pub := newBus(t, srv.Connect())
	publishKeyed(t, pub, 1, 0, 3)
	<-began
	start()
	stopped := make(chan error)
	go func() { stopped <- stop() }()
	publishKeyed(t, pub, 1, 3, 3)
	at := time.Now()
	postridertest.Eventually(t, func() error {
		if time.Since(at) < 5*time.Second { // the pin lasts three
			return errors.New("the owner has not waited long enough")
		}
		return nil
	})
	close(finish)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	postridertest.Eventually(t, wantCount(d.handled, 6))
	d.check(t)
}

// TestOrderedPullsOfOthers reads the requests of instances as they take over from each other: one that does not own the
// consumer asks for one message, so that none is on its way when it does and resets the consumer.
func TestOrderedPullsOfOthers(t *testing.T) {
	t.Parallel()
	srv := postridertest.NewNATS(t)
	var mu sync.Mutex
	var waiting, owning int
	watch := srv.Connect()
	if _, err := watch.Subscribe("$JS.API.CONSUMER.MSG.NEXT.NOTES.*", func(msg *nats.Msg) {
		var request struct {
			Batch int    `json:"batch"`
			ID    string `json:"id"`
		}
		err := json.Unmarshal(msg.Data, &request)
		mu.Lock()
		defer mu.Unlock()
		switch {
		case err != nil || request.ID == "" && request.Batch != 1:
			t.Errorf("the request of an instance that owns nothing is %s, %v", msg.Data, err)
		case request.ID == "":
			waiting++
		default:
			owning++
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := watch.Flush(); err != nil {
		t.Fatal(err)
	}
	d := newDiary()
	h := keyed.Handler(func(_ context.Context, e postrider.Event[note]) error {
		defer d.begin(e.Value)()
		d.finish(e.Value)
		return nil
	})
	pub := newBus(t, srv.Connect())
	publishKeyed(t, pub, 5, 0, 100)
	for i := range 3 {
		b := newBus(t, srv.Connect())
		if err := b.Subscribe(h, bus.Ordered(), bus.From(bus.DeliverAll)); err != nil {
			t.Fatal(err)
		}
		stop := run(t, b)
		publishKeyed(t, pub, 5, 100*(i+1), 100)
		postridertest.Eventually(t, wantCount(d.handled, 500*(i+2)))
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	}
	d.check(t)
	mu.Lock()
	defer mu.Unlock()
	if waiting < 3 || owning < 3 {
		t.Errorf("%d requests of others and %d of owners were seen, want some of each instance", waiting, owning)
	}
}
