package membus

import (
	"container/heap"
	"context"

	"github.com/postrider/postrider"
)

// takeBatch waits for a message, and then for others to fill a batch. It returns nil when ctx ends before the batch begins.
func (s *subscription) takeBatch(ctx context.Context) []*delivery {
	k := s.bus.broker
	first := k.take(ctx, s, 0)
	if first == nil {
		return nil
	}
	batch := []*delivery{first}
	fill, cancel := context.WithTimeout(ctx, s.BatchWait)
	defer cancel()
	for len(batch) < s.Batch {
		d := k.poll(s, len(batch))
		if d == nil {
			d = k.take(fill, s, len(batch))
		}
		if d == nil {
			break
		}
		batch = append(batch, d)
	}
	if ctx.Err() != nil {
		k.giveBack(s, batch)
		return nil
	}
	return batch
}

// poll is take for a message that is there now.
func (k *Broker) poll(s *subscription, holding int) *delivery {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fire()
	d, _ := k.next(s, holding)
	return d
}

// giveBack puts deliveries that were not begun back in their places.
func (k *Broker) giveBack(s *subscription, batch []*delivery) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, d := range batch {
		if s.held[d] {
			delete(s.held, d)
			k.running--
			d.attempt--
			heap.Push(&s.group.queue, d)
		}
	}
	k.announce()
}

// handleBatch runs a handler of batches and settles each message by itself.
func (s *subscription) handleBatch(ctx context.Context, batch []*delivery) {
	var ready []*delivery
	var msgs []*postrider.Message
	settleCtx := context.WithoutCancel(ctx)
	for _, d := range batch {
		m, err := s.open(d)
		if err != nil {
			s.settle(settleCtx, d, m, nil, err)
			continue
		}
		ready, msgs = append(ready, d), append(msgs, m)
	}
	for i, err := range s.handler.HandleBatch(ctx, msgs) {
		s.settle(settleCtx, ready[i], msgs[i], nil, err)
	}
}
