package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider/bench/internal/harness"
)

// cellRun is one cell as one peer runs it.
type cellRun struct {
	cell    cell
	job     job
	session session
	stream  jetstream.Stream
	tally   *tally
}

func (r *cellRun) duration() time.Duration {
	if r.cell.kind == memory {
		return memoryTime
	}
	return r.job.Duration()
}

// publish has callers publish until the time is up. What was acknowledged must be there, once.
func (r *cellRun) publish(ctx context.Context) (result, error) {
	if err := r.warmUp(ctx); err != nil {
		return result{}, err
	}
	m, err := harness.StartMeter(r.job)
	if err != nil {
		return result{}, err
	}
	until := time.Now().Add(r.duration())
	switch c, ok := r.session.(*ceiling); {
	case ok:
		var published int64
		published, err = c.drive(r.cell.kind, r.cell.n, until)
		r.tally.next.Store(published)
	case r.cell.kind == batching:
		err = r.publishBatches(ctx, until)
	default:
		err = r.publishSingly(ctx, r.cell.n, func() bool { return time.Now().Before(until) })
	}
	published := r.tally.next.Load()
	res, stopErr := m.Stop(published)
	if err != nil || stopErr != nil {
		return res, errors.Join(err, stopErr)
	}
	info, err := r.stream.Info(ctx)
	if err != nil {
		return res, err
	}
	stored := int64(info.State.Msgs) - 1
	res.Lost, res.Twice = max(published-stored, 0), max(stored-published, 0)
	return res, nil
}

// warmUp publishes one value, whose number does not count: connections are up, streams known.
func (r *cellRun) warmUp(ctx context.Context) error {
	return r.session.publish(ctx, r.tally.blank())
}

