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

	mu   sync.Mutex
	now  *life // nil between two lives
	past Traffic
	dead sync.WaitGroup
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
	for lives := 0; ctx.Err() == nil; lives++ {
		s, err := h.start(ctx)
		if err != nil {
			if lives == 0 {
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
	s.past = h.traffic
	return s, nil
}

// live runs a service until it ends, by itself, with ctx, or because it was killed. A killed one is not waited for: it
// dies while its successor lives already, as a process does whose host has lost its network.
func (h *host) live(ctx context.Context, s *service) {
	ctx, stop := context.WithCancel(ctx)
	l := &life{s, stop, make(chan struct{})}
	h.set(l)
	ended := make(chan struct{})
	h.dead.Go(func() {
		defer close(ended)
		defer stop()
		if err := s.run(ctx); err != nil {
			h.at.log.Warn("service ended", "service", h.name, "error", err)
		}
		s.close()
		h.mu.Lock()
		defer h.mu.Unlock()
		h.past.add(s.own())
	})
	select {
	case <-ended:
	case <-l.killed:
	}
	h.set(nil)
}

func (h *host) set(l *life) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now = l
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

// traffic is that of all lives that have ended.
func (h *host) traffic() Traffic {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.past
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
