package bus_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// collect returns a handler that notes what it gets.
func collect(s *seen) postrider.Handler {
	return noted.Handler(func(_ context.Context, e postrider.Event[note]) error { s.add(*e.Value); return nil })
}

func publishNotes(t *testing.T, b *bus.Bus, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		if err := noted.Publish(t.Context(), b, &note{N: i}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestBroadcastReachesEveryInstance(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	pub := newBus(t, nc)
	publishNotes(t, pub, 0, 3) // the past
	var got [2]seen
	var stops []func() error
	for i := range got {
		b := newBus(t, nc)
		if err := b.Subscribe(collect(&got[i]), bus.Broadcast()); err != nil {
			t.Fatal(err)
		}
		stops = append(stops, run(t, b))
		<-b.Started()
	}
	publishNotes(t, pub, 3, 10)
	for i := range got {
		postridertest.Eventually(t, wantCount(got[i].distinct, 7))
	}
	// The server forgets a consumer, as after a long absence or a crash of its only replica.
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	names := consumers(t, js)
	if len(names) != 2 {
		t.Fatalf("consumers are %v, want one for each instance", names)
	}
	for _, name := range names {
		if err := js.DeleteConsumer(t.Context(), "NOTES", name); err != nil {
			t.Fatal(err)
		}
	}
	publishNotes(t, pub, 10, 15)
	for i := range got {
		postridertest.Eventually(t, wantCount(got[i].distinct, 12))
	}
	for _, stop := range stops {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}
	if names := consumers(t, js); len(names) != 0 {
		t.Errorf("consumers %v are left behind", names)
	}
}

func consumers(t *testing.T, js jetstream.JetStream) []string {
	t.Helper()
	s, err := js.Stream(t.Context(), "NOTES")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for name := range s.ConsumerNames(t.Context()).Name() {
		names = append(names, name)
	}
	return names
}

func TestStartPositions(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	pub := newBus(t, nc)
	publishNotes(t, pub, 0, 5)
	since := stored(t, nc, "NOTES")[2].Time
	for name, c := range map[string]struct {
		opt  bus.SubscribeOption
		want []int
	}{
		"new":      {bus.From(bus.DeliverNew), []int{5}},
		"all":      {bus.From(bus.DeliverAll), []int{0, 1, 2, 3, 4, 5}},
		"sequence": {bus.FromSequence(4), []int{3, 4, 5}},
		"time":     {bus.FromTime(since), []int{2, 3, 4, 5}},
	} {
		var got seen
		b := newBus(t, nc)
		if err := b.Subscribe(collect(&got), bus.Group(name), c.opt); err != nil {
			t.Fatal(err)
		}
		run(t, b)
		<-b.Started()
		t.Cleanup(func() {
			postridertest.Eventually(t, wantCount(got.count, len(c.want)))
			var ns []int
			for _, n := range got.list {
				ns = append(ns, n.N)
			}
			if slices.Sort(ns); !slices.Equal(ns, c.want) {
				t.Errorf("%s: handled %v, want %v", name, ns, c.want)
			}
		})
	}
	publishNotes(t, pub, 5, 6)
}

func TestAGroupGoesOnWhereItWas(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	pub := newBus(t, nc)
	var got seen
	for i, opt := range []bus.SubscribeOption{bus.From(bus.DeliverAll), bus.From(bus.DeliverNew), bus.FromSequence(1)} {
		publishNotes(t, pub, i, i+1)
		b := newBus(t, nc)
		if err := b.Subscribe(collect(&got), opt); err != nil {
			t.Fatal(err)
		}
		stop := run(t, b)
		postridertest.Eventually(t, wantCount(got.count, i+1)) // nothing of the past again, nothing of the pause missed
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPause(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	var got, other seen
	if err := errors.Join(b.Subscribe(collect(&got)), b.Subscribe(collect(&other), bus.Group("other"))); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	<-b.Started()
	ctx := t.Context()
	if err := b.Pause(ctx, "tester", noted.Name(), time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	publishNotes(t, b, 0, 5)
	postridertest.Eventually(t, wantCount(other.count, 5)) // the other group is not held up
	if n := got.count(); n != 0 {
		t.Errorf("%d messages were handled during the pause", n)
	}
	if err := b.Resume(ctx, "tester", noted.Name()); err != nil {
		t.Fatal(err)
	}
	postridertest.Eventually(t, wantCount(got.count, 5))
	err := b.Pause(ctx, "nobody", noted.Name(), time.Now().Add(time.Hour))
	if !errors.Is(err, postrider.NotFound) || !strings.Contains(fmt.Sprint(err), "nobody") {
		t.Errorf("pause of no group: %v", err)
	}
}
