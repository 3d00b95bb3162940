package membus

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/postrider/postrider"
)

// Async publishes without waiting, as bus.Async does. It is a [postrider.Publisher], safe for concurrent use.
type Async struct {
	bus    *Bus
	window int
	result func(*postrider.Message, error)

	mu      sync.Mutex
	change  chan struct{} // closed and replaced when a message got its result
	queue   []*postrider.Message
	taken   int // messages so far
	done    int // of them have a result
	working bool
	unseen  []error
}

// Async returns a publisher that does not wait for the streams, with the results of [bus.Bus.Async], which tells about the window
// and the callback. Here the window has no bound in bytes, and Flush returns all failures. In a bubble of testing/synctest what
// was published has its result after synctest.Wait.
func (b *Bus) Async(window int, result func(m *postrider.Message, err error)) *Async {
	if window <= 0 {
		window = 1000
	}
	return &Async{bus: b, window: window, result: result, change: make(chan struct{})}
}

// Publish takes messages, and waits for room in the window. What is not taken, the error tells and the callback does not.
func (a *Async) Publish(ctx context.Context, msgs ...*postrider.Message) error {
	errs := make([]error, len(msgs))
	for i, m := range msgs {
		if errs[i] = a.bus.check(m); errs[i] == nil {
			errs[i] = a.take(ctx, m)
		}
	}
	return published(errs)
}

// take puts a message into the queue when there is room in the window.
func (a *Async) take(ctx context.Context, m *postrider.Message) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for a.taken-a.done >= a.window {
		if err := a.await(ctx); err != nil {
			return &postrider.Error{
				Code: postrider.CodeOf(err), Op: "membus: publish " + m.ID, Err: err, Unprocessed: true,
				Msg: fmt.Sprintf("gave up waiting for room: %d messages are on their way", a.taken-a.done),
			}
		}
	}
	a.queue = append(a.queue, m)
	a.taken++
	if !a.working {
		a.working = true
		a.bus.busy(a, true)
		go a.work()
	}
	return nil
}

// await waits until more messages have their results, or ctx ends. It is called with the lock, and gives it up meanwhile.
func (a *Async) await(ctx context.Context) error {
	change := a.change
	a.mu.Unlock()
	defer a.mu.Lock()
	select {
	case <-change:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Flush waits until all messages that were published before have their results. Without a callback it returns the failures
// since the last Flush, joined. When ctx ends first its error is part of what Flush returns.
func (a *Async) Flush(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var err error
	for upTo := a.taken; a.done < upTo && err == nil; {
		if err = a.await(ctx); err != nil {
			err = &postrider.Error{
				Code: postrider.CodeOf(err), Op: "membus: flush", Err: err,
				Msg: fmt.Sprintf("%d messages have no result yet", a.taken-a.done),
			}
		}
	}
	err = errors.Join(append([]error{err}, a.unseen...)...)
	a.unseen = nil
	if !a.working {
		a.bus.busy(a, false)
	}
	return err
}

// work publishes what is queued until nothing is.
func (a *Async) work() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for len(a.queue) > 0 {
		m := a.queue[0]
		a.queue = a.queue[1:]
		a.mu.Unlock()
		err := a.publish(m)
		if a.result != nil {
			a.result(m, err)
		}
		a.mu.Lock()
		if err != nil && a.result == nil {
			a.unseen = append(a.unseen, fmt.Errorf("%s %s: %w", m.Type, m.ID, err))
		}
		a.done++
		close(a.change)
		a.change = make(chan struct{})
	}
	a.working = false
	a.bus.busy(a, len(a.unseen) > 0)
}

// publish does not know the context of who published: that bounded the wait for room and nothing else.
func (a *Async) publish(m *postrider.Message) error { return a.bus.Publish(context.Background(), m) }

// busy notes if there is something to wait for, or to tell, at the end of Run.
func (b *Bus) busy(a *Async, is bool) {
	b.broker.mu.Lock()
	defer b.broker.mu.Unlock()
	if is {
		b.asyncs[a] = true
	} else {
		delete(b.asyncs, a)
	}
}

// flush waits for what was published without waiting.
func (b *Bus) flush() error {
	b.broker.mu.Lock()
	asyncs := make([]*Async, 0, len(b.asyncs))
	for a := range b.asyncs {
		asyncs = append(asyncs, a)
	}
	b.broker.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), b.cfg.DrainTimeout)
	defer cancel()
	errs := make([]error, len(asyncs))
	for i, a := range asyncs {
		errs[i] = a.Flush(ctx)
	}
	return errors.Join(errs...)
}
