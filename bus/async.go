package bus

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/postrider/postrider"
)

const (
	defaultWindow  = 1000
	maxWindowBytes = 64 << 20 // of messages in a window
	maxUnseen      = 100      // failures that are kept for Flush
)

// Async publishes without waiting: see [Bus.Async]. It is a [postrider.Publisher], safe for concurrent use.
type Async struct {
	bus    *Bus
	window int
	result func(*postrider.Message, error)

	mu      sync.Mutex
	change  chan struct{} // closed and replaced when messages got their result
	queue   []queued
	bytes   int    // of all that have no result
	taken   uint64 // messages so far, each has its number
	done    uint64 // messages with a result, which come in the order of the numbers
	working bool
	failed  map[string]failure // by key
	unseen  []error
	more    int // failures that there was no room for in unseen
}

// queued is a message without a result.
type queued struct {
	msg   *postrider.Message
	entry *entry
	size  int
}

// failure is why the messages of a key fail up to a number.
type failure struct {
	err  error
	upTo uint64
}

// Async returns a publisher that does not wait for the streams: its Publish returns when the messages are on their way.
// So many that have no result yet are its window, with at most 64 MiB of data, and Publish waits for room when it is full. A
// window of zero or less is one of 1000.
//
// Everything else is as with [Bus.Publish]: what waits goes out together, failures that pass are tried again until
// [Config.PublishTimeout] ends, counted from when the message goes out, and messages are stored in the order in which they
// were published. When a message with a key fails for a reason that passes, those of its key that wait behind it fail too, lest
// they should overtake it.
//
// The callback gets the result of each message, one after the other in the order of Publish, on a goroutine of the bus: it
// holds up those behind it, and must not publish through the same Async. It may be nil: then [Async.Flush] returns what failed.
// [Bus.Run] does not end before all messages have their results, or [Config.DrainTimeout] has passed; its error tells what
// neither a callback nor Flush has seen.
//
//	a := b.Async(0, func(m *postrider.Message, err error) { ... })
//	err := OrderPlaced.Publish(ctx, a, &order)
//	err = a.Flush(ctx)
func (b *Bus) Async(window int, result func(m *postrider.Message, err error)) *Async {
	if window <= 0 {
		window = defaultWindow
	}
	return &Async{bus: b, window: window, result: result, change: make(chan struct{}), failed: map[string]failure{}}
}

// Publish takes messages and returns when they are on their way. They must not be changed before they have their results.
// ctx bounds the wait for room in the window and nothing else. The error tells what was not taken, which the callback does
// not hear of: InvalidArgument and ResourceExhausted as with [Bus.Publish], or that of ctx. With several messages it is a
// *[postrider.BatchError].
func (a *Async) Publish(ctx context.Context, msgs ...*postrider.Message) error {
	errs := make([]error, len(msgs))
	failed := false
	for i, m := range msgs {
		e, err := a.bus.prepare(m)
		if err == nil {
			err = a.take(ctx, queued{m, e, e.msg.Size()})
		}
		errs[i], failed = err, failed || err != nil
	}
	switch {
	case !failed:
		return nil
	case len(errs) == 1:
		return errs[0]
	default:
		return &postrider.BatchError{Errs: errs}
	}
}

// take puts a message into the queue when there is room in the window.
func (a *Async) take(ctx context.Context, q queued) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for a.taken > a.done && (a.taken-a.done >= uint64(a.window) || a.bytes+q.size > maxWindowBytes) {
		if err := a.await(ctx); err != nil {
			return &postrider.Error{
				Code: postrider.CodeOf(err), Op: "bus: publish " + q.msg.ID, Err: err, Unprocessed: true,
				Msg: fmt.Sprintf("gave up waiting for room: %d messages are on their way", a.taken-a.done),
			}
		}
	}
	a.queue = append(a.queue, q)
	a.taken++
	a.bytes += q.size
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
// since the last Flush, joined; of more than 100 the first 100. When ctx ends first its error is part of what Flush returns, and
// the messages stay on their way.
func (a *Async) Flush(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var err error
	for upTo := a.taken; a.done < upTo && err == nil; {
		if err = a.await(ctx); err != nil {
			err = &postrider.Error{
				Code: postrider.CodeOf(err), Op: "bus: flush", Err: err,
				Msg: fmt.Sprintf("%d messages have no result yet", a.taken-a.done),
			}
		}
	}
	errs := append([]error{err}, a.unseen...)
	if a.more > 0 {
		errs = append(errs, fmt.Errorf("bus: %d messages more were not published", a.more))
	}
	a.unseen, a.more = nil, 0
	if !a.working {
		a.bus.busy(a, false)
	}
	return errors.Join(errs...)
}

