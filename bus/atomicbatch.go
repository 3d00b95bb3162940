package bus

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
)

// headers that the bus adds to a message of an atomic batch (nats-architecture-and-design: ADR-50).
const (
	headerBatchID     = "Nats-Batch-Id"
	headerBatchSeq    = "Nats-Batch-Sequence"
	headerBatchCommit = "Nats-Batch-Commit"
)

// atomicBatch is a row of messages that the server stages, and stores all or none when it gets the last one, which alone is
// acknowledged.
type atomicBatch struct {
	pub    *publisher
	waiter *waiter
	began  time.Time
	id     []string
	n      int
	bytes  int    // of data
	held   *entry // the last one so far: one must commit the batch
	err    error  // that kept a message from going out
}

// begin begins a batch. It must be committed.
func (l *lane) begin() *atomicBatch {
	l.pace.batches.Add(1)
	return &atomicBatch{
		pub: l.pub, waiter: l.pub.acks.add(trip{}, nil), began: time.Now(), id: []string{l.pub.acks.nextID()},
	}
}

// add puts entries into the batch.
func (b *atomicBatch) add(entries []*entry) {
	for _, e := range entries {
		if b.held != nil {
			b.send(b.held, false)
		}
		b.held = e
	}
}

func (b *atomicBatch) send(e *entry, last bool) {
	if b.err != nil {
		return
	}
	b.n++
	b.bytes += len(e.msg.Data)
	msg := e.msg
	if msg.Header == nil {
		msg.Header = nats.Header{}
	}
	msg.Reply = ""
	msg.Header[headerBatchID], msg.Header[headerBatchSeq] = b.id, []string{strconv.Itoa(b.n)}
	if last {
		msg.Reply = b.waiter.reply
		msg.Header[headerBatchCommit] = []string{"1"}
	}
	b.err = b.pub.send(msg)
	delete(msg.Header, headerBatchID) // it must be fit for a single publish
	delete(msg.Header, headerBatchSeq)
	delete(msg.Header, headerBatchCommit)
}

// commit ends a batch and gives each of its entries its result. A batch that is refused or whose outcome is unknown is sent
// again one by one: a duplicate id refuses the whole batch, and a bad message must not fail its neighbours. Without ids the
// server would store twice what it has already: an unknown outcome is then the result.
func (l *lane) commit(b *atomicBatch, group []*entry) {
	b.send(b.held, true)
	if b.err != nil {
		b.waiter.resolve(b.err)
	}
	ctx := context.Background() // the callers wait with theirs
	err := b.waiter.wait(ctx, l.pub.timeout)
	l.pace.batches.Add(1)
	if err == nil {
		l.pace.batched(time.Since(b.began), b.bytes)
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
