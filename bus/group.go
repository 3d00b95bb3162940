package bus

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
)

const (
	maxGroup      = 1000 // the server takes no more in a batch
	maxGroupBytes = 8 << 20
	minBatch      = 4

	// Once in a while the first messages of a group go out singly, to measure.
	probeEvery = 250 * time.Millisecond
	probeSize  = 16
)

// headers that the bus adds to a message of an atomic batch (nats-architecture-and-design: ADR-50).
const (
	headerBatchID     = "Nats-Batch-Id"
	headerBatchSeq    = "Nats-Batch-Sequence"
	headerBatchCommit = "Nats-Batch-Commit"
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

// work sends what is queued, group by group.
func (l *lane) work() {
	for l.gather() {
		l.sendGroup(l.take())
	}
}

// gather lets callers that are ready join the group, those of the group before it above all, and reports if there is
// something to send. If there is not, the work has ended.
func (l *lane) gather() bool {
	for n := -1; ; {
		runtime.Gosched()
		l.mu.Lock()
		now := len(l.queue)
		if now == n || now >= maxGroup {
			if now == 0 {
				l.grouping.Store(false)
			}
			l.mu.Unlock()
			return now > 0
		}
		l.mu.Unlock()
		n = now
	}
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

// take removes a group from the queue.
func (l *lane) take() []*entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := groupSize(l.queue)
	group := l.queue[:n:n]
	l.queue = l.queue[n:]
	if len(l.queue) == 0 {
		l.queue = nil
	}
	return group
}

// sendGroup publishes a group and gives each entry its result. A batch that is refused or whose outcome is unknown is sent
// again one by one: a duplicate id refuses the whole batch, and a bad message must not fail its neighbours. Without ids the
// server would store twice what it has already: an unknown outcome is then the result.
func (l *lane) sendGroup(group []*entry) {
	ctx := context.Background()            // the callers wait with theirs
	if time.Since(l.probed) > probeEvery { // what a single publish takes must be known while batches are used
		l.probed = time.Now()
		head := group[:min(len(group), probeSize)]
		group = group[len(head):]
		if err := l.singly(ctx, head); err != nil {
			for _, e := range group { // must not overtake
				l.finish(e, err)
			}
			return
		}
	}
	if !l.pace.pays(len(group)) {
		_ = l.singly(ctx, group)
		learn(&l.pace.batch, int64(firstBatchTime), 64) // one slow batch must not be the last
		return
	}
	began := time.Now()
	l.pace.batches.Add(1)
	err := l.pub.batch(group)
	l.pace.batches.Add(1)
	if err == nil {
		learn(&l.pace.batch, int64(time.Since(began)), 8)
	}
	unknown := errors.Is(err, postrider.DeadlineExceeded) && slices.ContainsFunc(group, (*entry).isNameless)
	if err == nil || unknown || errors.Is(err, postrider.Unavailable) {
		for _, e := range group {
			l.finish(e, err)
		}
		return
	}
	for i, e := range group {
		w := l.pub.acks.add(trip{}, nil)
		l.pub.transmit(e.msg, w)
		if err = w.wait(ctx, l.pub.timeout); err != nil && postrider.Retryable(err) {
			for _, e := range group[i:] { // what comes later must not overtake
				l.finish(e, err)
			}
			return
		}
		l.finish(e, err)
	}
}

// batch publishes a group as one atomic batch; only the last message asks for an answer.
func (p *publisher) batch(group []*entry) error {
	w := p.acks.add(trip{}, nil)
	batchID, batchSeq, commit := []string{p.acks.nextID()}, []string{""}, []string{"1"}
	for i, e := range group {
		last := i == len(group)-1
		batchSeq[0] = strconv.Itoa(i + 1)
		if e.msg.Header == nil {
			e.msg.Header = nats.Header{}
		}
		e.msg.Header[headerBatchID], e.msg.Header[headerBatchSeq] = batchID, batchSeq
		e.msg.Reply = ""
		if last {
			e.msg.Header[headerBatchCommit] = commit
			e.msg.Reply = w.reply
		}
		err := p.send(e.msg)
		delete(e.msg.Header, headerBatchID)
		delete(e.msg.Header, headerBatchSeq)
		delete(e.msg.Header, headerBatchCommit)
		if err != nil {
			w.resolve(err)
			break
		}
	}
	return w.wait(context.Background(), p.timeout)
}
