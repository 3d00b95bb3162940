package bus

import (
	"sync"
	"time"
)

// pacer spaces beginnings evenly: a leaky bucket that holds nothing.
type pacer struct {
	interval time.Duration

	mu   sync.Mutex
	next time.Time
}

// wait waits for the next free place. It returns false when stop is closed first.
func (p *pacer) wait(stop <-chan struct{}) bool {
	p.mu.Lock()
	now := time.Now()
	at := p.next
	if at.Before(now) {
		at = now
	}
	p.next = at.Add(p.interval)
	p.mu.Unlock()
	timer := time.NewTimer(at.Sub(now))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-stop:
		return false
	}
}
