package bus_test

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// cutter is a dialer whose connections can be broken, with what is on its way in them.
type cutter struct {
	net.Dialer
	mu   sync.Mutex
	all  []net.Conn
	last net.Conn
}

func (c *cutter) Dial(network, address string) (net.Conn, error) {
	conn, err := c.Dialer.Dial(network, address)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last = conn
	c.all = append(c.all, conn)
	return looseConn{conn}, nil
}

// looseConn is a connection that its client does not close.
type looseConn struct{ net.Conn }

func (looseConn) Close() error { return nil }

// cut breaks the connection for both sides.
func (c *cutter) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	_ = c.last.(*net.TCPConn).SetLinger(0)
	_ = c.last.Close()
}

// lose breaks the connection for the client alone, as when something between the two has forgotten it: the server goes on
// sending.
func (c *cutter) lose() {
	c.mu.Lock()
	defer c.mu.Unlock()
	_ = c.last.SetReadDeadline(time.Now())
}

func (c *cutter) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.all {
		_ = conn.Close()
	}
}

// TestOrderedOverReconnects breaks the owner's connection again and again, with messages on their way in it: the server sends
// them again later, and their keys must wait for that.
func TestOrderedOverReconnects(t *testing.T) {
	t.Parallel()
	orderedOverReconnects(t, 12, (*cutter).cut)
}

// TestOrderedOverLostConnections is the same, and the server takes the lost connections for alive: what the owner asked for
// there takes the first messages of those that begin anew.
func TestOrderedOverLostConnections(t *testing.T) {
	t.Parallel()
	orderedOverReconnects(t, 3, (*cutter).lose)
}

func orderedOverReconnects(t *testing.T, rounds int, interrupt func(*cutter)) {
	t.Helper()
	srv := postridertest.NewNATS(t)
	c := &cutter{}
	t.Cleanup(c.close)
	nc := srv.Connect(nats.SetCustomDialer(c), nats.ReconnectWait(time.Millisecond), nats.MaxReconnects(-1))
	d := newDiary()
	sub := newBus(t, nc)
	if err := sub.Subscribe(keyed.Handler(func(_ context.Context, e postrider.Event[note]) error {
		defer d.begin(e.Value)()
		d.finish(e.Value)
		return nil
	}), bus.Ordered(), bus.From(bus.DeliverAll), bus.AckWait(2*time.Second)); err != nil {
		t.Fatal(err)
	}
	run(t, sub)
	<-sub.Started()
	const keys, each = 20, 100
	pub := newBus(t, srv.Connect())
	for r := range rounds {
		before := d.handled()
		var wg sync.WaitGroup
		wg.Go(func() { publishKeyed(t, pub, keys, r*each, each) })
		postridertest.Eventually(t, func() error {
			d.check(t)
			if n := d.handled() - before; n < 300 {
				return fmt.Errorf("round %d: %d handled", r, n)
			}
			return nil
		})
		interrupt(c)
		wg.Wait()
	}
	postridertest.Eventually(t, func() error {
		if n := d.handled(); n < keys*rounds*each {
			return fmt.Errorf("%d of %d handled", n, keys*rounds*each)
		}
		return nil
	})
	d.check(t)
}