// work publishes what is queued until nothing is.
func (a *Async) work() {
	for {
		a.mu.Lock()
		n := 0
		for size := 0; n < len(a.queue) && n < maxGroup && (n == 0 || size < maxGroupBytes); n++ {
			size += a.queue[n].size
		}
		chunk := a.queue[:n:n]
		if a.queue = a.queue[n:]; n == 0 {
			a.queue, a.working = nil, false
			clear(a.failed)
			a.bus.busy(a, len(a.unseen) > 0)
			a.mu.Unlock()
			return
		}
		errs := a.refused(chunk)
		a.mu.Unlock()
		a.publish(chunk, errs)
		a.settle(chunk, errs)
	}
}

// refused returns the errors of messages whose key has failed before, nil for the others. It is called with the lock.
func (a *Async) refused(chunk []queued) []error {
	errs := make([]error, len(chunk))
	for i, q := range chunk {
		if f, ok := a.failed[q.entry.key]; ok {
			if a.done+uint64(i) < f.upTo {
				errs[i] = unsent(f.err)
			} else {
				delete(a.failed, q.entry.key)
			}
		}
	}
	return errs
}

// publish fills in the errors of messages that have none yet.
func (a *Async) publish(chunk []queued, errs []error) {
	entries, index := make([]*entry, 0, len(chunk)), make([]int, 0, len(chunk))
	for i, q := range chunk {
		if errs[i] == nil {
			entries, index = append(entries, q.entry), append(index, i)
		}
	}
	if len(entries) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), a.bus.cfg.PublishTimeout)
	defer cancel()
	for i, err := range a.bus.publishAgain(ctx, entries, a.bus.publishOnce(ctx, entries)) {
		errs[index[i]] = err
	}
}

// settle gives messages their results.
func (a *Async) settle(chunk []queued, errs []error) {
	a.fail(chunk, errs) // before the callback hears of it and publishes anew
	if a.result != nil {
		for i, q := range chunk {
			a.result(q.msg, errs[i])
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.done += uint64(len(chunk))
	for _, q := range chunk {
		a.bytes -= q.size
	}
	close(a.change)
	a.change = make(chan struct{})
}

// fail notes failures for the messages of the same keys, and for Flush.
func (a *Async) fail(chunk []queued, errs []error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, err := range errs {
		if err == nil {
			continue
		}
		m := chunk[i].msg
		if key := m.Key(); key != "" && postrider.Retryable(err) {
			a.failed[key] = failure{err, a.taken}
		}
		switch {
		case a.result != nil:
		case len(a.unseen) < maxUnseen:
			a.unseen = append(a.unseen, fmt.Errorf("%s %s: %w", m.Type, m.ID, err))
		default:
			a.more++
		}
	}
}

// busy notes if there is something to wait for, or to tell, at the end of Run.
func (b *Bus) busy(a *Async, is bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if is {
		b.asyncs[a] = struct{}{}
	} else {
		delete(b.asyncs, a)
	}
}

// flush waits for what was published without waiting.
func (b *Bus) flush(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), b.cfg.DrainTimeout)
	defer cancel()
	b.mu.Lock()
	asyncs := make([]*Async, 0, len(b.asyncs))
	for a := range b.asyncs {
		asyncs = append(asyncs, a)
	}
	b.mu.Unlock()
	errs := make([]error, len(asyncs))
	for i, a := range asyncs {
		errs[i] = a.Flush(ctx)
	}
	return errors.Join(errs...)
}
