package postridertest

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/postrider/postrider"
)

// Faults does to messages what a network and crashing processes do to them, only more often, so that a test sees whether the
// code bears it: everything that handles messages must bear all of it. Wrap a publisher with [Faults.Publisher], handlers
// with [Faults.Middleware]. The same Seed and the same order of messages give the same faults. The zero value does nothing.
//
//	faults := postridertest.Faults{Duplicate: 0.3, Reorder: 0.3, FailAck: 0.3}
//	b, err := bus.New(nc, bus.Config{Source: "//shop/orders", Middleware: []postrider.Middleware{faults.Middleware()}})
type Faults struct {
	// Seed chooses the messages that suffer.
	Seed uint64

	// Duplicate is the share, 0 to 1, of messages that are handled twice, one time after the other, as when an
	// acknowledgement is lost. A publisher publishes them twice.
	Duplicate float64

	// Delay bounds the time that each message waits before it is handled or published; how long is random.
	Delay time.Duration

	// Reorder is the share of messages that wait until another one has been handled, for at most ReorderWait. A publisher
	// that is given several messages exchanges them with a neighbour.
	Reorder float64

	// ReorderWait is how long a message is held back when no other one comes. Default 50 ms.
	ReorderWait time.Duration

	// FailAck is the share of messages that are handled or published with success, but reported as failed: an Unavailable
	// error. No message suffers that twice, so that retries come to an end.
	FailAck float64
}

// dice decides for one publisher or handler.
type dice struct {
	Faults

	mu     sync.Mutex
	rnd    *rand.Rand
	failed map[[2]string]bool // source and id of those whose acknowledgement failed
	passed chan struct{}      // closed when a message has passed
}

func (f Faults) dice() *dice {
	if f.ReorderWait == 0 {
		f.ReorderWait = 50 * time.Millisecond
	}
	return &dice{Faults: f, rnd: rand.New(rand.NewPCG(f.Seed, 0)), failed: map[[2]string]bool{}, passed: make(chan struct{})}
}

// fate is what happens to one message.
type fate struct {
	duplicate, reorder, failAck bool
	delay                       time.Duration
}

// roll draws the fate of a message. It always draws as many numbers, so that a fault that is switched on leaves the others
// where they were.
func (d *dice) roll(m *postrider.Message) fate {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := fate{
		duplicate: d.rnd.Float64() < d.Duplicate,
		reorder:   d.rnd.Float64() < d.Reorder,
		failAck:   d.rnd.Float64() < d.FailAck,
		delay:     time.Duration(d.rnd.Float64() * float64(d.Delay)),
	}
	if id := [2]string{m.Source, m.ID}; f.failAck {
		f.failAck = !d.failed[id]
		d.failed[id] = true
	}
	return f
}

// hold waits until another message has passed.
func (d *dice) hold(ctx context.Context) {
	d.mu.Lock()
	passed := d.passed
	d.mu.Unlock()
	select {
	case <-passed:
	case <-ctx.Done():
	case <-time.After(d.ReorderWait):
	}
}

func (d *dice) pass() {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.passed)
	d.passed = make(chan struct{})
}

func pause(ctx context.Context, wait time.Duration) {
	if wait > 0 {
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// lostAck is what a success is turned into.
func lostAck(m *postrider.Message) error {
	return &postrider.Error{Code: postrider.Unavailable, Op: "postridertest: faults: " + m.ID, Msg: "it was done, and its acknowledgement was lost"}
}

// Middleware returns the faults as middleware of a bus or of single handlers (Handler.With). Each handler that it wraps has
// its own dice.
func (f Faults) Middleware() postrider.Middleware {
	return func(next postrider.HandlerFunc) postrider.HandlerFunc {
		d := f.dice()
		return func(ctx context.Context, m *postrider.Message) (*postrider.Message, error) {
			fate := d.roll(m)
			pause(ctx, fate.delay)
			if fate.reorder {
				d.hold(ctx)
			}
			defer d.pass()
			reply, err := next(ctx, m)
			if err == nil && fate.duplicate {
				reply, err = next(ctx, m)
			}
			if err == nil && fate.failAck {
				return nil, lostAck(m)
			}
			return reply, err
		}
	}
}

// Publisher returns a publisher that does the faults to what it passes on to p.
func (f Faults) Publisher(p postrider.Publisher) postrider.Publisher {
	return &faultyPublisher{f.dice(), p}
}

type faultyPublisher struct {
	*dice

	next postrider.Publisher
}

// Publish publishes each message in a call of its own, one after the other: faults befall messages, not calls.
func (p *faultyPublisher) Publish(ctx context.Context, msgs ...*postrider.Message) error {
	fates, order := make([]fate, len(msgs)), make([]int, len(msgs))
	for i, m := range msgs {
		fates[i], order[i] = p.roll(m), i
		if i > 0 && fates[i].reorder {
			order[i-1], order[i] = order[i], order[i-1]
		}
	}
	errs := make([]error, len(msgs))
	failed := false
	for _, i := range order {
		errs[i] = p.publish(ctx, msgs[i], fates[i])
		failed = failed || errs[i] != nil
	}
	switch {
	case !failed:
		return nil
	case len(msgs) == 1:
		return errs[0]
	default:
		return &postrider.BatchError{Errs: errs}
	}
}

func (p *faultyPublisher) publish(ctx context.Context, m *postrider.Message, f fate) error {
	pause(ctx, f.delay)
	err := p.next.Publish(ctx, m)
	if err == nil && f.duplicate {
		err = p.next.Publish(ctx, m)
	}
	if err == nil && f.failAck {
		err = lostAck(m)
	}
	return err
}
