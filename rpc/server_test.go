package rpc

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

func TestServerRegister(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	for _, cfg := range []ServerConfig{{Prefix: "a b"}, {Source: "%zz"}, {MaxConcurrent: -1}, {Queue: "a b"}} {
		if _, err := NewServer(nc, cfg); !errors.Is(err, postrider.InvalidArgument) {
			t.Errorf("%+v: error %v, want InvalidArgument", cfg, err)
		}
	}
	srv, err := NewServer(nc, ServerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	h := reserve.Handler(echo)
	topic := postrider.NewTopic[item]("orders.placed.v1")
	event := topic.Handler(func(context.Context, postrider.Event[item]) error { return nil })
	if err := srv.Register(event); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("handler of a topic: %v", err)
	}
	batch := topic.BatchHandler(func(context.Context, []postrider.Event[item]) error { return nil })
	if err := srv.Register(batch); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("handler of batches: %v", err)
	}
	if err := srv.Register(h, h); !errors.Is(err, postrider.AlreadyExists) {
		t.Errorf("twice at once: %v", err)
	}
	if err := srv.Register(h); err != nil {
		t.Errorf("after a refused one: %v", err)
	}
	if err := srv.Register(h); !errors.Is(err, postrider.AlreadyExists) {
		t.Errorf("twice: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := srv.Run(ctx); err != nil {
		t.Errorf("Run: %v", err)
	}
	if err := srv.Register(h); !errors.Is(err, postrider.FailedPrecondition) {
		t.Errorf("after Run: %v", err)
	}
	if err := srv.Run(ctx); !errors.Is(err, postrider.FailedPrecondition) {
		t.Errorf("second Run: %v", err)
	}
}

func TestServerMiddleware(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	var order []string
	note := func(name string) postrider.Middleware {
		return func(next postrider.HandlerFunc) postrider.HandlerFunc {
			return func(ctx context.Context, m *postrider.Message) (*postrider.Message, error) {
				order = append(order, name)
				return next(ctx, m)
			}
		}
	}
	serve(t, nc, ServerConfig{Middleware: []postrider.Middleware{note("outer"), note("inner")}}, reserve.Handler(echo))
	if _, err := Call(t.Context(), dial(t, nc, ClientConfig{}), reserve, &item{}); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(order) != "[outer inner]" {
		t.Errorf("order %v", order)
	}
}

func TestServersShareCalls(t *testing.T) {
	t.Parallel()
	nats := postridertest.NewNATS(t)
	var counts [2]atomic.Int32
	for i := range counts {
		serve(t, nats.Connect(), ServerConfig{}, reserve.Handler(func(ctx context.Context, it *item) (*hold, error) {
			counts[i].Add(1)
			return echo(ctx, it)
		}))
	}
	c := dial(t, nats.Connect(), ClientConfig{})
	const n = 200 // that one of two gets none of them has a chance of 2^-199
	for i := range n {
		if _, err := Call(t.Context(), c, reserve, &item{SKU: i}); err != nil {
			t.Fatal(err)
		}
	}
	a, b := counts[0].Load(), counts[1].Load()
	if a == 0 || b == 0 || a+b != n {
		t.Errorf("the servers handled %d and %d of %d calls", a, b, n)
	}
}

func TestServerSlowHandlerBlocksNobody(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	g := newGate()
	serve(t, nc, ServerConfig{MaxConcurrent: 2}, reserve.Handler(func(ctx context.Context, it *item) (*hold, error) {
		if it.Note == "slow" {
			return g.handle(ctx, it)
		}
		return echo(ctx, it)
	}))
	c := dial(t, nc, ClientConfig{})
	slow := make(chan error, 1)
	go func() {
		_, err := Call(context.Background(), c, reserve, &item{Note: "slow"})
		slow <- err
	}()
	<-g.entered
	for i := range 20 {
		if _, err := Call(t.Context(), c, reserve, &item{SKU: i}); err != nil {
			t.Fatal(err)
		}
	}
	close(g.open)
	if err := <-slow; err != nil {
		t.Error(err)
	}
}

func TestServerBusy(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	g := newGate()
	serve(t, nc, ServerConfig{MaxConcurrent: 2, QueueSize: 2}, reserve.Handler(g.handle))
	c := dial(t, nc, ClientConfig{Timeout: time.Minute})
	var good []chan result
	good = append(good, goCall(c, 0), goCall(c, 1))
	<-g.entered
	<-g.entered
	// Two of these wait, the others are refused at once. Which ones is up to the scheduler.
	outcomes := make(chan result, 6)
	for i := range 6 {
		go func() {
			res, err := Call(context.Background(), c, reserve, &item{SKU: 10 + i})
			outcomes <- result{res, err}
		}()
	}
	for range 4 {
		_, err := (<-outcomes).unpack()
		wantError(t, err, postrider.ResourceExhausted, true)
		if !postrider.Retryable(err) {
			t.Error("busy is not retryable")
		}
	}
	close(g.open)
	for _, ch := range good {
		if _, err := (<-ch).unpack(); err != nil {
			t.Errorf("a call that ran: %v", err)
		}
	}
	for range 2 {
		if _, err := (<-outcomes).unpack(); err != nil {
			t.Errorf("a call that waited: %v", err)
		}
	}
}

