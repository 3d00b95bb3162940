package bus_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// gate is a dialer whose connections can be held: what is written arrives when the gate opens again, and nothing is read
// until then. Neither side notices.
type gate struct {
	net.Dialer
	mu   sync.Mutex
	open *sync.Cond
	last net.Conn
	held bool
	kept []byte // what was written meanwhile
}

func newGate() *gate {
	g := &gate{}
	g.open = sync.NewCond(&g.mu)
	return g
}

func (g *gate) Dial(network, address string) (net.Conn, error) {
	conn, err := g.Dialer.Dial(network, address)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.last = conn
	return gatedConn{conn, g}, err
}

func (g *gate) hold() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held = true
}

// release lets through what was held.
func (g *gate) release() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	_, err := g.last.Write(g.kept)
	g.held, g.kept = false, nil
	g.open.Broadcast()
	return err
}

func (g *gate) keeps(text string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return bytes.Contains(g.kept, []byte(text))
}

type gatedConn struct {
	net.Conn
	*gate
}

func (c gatedConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held {
		c.kept = append(c.kept, p...)
		return len(p), nil
	}
	return c.Conn.Write(p)
}

func (c gatedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.held {
		c.open.Wait()
	}
	return n, err
}

// TestParkOfTheReplaced has an owner park a message when it has a successor already and cannot know. The successor has
// handled the message, so it must not be parked.
func TestParkOfTheReplaced(t *testing.T) {
	t.Parallel()
	srv := postridertest.NewNATS(t)
	g := newGate()
	nc := srv.Connect(nats.SetCustomDialer(g))
	started := make(chan struct{})
	old := newBus(t, nc)
	subscribe := func(b *bus.Bus, fn func(e postrider.Event[note]) error) {
		t.Helper()
		h := keyed.Handler(func(_ context.Context, e postrider.Event[note]) error { return fn(e) })
		if err := b.Subscribe(h, bus.Ordered(), bus.From(bus.DeliverAll), bus.AckWait(2*time.Second), quickForever); err != nil {
			t.Fatal(err)
		}
		run(t, b)
	}
	var once sync.Once
	subscribe(old, func(e postrider.Event[note]) error {
		if e.Value.Text == "key-0" {
			once.Do(func() { g.hold(); close(started) })
		}
		return postrider.Park(errors.New("broken"))
	})
	b, d := newBus(t, srv.Connect()), newDiary()
	if err := keyed.Publish(t.Context(), b, &note{Text: "another"}); err != nil {
		t.Fatal(err)
	}
	parkedKeys(t, b, bus.ParkedFilter{Key: "another"}, 1) // so that the old owner has found the stream
	publishKeyed(t, b, 1, 0, 3)
	<-started
	postridertest.Eventually(t, func() error {
		if !g.keeps("PUB parked.tester.") {
			return errors.New("the old owner has parked nothing")
		}
		return nil
	})
	subscribe(b, func(e postrider.Event[note]) error { d.finish(e.Value); return nil })
	postridertest.Eventually(t, wantCount(d.handled, 3))
	if err := g.release(); err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	// The stream takes what came on the old owner's connection in order.
	if _, err := js.Publish(t.Context(), "parklog.tester.mark", nil); err != nil {
		t.Fatal(err)
	}
	keys, _, err := b.Parked().Keys(t.Context(), bus.ParkedFilter{}, "", 0)
	if err != nil || len(keys) != 1 || keys[0].Key != "another" {
		t.Errorf("parked: %+v, error %v", keys, err)
	}
	d.check(t)
}

// A releaser that begins its work does not end the ownership of the one who parks: what that has begun would come again.
func TestReleaserLeavesTheOwnersToken(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	good, parks := make(chan uint64, 10), make(chan string, 10)
	h := keyed.Handler(func(_ context.Context, e postrider.Event[note]) error {
		if e.Value.Text == "good" {
			good <- e.Delivery.Fence
			return nil
		}
		parks <- e.Value.Text
		return postrider.Park(errors.New("broken"))
	})
	if err := b.Subscribe(h, bus.Ordered(), bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	publish := func(key string) {
		t.Helper()
		if err := keyed.Publish(t.Context(), b, &note{Text: key}); err != nil {
			t.Fatal(err)
		}
	}
	publish("good")
	before := <-good
	publish("a")
	parkedKeys(t, b, bus.ParkedFilter{}, 1)
	if n, err := b.Parked().Release(t.Context(), bus.ParkedFilter{}, operator); n != 1 || err != nil {
		t.Fatalf("%d released, error %v", n, err)
	}
	<-parks
	<-parks // handled by the releaser, which has a token of its own now
	publish("b")
	parkedKeys(t, b, bus.ParkedFilter{}, 2)
	publish("good")
	if after := <-good; after != before {
		t.Errorf("the owner's token was %d and is %d: its ownership began anew", before, after)
	}
}
