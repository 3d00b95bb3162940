package bus

import (
	"context"
	"slices"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
)

// Batch says how many events a handler of batches ([postrider.Topic.BatchHandler]) gets at most at a time, 1 to 1000, and
// how long the first of them waits for others, 0 to 1 min: a batch is what has come by then. [Concurrency] is how many
// batches are handled at once, by default one; together they have at most 10,000 events. In an [Ordered] subscription a
// batch has at most one event of a key. A batch that is still being filled when the service stops is given back. Default
// 100 events and 20 ms.
func Batch(events int, wait time.Duration) SubscribeOption {
	return func(c *subscribeConfig) { c.batch, c.batchWait, c.batchGiven = events, wait, true }
}

// Defaults and bounds of Batch.
const (
	defaultBatch     = 100
	defaultBatchWait = 20 * time.Millisecond
	maxBatch         = 1000
	maxBatchWait     = time.Minute
	maxInBatches     = 10_000
)

// checkBatch fills in the defaults of a handler of batches, and checks what was given.
func (c *subscribeConfig) checkBatch(h postrider.Handler) error {
	bad := func(format string, args ...any) error {
		return postrider.Errorf(postrider.InvalidArgument, format, args...)
	}
	if !h.IsBatch() {
		if c.batchGiven {
			return bad("Batch needs a handler of batches: make it with Topic.BatchHandler")
		}
		return nil
	}
	if !c.batchGiven {
		c.batch, c.batchWait = defaultBatch, defaultBatchWait
	}
	switch {
	case c.batch < 1 || c.batch > maxBatch:
		return bad("Batch is of %d events: want 1 to %d", c.batch, maxBatch)
	case c.batchWait < 0 || c.batchWait > maxBatchWait:
		return bad("Batch waits %v: want 0 to %v", c.batchWait, maxBatchWait)
	case c.concurrency > maxInBatches/c.batch:
		return bad("Batch is of %d events and Concurrency is %d: want at most %d events at once", c.batch, c.concurrency, maxInBatches)
	}
	return nil
}

// atOnce is how many messages are handled at the same time.
func (c *subscribeConfig) atOnce() int { return c.concurrency * max(c.batch, 1) }

// workBatches is a worker of a subscription whose handler takes batches. It ends when the queue is closed.
func (s *subscription) workBatches(ctx context.Context) {
	for {
		batch := s.gather()
		if batch == nil {
			return
		}
		if s.admitBatch(len(batch)) {
			s.handleTogether(ctx, batch)
			<-s.slots
		} else if s.lanes == nil { // else the drain gives back all that is held
			for _, d := range batch {
				s.settled(d, 0)
				s.giveBack(d.Msg)
			}
		}
	}
}

// gather returns the next batch, nil when the queue is closed. One worker does it at a time: two would divide between them
// what is to fill one batch.
func (s *subscription) gather() []*delivered {
	s.gathering.Lock()
	defer s.gathering.Unlock()
	first, open := <-s.queue
	if !open {
		return nil
	}
	batch := []*delivered{first}
	var over <-chan time.Time
	for last := first; len(batch) < s.cfg.batch && !last.isOrder(); {
		select {
		case last, open = <-s.queue:
		default:
			if over == nil {
				if s.cfg.batchWait == 0 || s.holdsUp(batch) {
					return batch
				}
				over = time.After(s.cfg.batchWait)
			}
			select {
			case last, open = <-s.queue:
			case <-over:
				return batch
			case <-s.stop:
				return batch
			}
		}
		if !open {
			return batch
		}
		batch = append(batch, last)
	}
	return batch
}

// isOrder says that a message is none for the handler, but has the bus do something now: see park.go.
func (d *delivered) isOrder() bool { return d.question != "" || d.Header[headerRelease] != nil }

// holdsUp says if messages of an ordered subscription wait behind those of a batch: then it waits for no more.
func (s *subscription) holdsUp(batch []*delivered) bool {
	if s.lanes == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(batch, func(d *delivered) bool { return d.lane != nil && len(d.lane.waiting) > 0 })
}

