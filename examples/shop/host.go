package main

import (
	"context"
	"sync"
	"time"

	"github.com/postrider/postrider"
)

// host keeps one service alive in this process: it starts it, and starts it again when it has failed.
type host struct {
	name  string
	build func(context.Context, *service) error // subscribes and registers what the service does
	at    servers

	mu    sync.Mutex
	now   *life      // nil between two lives
	lives []*service // all of them, for what they counted
	dead  sync.WaitGroup
}

// life is a service from its start to its end.
type life struct {
	*service
	stop   context.CancelFunc
	killed chan struct{}
}

// builders are the four services.
func builders() map[string]func(context.Context, *service) error {
	return map[string]func(context.Context, *service) error{
		"orders": newOrders, "stock": newStock, "payments": newPayments, "shipping": newShipping,
	}
}

// Run serves until ctx ends. A service that cannot even start the first time is an error.
func (h *host) Run(ctx context.Context) error {
	defer h.dead.Wait()
	for ctx.Err() == nil {
		s, err := h.start(ctx)
		if err != nil {
			if len(h.lives) == 0 {
				return err
			}
			h.at.log.Warn("cannot start again yet", "service", h.name, "error", err)
			pause(ctx, 200*time.Millisecond)
			continue
		}
		h.live(ctx, s)
	}
	return nil
}

func (h *host) start(ctx context.Context) (*service, error) {
	s, err := open(ctx, h.name, h.at)
	if err != nil {
		return nil, err
	}
	if err := h.build(ctx, s); err != nil {
		s.close()
		return nil, err
	}
	s.traffic = h.traffic
	return s, nil
}

// live runs a service until it ends, by itself, with ctx, or because it was killed. A killed one is not waited for: it
// dies while its successor lives already, as a process does whose host has lost its network.
func (h *host) live(ctx context.Context, s *service) {
	ctx, stop := context.WithCancel(ctx)
	l := &life{s, stop, make(chan struct{})}
	h.mu.Lock()
	h.now, h.lives = l, append(h.lives, s)
	h.mu.Unlock()
	ended := make(chan struct{})
	h.dead.Go(func() {
		defer close(ended)
		defer stop()
		if err := s.run(ctx); err != nil {
			h.at.log.Warn("service ended", "service", h.name, "error", err)
		}
		s.close()
	})
	select {
	case <-ended:
	case <-l.killed:
	}
	h.mu.Lock()
	h.now = nil
	h.mu.Unlock()
}

// kill ends the service without letting it finish anything: its connection to NATS is gone with all that was not sent.
// False: there is none to be killed.
func (h *host) kill() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.now == nil {
		return false
	}
	h.now.nc.Close()
	h.now.stop()
	close(h.now.killed)
	h.now = nil
	return true
}

// traffic counts the messages of all lives, those included that have not quite ended.
func (h *host) traffic() Traffic {
	h.mu.Lock()
	defer h.mu.Unlock()
	var t Traffic
	for _, s := range h.lives {
		b, once := s.bus.Stats(), s.once.Stats()
		t.add(Traffic{b.Published, b.Handled, b.Retried, b.DeadLettered, once.Duplicates})
	}
	return t
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// restartable is a part of a service that -chaos ends and starts again while the others go on.
type restartable struct {
	part postrider.Runner

	mu   sync.Mutex
	stop context.CancelFunc
}

// Run runs the part until ctx ends.
func (r *restartable) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := r.once(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (r *restartable) once(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	r.mu.Lock()
	r.stop = stop
	r.mu.Unlock()
	return r.part.Run(ctx)
}

// restart ends the part; Run starts it again.
func (r *restartable) restart() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stop != nil {
		r.stop()
	}
}
