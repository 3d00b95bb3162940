package bus

import (
	"context"
	"runtime"
	"sync"
	"time"

	"github.com/postrider/postrider"
)

const (
	maxGroup      = 1000 // the server takes no more in a batch
	maxGroupBytes = 8 << 20
	minBatch      = 4

	// Once in a while the first messages of a group go out singly, to measure: the less is known, the sooner.
	probeFirst = 10 * time.Millisecond
	probeEvery = 250 * time.Millisecond
	probeSize  = 16
)

// call counts down the entries that one caller has in the queue; done gets a value when all have their result.
type call struct {
	mu   sync.Mutex
	left int
	done chan struct{}
}

// finish gives an entry its result.
func (e *entry) finish(err error) {
	c := e.call
	if c == nil { // the caller is at work itself
		e.err = err
		return
	}
	c.mu.Lock()
	last := c.left == 1
	if c.left > 0 { // else the caller has given up
		c.left--
		e.err = err
	}
	c.mu.Unlock()
	if last {
		c.done <- struct{}{} // the entries are the caller's again
	}
}

// join queues entries, has the queue worked on if it is not, and waits until they have their results. The error is one that
// passes, if there was one. When ctx ends first the entries must not be used again.
func (l *lane) join(ctx context.Context, entries []*entry) (passing error) {
	c := &entries[0].own
	if c.done == nil {
		c.done = make(chan struct{}, 1)
	}
	c.left = len(entries)
	for _, e := range entries {
		e.call = c
	}
	l.mu.Lock()
	l.queue = append(l.queue, entries...)
	lead := !l.grouping.Swap(true)
	l.mu.Unlock()
	if lead {
		go l.work() // not the caller's own work: the group may need longer than the caller has
	}
	select {
	case <-c.done:
		for _, e := range entries {
			e.call = nil
		}
	case <-ctx.Done():
		c.giveUp(ctx, entries)
	}
	for _, e := range entries {
		if e.err != nil && postrider.Retryable(e.err) {
			passing = e.err
		}
	}
	return passing
}

// giveUp gives the entries of a call the result of a caller who does not wait any longer.
func (c *call) giveUp(ctx context.Context, entries []*entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range entries {
		e.abandoned = true
		if c.left > 0 {
			e.err = gaveUp(ctx)
		}
	}
	c.left = 0
}

// work sends what is queued, group by group, until nothing is.
func (l *lane) work() {
	for size := 0; ; {
		group, batch := l.gather(l.pace.pays(size) && !l.mustProbe())
		switch size = len(group); {
		case batch != nil:
			l.commit(batch, group)
		case size > 0:
			l.sendGroup(group)
		default:
			return
		}
		if l.pace.isCheap() {
			l.pause = 0
			l.disband()
			return
		}
	}
}

func (l *lane) mustProbe() bool { return time.Since(l.probed) >= l.pause }

// disband sends what is queued singly; from now on callers send for themselves.
func (l *lane) disband() {
	l.mu.Lock()
	rest := l.queue
	l.queue = nil
	l.grouping.Store(false)
	l.mu.Unlock()
	for len(rest) > 0 {
		n := groupSize(rest)
		if err := l.singly(context.Background(), rest[:n]); err != nil {
			n = len(rest)
			for _, e := range rest[groupSize(rest):] { // must not overtake
				l.finish(e, err)
			}
		}
		rest = rest[n:]
	}
}

// gather forms a group: it lets callers that are ready join, those of the group before it above all. If the group is thought to
// be large, as the one before it was, it goes out as a batch while it is forming, so that the server stages the first messages
// while the last ones are on their way. No group means that there is nothing to do any more.
func (l *lane) gather(large bool) (group []*entry, batch *atomicBatch) {
	for bytes := 0; len(group) < maxGroup && bytes < maxGroupBytes; {
		runtime.Gosched()
		l.mu.Lock()
		n := min(groupSize(l.queue), maxGroup-len(group))
		more := l.queue[:n:n]
		l.queue = l.queue[n:]
		if n == 0 {
			l.queue = nil
			if len(group) == 0 {
				l.grouping.Store(false)
			}
			l.mu.Unlock()
			return group, batch
		}
		l.mu.Unlock()
		group = append(group, more...)
		for _, e := range more {
			bytes += len(e.msg.Data)
		}
		if large && batch == nil {
			batch = l.begin()
		}
		if batch != nil {
			batch.add(more)
		}
	}
	return group, batch
}

// groupSize is how many of the entries make up a group.
func groupSize(entries []*entry) int {
	n, bytes := 0, 0
	for n < len(entries) && n < maxGroup && (n == 0 || bytes < maxGroupBytes) {
		bytes += len(entries[n].msg.Data)
		n++
	}
	return n
}

// sendGroup publishes a group and gives each entry its result.
func (l *lane) sendGroup(group []*entry) {
	ctx := context.Background() // the callers wait with theirs
	if l.mustProbe() {          // what a single publish takes must be known while batches are used
		l.probed, l.pause = time.Now(), min(max(2*l.pause, probeFirst), probeEvery)
		head := group[:min(len(group), probeSize)]
		group = group[len(head):]
		if err := l.singly(ctx, head); err != nil {
			for _, e := range group { // must not overtake
				l.finish(e, err)
			}
			return
		}
	}
	if l.pace.pays(len(group)) {
		batch := l.begin()
		batch.add(group)
		l.commit(batch, group)
		return
	}
	_ = l.singly(ctx, group)
	learn(&l.pace.batch, int64(firstBatchTime), 64) // slow batches must not be the last
}
