package rpc

import (
	"fmt"
	"sync"
	"time"

	"github.com/postrider/postrider"
)

// pool runs calls on a bounded number of workers and keeps a bounded queue before them. It refuses a call at arrival when
// the queue is full or when the call could not be in time: first in, first out with deadlines has the property that once
// the queue is as long as a deadline, everything is served just too late.
//
// The wait is predicted by Little's law: with all workers busy one call ends every service/workers, where service is a
// moving average of the time that a call holds a worker. That equals the time between completions, but is not spoilt by
// idle times. A call that must wait is taken if wait and service together use at most 80 % of its deadline; one that finds
// a free worker is always taken. (Service counts because handlers that share a bottleneck wait for it inside: with 64
// workers on a lane of 1 ms, deadlines of 100 ms and twice the load, a rule on the wait alone answered 20 % of the
// capacity in time, this one 96 %.)
type pool struct {
	max, queue int
	run        func(*inbound)
	calls      chan *inbound
	done       sync.WaitGroup

	mu      sync.Mutex
	workers int
	load    int // calls that are queued or running
	service time.Duration
	closed  bool
}

func newPool(workers, queue int, run func(*inbound)) *pool {
	return &pool{max: workers, queue: queue, run: run, calls: make(chan *inbound, workers+queue)}
}

// submit takes a call, or returns why not. It does not block.
func (p *pool) submit(c *inbound) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return &postrider.Error{Code: postrider.Unavailable, Unprocessed: true, Msg: "the server is shutting down"}
	}
	ahead := p.load - p.max + 1 // calls that must end before this one begins
	if ahead > 0 {
		if ahead > p.queue {
			return busy(p.wait(ahead), fmt.Sprintf("%d calls run and %d wait", p.max, p.queue))
		}
		if wait := p.wait(ahead); !c.expires.IsZero() && wait+p.service > c.expires.Sub(c.arrived)*8/10 {
			return busy(wait, fmt.Sprintf("the wait would be about %v", wait.Round(time.Millisecond)))
		}
	}
	p.load++
	if p.load > p.workers && p.workers < p.max {
		p.workers++
		p.done.Go(func() { p.work(c) })
		return nil
	}
	p.calls <- c // has room for max+queue
	return nil
}

// wait predicts how long a number of completions take.
func (p *pool) wait(completions int) time.Duration {
	return time.Duration(int64(p.service) / int64(p.max) * int64(completions))
}

func busy(wait time.Duration, why string) *postrider.Error {
	return &postrider.Error{
		Code: postrider.ResourceExhausted, Unprocessed: true, RetryAfter: wait,
		Msg: "the server is busy: " + why + "; the call did not run",
	}
}

func (p *pool) work(c *inbound) {
	p.serve(c)
	for c := range p.calls {
		p.serve(c)
	}
}

func (p *pool) serve(c *inbound) {
	start := time.Now()
	p.run(c)
	took := time.Since(start)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.load--
	if p.service == 0 {
		p.service = took
	}
	p.service += (took - p.service) / 16
}

// drain refuses new calls and waits until those taken have run.
func (p *pool) drain() {
	p.mu.Lock()
	p.closed = true
	close(p.calls)
	p.mu.Unlock()
	p.done.Wait()
}
