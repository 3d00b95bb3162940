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

// A key is parked out of a batch, other keys of it go on, and a release brings all of it in order.
func TestBatchesAndParking(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	d := newDiary()
	var broken switches
	broken.set("key-0", true)
	err := b.Subscribe(keyed.BatchHandler(func(_ context.Context, events []postrider.Event[note]) error {
		fates := &postrider.BatchError{Errs: make([]error, len(events))}
		for i, e := range events {
			if broken.is(e.Value.Text) {
				fates.Errs[i] = postrider.Park(errors.New("no customer"))
				continue
			}
			end := d.begin(e.Value)
			d.finish(e.Value)
			end()
		}
		return fates
	}), bus.Ordered(), bus.Batch(5, 10*time.Millisecond), bus.From(bus.DeliverAll))
	if err != nil {
		t.Fatal(err)
	}
	run(t, b)
	publishKeyed(t, b, 5, 0, 10)
	postridertest.Eventually(t, wantCount(d.handled, 40))
	parkedKeys(t, b, bus.ParkedFilter{Key: "key-0"}, 10)
	broken.set("key-0", false)
	if n, err := b.Parked().Release(t.Context(), bus.ParkedFilter{}, operator); err != nil || n != 1 {
		t.Fatal(n, err)
	}
	postridertest.Eventually(t, wantCount(d.handled, 50))
	nothingParked(t, nc, b)
	d.check(t)
}