// publishSingly has callers publish one value after the other as long as more says so.
func (r *cellRun) publishSingly(ctx context.Context, callers int, more func() bool) error {
	var wg sync.WaitGroup
	errs := make([]error, callers)
	for i := range callers {
		wg.Go(func() {
			for v := r.tally.blank(); errs[i] == nil && more() && r.tally.stamp(v); {
				errs[i] = r.session.publish(ctx, v)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (r *cellRun) publishBatches(ctx context.Context, until time.Time) error {
	values := make([]*value, batchSize)
	for i := range values {
		values[i] = r.tally.blank()
	}
	for time.Now().Before(until) {
		for i, v := range values {
			if !r.tally.stamp(v) {
				values = values[:i]
				break
			}
		}
		if len(values) == 0 {
			return nil
		}
		if err := r.session.publishAll(ctx, values); err != nil {
			return err
		}
	}
	return nil
}

// drain has handlers work off a backlog until it is done or the time is up.
func (r *cellRun) drain(ctx context.Context) (result, error) {
	total := int64(backlog(r.job, r.cell))
	for from := int64(0); from < total; from += batchSize {
		values := make([]*value, min(batchSize, total-from))
		for i := range values {
			values[i] = r.tally.blank()
			r.tally.stampAs(values[i], from+int64(i))
		}
		if err := r.session.backlog(ctx, values); err != nil {
			return result{}, err
		}
	}
	r.tally.seen = make([]atomic.Uint32, total)
	fn := r.tally.handle
	switch r.cell.kind { //nolint:exhaustive // the others need no handler of their own
	case keyed:
		fn = r.tally.handleKeyed
	case retrying:
		r.tally.failed = make([]atomic.Bool, total)
		fn = r.tally.handleFailing
	case slow:
		fn = func(v *value) error {
			time.Sleep(slowTime)
			return r.tally.handle(v)
		}
	}
	r.tally.expect(total)
	m, err := harness.StartMeter(r.job)
	if err != nil {
		return result{}, err
	}
	heap := func() float64 { return 0 }
	if r.cell.kind == memory {
		heap = watchHeap().stop
	}
	stop, err := r.session.handle(ctx, r.cell.handlers(), fn)
	if err != nil {
		return result{}, err
	}
	select {
	case <-r.tally.done:
	case <-time.After(r.duration()):
	}
	handled, took := r.tally.handled.Load(), time.Since(r.tally.began)-time.Duration(r.tally.first.Load())
	res, err := m.Stop(handled)
	res.Heap = heap()
	res.Rate = float64(handled) / took.Seconds() // from the first message on: what came before is done once
	return r.check(ctx, res, errors.Join(err, stop()))
}

// endToEnd has callers publish until the time is up, and measures until the last message is handled.
func (r *cellRun) endToEnd(ctx context.Context) (result, error) {
	t := r.tally
	t.seen = make([]atomic.Uint32, int(maxRate*r.job.Seconds))
	t.tokens = make(chan struct{}, window)
	m, err := harness.StartMeter(r.job)
	if err != nil {
		return result{}, err
	}
	stop, err := r.session.handle(ctx, r.cell.n, t.handle)
	if err != nil {
		return result{}, err
	}
	expired := time.After(r.duration())
	over := make(chan struct{})
	go func() { <-expired; close(over) }()
	began := time.Now()
	err = r.publishSingly(ctx, endCallers, func() bool {
		select {
		case <-over:
			return false
		case t.tokens <- struct{}{}:
			return true
		}
	})
	err = errors.Join(err, r.awaitAll())
	took := time.Since(began)
	res, stopErr := m.Stop(t.handled.Load())
	res.Rate = float64(res.Messages) / took.Seconds()
	return r.check(ctx, res, errors.Join(err, stopErr, stop()))
}

// awaitAll waits until all that was published is handled. What is not there by then is for check to tell.
func (r *cellRun) awaitAll() error {
	r.tally.expect(r.tally.next.Load())
	select {
	case <-r.tally.done:
		return nil
	case <-time.After(2 * ackWait):
		return fmt.Errorf("%d of %d messages were handled", r.tally.handled.Load(), r.tally.next.Load())
	}
}

// latency publishes at a steady pace, whether or not what came before has arrived.
func (r *cellRun) latency(ctx context.Context) (result, error) {
	t := r.tally
	total := int64(2 * r.job.Seconds * pace)
	t.delays = make([]time.Duration, total)
	t.seen = make([]atomic.Uint32, total)
	stop, err := r.session.handle(ctx, paceHandlers, t.handle)
	if err != nil {
		return result{}, err
	}
	m, err := harness.StartMeter(r.job)
	if err != nil {
		return result{}, errors.Join(err, stop())
	}
	errs := make(chan error, total)
	for began, n := time.Now(), int64(0); n < total; n++ {
		time.Sleep(time.Until(began.Add(time.Duration(n) * time.Second / pace)))
		go func() {
			v := t.blank()
			t.stamp(v)
			errs <- r.session.publish(ctx, v)
		}()
	}
	for range total {
		err = errors.Join(err, <-errs)
	}
	err = errors.Join(err, r.awaitAll())
	res, stopErr := m.Stop(t.handled.Load())
	res.P50, res.P99 = t.quantiles()
	return r.check(ctx, res, errors.Join(err, stopErr, stop()))
}

// check asks the server, when the handlers have stopped, which messages were acknowledged to it: each of them must have
// been handled.
func (r *cellRun) check(ctx context.Context, res result, err error) (result, error) {
	res.Twice, res.Disorder = r.tally.again.Load(), r.tally.disorder.Load()
	if err != nil {
		return res, err
	}
	consumers := r.stream.ListConsumers(ctx)
	for info := range consumers.Info() {
		stream, err := r.stream.Info(ctx)
		if err != nil {
			return res, err
		}
		acked := int64(stream.State.Msgs) - int64(info.NumPending) - int64(info.NumAckPending)
		res.Lost = max(acked-r.tally.handled.Load(), 0)
	}
	return res, consumers.Err()
}