// A call whose deadline passes in the queue does not run.
func TestServerDropsExpired(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	g := newGate()
	srv := serve(t, nc, ServerConfig{MaxConcurrent: 1}, reserve.Handler(g.handle))
	c := dial(t, nc, ClientConfig{Timeout: time.Minute})
	running := goCall(c, 1)
	<-g.entered
	_, err := Call(t.Context(), c, reserve, &item{SKU: 2}, Timeout(50*time.Millisecond))
	wantError(t, err, postrider.DeadlineExceeded, false)
	<-time.After(200 * time.Millisecond) // the server counts from when the call arrived there
	close(g.open)
	if _, err := (<-running).unpack(); err != nil {
		t.Error(err)
	}
	srv.stop()
	srv.drained(t)
	if n := len(g.entered); n != 0 {
		t.Errorf("%d calls ran after their deadline", n)
	}
}

func TestServerDrain(t *testing.T) {
	t.Parallel()
	nats := postridertest.NewNATS(t)
	g := newGate()
	srv := serve(t, nats.Connect(), ServerConfig{MaxConcurrent: 2}, reserve.Handler(g.handle))
	c := dial(t, nats.Connect(), ClientConfig{Timeout: time.Minute})
	var calls []chan result
	before := srv.nc.Stats().InMsgs
	for i := range 10 {
		calls = append(calls, goCall(c, i))
	}
	postridertest.Eventually(t, func() error { // two run, eight wait in the server
		if n := srv.nc.Stats().InMsgs - before; n < 10 {
			return fmt.Errorf("the server got %d messages, want 10", n)
		}
		return nil
	})
	srv.stop()
	postridertest.Eventually(t, func() error { // it takes no more
		_, err := Call(t.Context(), c, reserve, &item{SKU: 99}, Timeout(10*time.Millisecond))
		if !errors.Is(err, postrider.Unavailable) {
			return fmt.Errorf("a call while draining: %w, want Unavailable", err)
		}
		return nil
	})
	close(g.open)
	for i, ch := range calls {
		if res, err := (<-ch).unpack(); err != nil || res.ID != fmt.Sprint(i) {
			t.Errorf("call %d: %v, %v", i, res, err)
		}
	}
	srv.drained(t)
}

// One server after the other takes over and leaves, and no call fails.
func TestServerDrainUnderLoad(t *testing.T) {
	t.Parallel()
	nats := postridertest.NewNATS(t)
	c := dial(t, nats.Connect(), ClientConfig{Timeout: time.Minute})
	var handled atomic.Int64
	h := reserve.Handler(func(ctx context.Context, it *item) (*hold, error) {
		handled.Add(1)
		return echo(ctx, it)
	})
	srv := serve(t, nats.Connect(), ServerConfig{}, h)
	var stop atomic.Bool
	var answered atomic.Int64
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			for !stop.Load() {
				if _, err := Call(context.Background(), c, reserve, &item{}); err != nil {
					t.Error(err)
					return
				}
				answered.Add(1)
			}
		})
	}
	for range 5 {
		next := serve(t, nats.Connect(), ServerConfig{}, h)
		before := answered.Load()
		postridertest.Eventually(t, func() error {
			if n := answered.Load() - before; n < 100 {
				return fmt.Errorf("%d calls answered, want 100", n)
			}
			return nil
		})
		srv.stop()
		srv.drained(t)
		srv = next
	}
	stop.Store(true)
	callers.Wait()
	if a, h := answered.Load(), handled.Load(); a != h {
		t.Errorf("%d calls were answered and %d handled", a, h)
	}
}

func TestServerDrainTimeout(t *testing.T) {
	t.Parallel()
	nats := postridertest.NewNATS(t)
	g := newGate() // never opened: only its context ends a handler
	srv := serve(t, nats.Connect(), ServerConfig{MaxConcurrent: 1, DrainTimeout: 20 * time.Millisecond}, reserve.Handler(g.handle))
	c := dial(t, nats.Connect(), ClientConfig{Timeout: time.Minute})
	running := goCall(c, 1)
	<-g.entered
	before := srv.nc.Stats().InMsgs
	queued := goCall(c, 2)
	postridertest.Eventually(t, func() error {
		if n := srv.nc.Stats().InMsgs - before; n < 1 {
			return fmt.Errorf("the server got %d messages, want 1", n)
		}
		return nil
	})
	srv.stop()
	srv.drained(t)
	_, err := (<-running).unpack()
	wantError(t, err, postrider.Canceled, false)
	_, err = (<-queued).unpack()
	wantError(t, err, postrider.Unavailable, true)
}

func TestServerConnectionClosed(t *testing.T) {
	t.Parallel()
	nats := postridertest.NewNATS(t)
	nc := nats.Connect()
	srv := serve(t, nc, ServerConfig{}, reserve.Handler(echo))
	nc.Close()
	if err := <-srv.done; !errors.Is(err, postrider.Unavailable) {
		t.Errorf("Run returned %v, want Unavailable", err)
	}
}
