package bus_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// Several events in one message are given to a handler of batches together.
func TestBatchHandlerTakesABatchOfEvents(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	var got calls
	var batches atomic.Int64
	err := b.Subscribe(noted.BatchHandler(func(_ context.Context, events []postrider.Event[note]) error {
		batches.Add(1)
		fates := &postrider.BatchError{Errs: make([]error, len(events))}
		for i, e := range events {
			if times := got.add(e.ID); e.ID == "b" {
				fates.Errs[i] = errors.New("never")
			} else if times == 1 && len(events) != 2 {
				t.Errorf("%d events came together, want 2", len(events))
			}
		}
		return fates
	}), quick, bus.Batch(2, time.Millisecond), bus.From(bus.DeliverAll))
	if err != nil {
		t.Fatal(err)
	}
	run(t, b)
	<-b.Started()
	send(t, nc, "application/cloudevents-batch+protobuf", protoBatch(t, "a", "b", "c", "d"))
	letters := waitLetters(t, b, bus.LetterFilter{}, 1)
	if letters[0].Message.ID != "b" {
		t.Errorf("the dead letter is %s, want the event that failed", letters[0].Message.ID)
	}
	if n := batches.Load(); n != 2*int64(letters[0].Attempts) {
		t.Errorf("four events came in %d batches in %d attempts, want two each", n, letters[0].Attempts)
	}
}

// While the circuit is open batches wait, and one of them is the probe.
func TestBatchesAndTheCircuitBreaker(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	var down atomic.Bool
	var handled atomic.Int64
	down.Store(true)
	err := b.Subscribe(noted.BatchHandler(func(_ context.Context, events []postrider.Event[note]) error {
		if down.Swap(false) {
			return errors.New("the database is away")
		}
		handled.Add(int64(len(events)))
		return nil
	}), quick, bus.Batch(5, time.Millisecond), bus.CircuitBreaker(3, 50*time.Millisecond), bus.From(bus.DeliverAll))
	if err != nil {
		t.Fatal(err)
	}
	publishNotes(t, b, 0, 20)
	run(t, b)
	postridertest.Eventually(t, wantCount(func() int { return int(handled.Load()) }, 20))
}
