package bus

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/postrider/postrider"
)

// breaker is the circuit breaker of one subscription (Nygard, "Release It!", 2007).
//
//	closed --limit failures in a row--> open --pause over--> half-open --the probe succeeds--> closed
//	                                     ^-------------------the probe fails-----------------'
//
// Open, it pauses the consumer on the server, and so the group in all its instances; messages that are here already wait,
// kept alive and without an attempt counted. Half-open, one message is handled at a time.
type breaker struct {
	limit int
	pause time.Duration

	mu       sync.Mutex
	failures int // in a row
	until    time.Time
	open     bool // or half-open, when until is over
	probing  bool
	changed  chan struct{} // closed at the next change of state
}

func newBreaker(limit int, pause time.Duration) *breaker {
	return &breaker{limit: limit, pause: pause, changed: make(chan struct{})}
}

// enter waits until a message may be handled. It returns false when stop is closed first.
func (k *breaker) enter(stop <-chan struct{}) bool {
	for {
		k.mu.Lock()
		wait, changed := time.Until(k.until), k.changed
		switch {
		case !k.open:
			k.mu.Unlock()
			return true
		case wait <= 0 && !k.probing:
			k.probing = true
			k.mu.Unlock()
			return true
		}
		k.mu.Unlock()
		if wait <= 0 {
			wait = time.Hour // a probe is on its way, and tells of its end
		}
		timer := time.NewTimer(wait)
		select {
		case <-stop:
			timer.Stop()
			return false
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// leave notes how a message went, and returns true if that opens the circuit.
func (k *breaker) leave(failed bool) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := time.Now()
	if k.open && now.Before(k.until) { // begun before it opened
		return false
	}
	if !failed {
		k.failures = 0
		if k.open {
			k.open, k.probing = false, false
			k.change()
		}
		return false
	}
	if k.failures++; k.failures < k.limit && !k.open {
		return false
	}
	k.open, k.probing, k.until = true, false, now.Add(k.pause)
	k.change()
	return true
}

// skip notes that a message was none to go by: if it was the probe, the next one is.
func (k *breaker) skip() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.probing {
		k.probing = false
		k.change()
	}
}

// noProbe tells the breaker, if there is one, that nothing was handled.
func (s *subscription) noProbe() {
	if s.breaker != nil {
		s.breaker.skip()
	}
}

func (k *breaker) change() {
	close(k.changed)
	k.changed = make(chan struct{})
}

// broken notes an outcome with the breaker, if there is one, and pauses the group when the circuit opens.
func (s *subscription) broken(err error) {
	if errors.Is(err, errUnwanted) {
		s.noProbe()
		return
	}
	if s.breaker == nil || !s.breaker.leave(err != nil && postrider.Retryable(err)) {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), s.bus.cfg.PublishTimeout)
	defer cancel()
	s.log.Warn("circuit open: the group is paused", "pause", s.cfg.breakerPause, "failures", s.cfg.breakerLimit, "error", err)
	durable := s.durable
	if s.partition != "" {
		durable = durableName(s.cfg.group, s.handler.Topic())
	}
	if err := s.bus.pauseConsumers(ctx, s.stream, durable, time.Now().Add(s.cfg.breakerPause)); err != nil {
		s.log.Warn("circuit open, but other instances could not be paused", "error", err)
	}
}
