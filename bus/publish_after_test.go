package bus_test

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

func TestPublishAfter(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	message := func(address string) *postrider.Message {
		m, err := noted.Message(t.Context(), &note{})
		if err != nil {
			t.Fatal(err)
		}
		m.Topic = address
		return m
	}
	if _, err := b.PublishAfter(t.Context(), 0, message("notes.other")); err != nil {
		t.Fatal(err)
	}
	last := uint64(0)
	for round := range 5 {
		var wg sync.WaitGroup
		var won, lost atomic.Int64
		var next atomic.Uint64
		for range 8 {
			m := message("notes.7")
			wg.Go(func() {
				switch seq, err := b.PublishAfter(t.Context(), last, m); {
				case err == nil:
					won.Add(1)
					next.Store(seq)
				case errors.Is(err, postrider.Aborted):
					lost.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 || lost.Load() != 7 || next.Load() != uint64(round)+2 {
			t.Errorf("%d won, %d lost, the sequence is %d, want 1, 7 and %d", won.Load(), lost.Load(), next.Load(), round+2)
		}
		last = next.Load()
	}
	if n := len(stored(t, nc, "NOTES")); n != 6 {
		t.Errorf("stored %d messages, want 6", n)
	}
	later := message("notes.7")
	if err := later.SetExtension(postrider.ExtDeliverAt, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if _, err := b.PublishAfter(t.Context(), last, later); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("with a delay: %v", err)
	}
	if _, err := b.PublishAfter(t.Context(), 0, message("elsewhere")); err == nil {
		t.Error("no stream takes the address, and yet it was published")
	}
}
