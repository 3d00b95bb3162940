package postrider_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/postrider/postrider"
)

// runner is a Runner made of a function.
type runner func(ctx context.Context) error

func (r runner) Run(ctx context.Context) error { return r(ctx) }

// journal records what happens, in order.
type journal struct {
	mu     sync.Mutex
	events []string
}

func (j *journal) add(event string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.events = append(j.events, event)
}

// part lives until its context ends, then drains for a while.
func (j *journal) part(name string, drain time.Duration, err error) runner {
	return func(ctx context.Context) error {
		<-ctx.Done()
		j.add(name + " stops")
		time.Sleep(drain) // inside a synctest bubble: no real time passes
		j.add(name + " is done")
		return err
	}
}

func TestRunDrainsInOrder(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var j journal
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			done <- postrider.Run(ctx, j.part("bus", time.Second, nil), j.part("server", time.Minute, nil), j.part("relay", 0, nil))
		}()
		synctest.Wait()
		if len(j.events) != 0 {
			t.Errorf("before the end: %v", j.events)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		want := []string{"bus stops", "bus is done", "server stops", "server is done", "relay stops", "relay is done"}
		if !slices.Equal(j.events, want) {
			t.Errorf("order %v, want %v", j.events, want)
		}
	})
}

func TestRunEndsWhenAPartFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var j journal
		lost, late := errors.New("connection lost"), errors.New("cannot drain")
		failing := runner(func(context.Context) error {
			time.Sleep(time.Hour)
			return lost
		})
		err := postrider.Run(t.Context(), j.part("bus", 0, nil), failing, j.part("relay", time.Second, late))
		if !errors.Is(err, lost) || !errors.Is(err, late) {
			t.Errorf("got %v, want both failures", err)
		}
		if want := []string{"bus stops", "bus is done", "relay stops", "relay is done"}; !slices.Equal(j.events, want) {
			t.Errorf("order %v, want %v", j.events, want)
		}
	})
}

// A part that returns nil early has nothing left to do; the others live on.
func TestRunOutlivesAPartThatEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var j journal
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		begin := time.Now()
		err := postrider.Run(ctx, runner(func(context.Context) error { return nil }), j.part("relay", 0, nil))
		if err != nil || time.Since(begin) != time.Hour {
			t.Errorf("ended after %v with %v", time.Since(begin), err)
		}
	})
}

type ctxKey struct{}

// Parts see the values of ctx, but neither its end nor its deadline: each is stopped in its turn.
func TestRunContextOfParts(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.WithValue(t.Context(), ctxKey{}, "value"), time.Hour)
	cancel()
	look := runner(func(ctx context.Context) error {
		if ctx.Value(ctxKey{}) != "value" {
			t.Error("the value is gone")
		}
		if _, ok := ctx.Deadline(); ok {
			t.Error("the part has a deadline of its own")
		}
		<-ctx.Done()
		return nil
	})
	if err := postrider.Run(ctx, look, look); err != nil {
		t.Error(err)
	}
}
