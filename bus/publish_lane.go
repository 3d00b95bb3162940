package bus

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// A lane publishes to one stream. There are three ways, and which one is the fastest depends on whether the server syncs
// every message to disk (docs/adr/0004):
//
//   - singly: each message has an acknowledgement of its own. The caller sends it and waits, many callers at once.
//   - as a fast batch: the messages of one call go out one after the other, and the server acknowledges now and then.
//   - as an atomic batch: everything that waits for the stream, of all callers, is a group, which is synced once but staged
//     in a file of its own first.
//
// A client cannot see the sync setting, nor the disk, so the lane measures what one single publish and one atomic batch
// take. Where single ones are cheap, callers send for themselves. Else a group is formed as soon as so much is on its way that
// a batch takes less time: what comes while a group is on its way is the next group.
type lane struct {
	pub        *publisher
	name       string       // of the stream
	atomic     bool         // the stream takes atomic batches, and they may pay
	fast       bool         // the stream takes fast batches
	partitions atomic.Int32 // of the stream

	pace     pace
	grouping atomic.Bool // a group is on its way; changed under mu

	mu    sync.Mutex
	queue []*entry

	// For who is at work on the queue: when single messages were measured, and how long not again.
	probed time.Time
	pause  time.Duration
}

func newLane(p *publisher, cfg jetstream.StreamConfig) *lane {
	// With replicas the Raft log groups the syncs by itself, and a fast batch would take a message for stored which another
	// attempt has proposed and the replicas do not have yet.
	l := &lane{
		pub: p, name: cfg.Name,
		atomic: cfg.AllowAtomicPublish && cfg.Replicas <= 1,
		fast:   cfg.AllowBatchPublish && cfg.Replicas <= 1 && !cfg.AllowMsgSchedules,
	}
	l.pace.batch.Store(int64(firstBatchTime))
	return l
}

// publish sends entries and returns the result of each. They are stored in their order as far as messages without a key
// succeed, and strictly within a key: what comes after a message whose failure may pass is not sent, and fails likewise.
func (l *lane) publish(ctx context.Context, entries []*entry) []error {
	errs := make([]error, 0, len(entries))
	for len(entries) > 0 {
		n, passing := l.publishSome(ctx, entries)
		for _, e := range entries[:n] {
			errs = append(errs, e.err)
		}
		if entries = entries[n:]; passing != nil {
			for range entries {
				errs = append(errs, passing)
			}
			break
		}
	}
	return errs
}

// publishSome gives a result to so many of the entries, in the way that is best now. The error is one that passes, if there
// was one.
func (l *lane) publishSome(ctx context.Context, entries []*entry) (n int, passing error) {
	n = groupSize(entries)
	if l.pace.single.Load() == 0 { // a few tell what the others take
		n = min(n, probeSize)
		entries = entries[:n]
	}
	switch {
	case l.grouping.Load() || l.atomic && l.pace.pays(n):
		return n, l.join(ctx, entries[:n])
	case l.fast && n >= minBatch:
		if n, passing = l.fastBatch(ctx, entries); passing != nil || n == len(entries) {
			return n, passing
		}
		rest := entries[n:] // not fast again: it may be the first of many that are refused
		rest = rest[:groupSize(rest)]
		return n + len(rest), l.singly(ctx, rest)
	default:
		return n, l.singly(ctx, entries[:n])
	}
}

// one sends one entry and returns its result.
func (l *lane) one(ctx context.Context, e *entry) error {
	if l.grouping.Load() || l.atomic && l.pace.pays(int(l.pace.singles.Load())+1) {
		e.alone[0] = e
		_ = l.join(ctx, e.alone[:])
		return e.err
	}
	t := l.pace.begin(len(e.msg.Data), shareOfMany)
	w := l.pub.acks.add(t, nil)
	w.msg = e.msg
	l.pub.burst.send(w, int(t.ahead)+1)
	err := w.wait(ctx, l.pub.timeout)
	if err != nil {
		l.pub.burst.withdraw(w)
	}
	l.check(e, err)
	return err
}

// singly publishes each message with an acknowledgement of its own, all at once but for messages of one key: the second
// of them waits until the first is stored, and is not sent if it was not, lest it should overtake it. It returns an error
// that passes, if there was one.
func (l *lane) singly(ctx context.Context, entries []*entry) (passing error) {
	type sent struct {
		*entry
		w *waiter
	}
	wave := make([]sent, 0, len(entries))
	keys := map[string]bool{}    // of the wave
	failed := map[string]error{} // by key
	settle := func() {
		for _, s := range wave {
			err := s.w.wait(ctx, l.pub.timeout)
			if err != nil && postrider.Retryable(err) {
				passing = err
				if s.key != "" {
					failed[s.key] = err
				}
			}
			l.finish(s.entry, err)
		}
		wave = wave[:0]
		clear(keys)
	}
	for _, e := range entries {
		if e.key != "" && keys[e.key] {
			settle()
		}
		if err := failed[e.key]; err != nil {
			l.finish(e, err)
			continue
		}
		w := l.pub.acks.add(l.pace.begin(len(e.msg.Data), shareOfFew), nil)
		l.pub.transmit(e.msg, w)
		wave = append(wave, sent{e, w})
		keys[e.key] = true
	}
	settle()
	return passing
}

// finish gives an entry its result.
func (l *lane) finish(e *entry, err error) {
	l.check(e, err)
	e.finish(err)
}

// check looks at a result: a stream that does not answer may have gone, and is looked up again next time.
func (l *lane) check(e *entry, err error) {
	if err != nil && errors.Is(err, nats.ErrNoResponders) {
		l.pub.forget(e.wanted())
	}
}