// admitBatch waits until a batch of n may begin, in a slot. It returns false when the drain begins first.
func (s *subscription) admitBatch(n int) bool {
	for range n {
		if s.pacer != nil && !s.pacer.wait(s.stop) {
			return false
		}
	}
	if s.breaker != nil && !s.breaker.enter(s.stop) {
		return false
	}
	select {
	case <-s.stop: // rather than a slot
		return false
	default:
	}
	select {
	case <-s.stop:
		return false
	case s.slots <- struct{}{}:
		return true
	}
}

// handleTogether runs a handler of batches and settles each message by itself.
func (s *subscription) handleTogether(ctx context.Context, batch []*delivered) {
	began := time.Now()
	var ready []*delivered
	var deliveries []postrider.Delivery
	for _, d := range batch {
		fence, may := s.mayBegin(d)
		if !may {
			continue
		}
		delivery, isReady, settled := s.prepare(ctx, d, fence)
		switch {
		case isReady:
			ready, deliveries = append(ready, d), append(deliveries, delivery)
		case settled:
			s.settled(d, 0)
		}
	}
	if s.lanes != nil { // what the others were begun with may have taken long
		ready, deliveries = s.stillOurs(ready, deliveries)
	}
	if len(ready) == 0 {
		s.noProbe()
	}
	errs := s.attemptTogether(ctx, ready, deliveries)
	took := time.Since(began) / time.Duration(max(len(ready), 1))
	for i, d := range ready {
		if s.settle(d, nil, errs[i]) {
			s.settled(d, took)
		}
	}
}

// stillOurs returns the messages that may begin, with the fencing token under which they do.
func (s *subscription) stillOurs(batch []*delivered, deliveries []postrider.Delivery) ([]*delivered, []postrider.Delivery) {
	var ours []*delivered
	var kept []postrider.Delivery
	for i, d := range batch {
		fence, may := s.mayBegin(d)
		deliveries[i].Fence = fence
		switch {
		case !may:
		case d.behind == nil:
			ours, kept = append(ours, d), append(kept, deliveries[i])
		case s.parkBehind(d, deliveries[i]):
			s.settled(d, 0)
		}
	}
	return ours, kept
}

// attemptTogether reads messages and runs a handler of batches on those that can be handled.
func (s *subscription) attemptTogether(ctx context.Context, batch []*delivered, deliveries []postrider.Delivery) []error {
	errs := make([]error, len(batch))
	msgs, places := make([]*postrider.Message, 0, len(batch)), make([]int, 0, len(batch))
	for i, d := range batch {
		if errs[i] = s.open(d, deliveries[i]); errs[i] == nil {
			msgs, places = append(msgs, d.message), append(places, i)
		}
	}
	if len(msgs) == 0 {
		return errs
	}
	for i, err := range s.handler.HandleBatch(ctx, msgs) {
		errs[places[i]] = err
	}
	return errs
}

// outcome is what an attempt at one event of a message in a batch mode has come to.
type outcome struct {
	*delivered
	reply *postrider.Message
	err   error
}

// attemptItems runs the handler on the events of one message: one after the other, or together if it takes batches.
func (s *subscription) attemptItems(ctx context.Context, items []*nats.Msg, delivery postrider.Delivery) []outcome {
	outcomes := make([]outcome, len(items))
	parts := make([]*delivered, len(items))
	for i, msg := range items {
		parts[i] = newDelivered(msg)
		outcomes[i].delivered = parts[i]
		if !s.handler.IsBatch() {
			outcomes[i].reply, outcomes[i].err = s.attempt(ctx, parts[i], delivery)
		}
	}
	if !s.handler.IsBatch() {
		return outcomes
	}
	done := 0
	for part := range slices.Chunk(parts, s.cfg.batch) {
		for _, err := range s.attemptTogether(ctx, part, slices.Repeat([]postrider.Delivery{delivery}, len(part))) {
			outcomes[done].err = err
			done++
		}
	}
	return outcomes
}
