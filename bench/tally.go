package main

import (
	"encoding/binary"
	"errors"
	"slices"
	"sync/atomic"
	"time"
)

// A payload begins with a stamp: its number, and when it was published, in nanoseconds since the tally began.
const stampSize = 24

// tally knows what was published and what of it was handled. It makes no garbage while it is measured.
type tally struct {
	began    time.Time
	size     int
	seen     []atomic.Uint32 // how often each message was handled; nil where none is
	failed   []atomic.Bool   // by number, of those that fail once
	lastKey  [keys]atomic.Int64
	delays   []time.Duration // by number; nil where nobody asks
	next     atomic.Int64    // number of the next message
	handled  atomic.Int64    // different messages
	again    atomic.Int64
	disorder atomic.Int64
	first    atomic.Int64 // when the first was handled, since began
	tokens   chan struct{}

	want atomic.Int64 // done is closed when so many are handled
	done chan struct{}
}

func newTally(size int) *tally {
	t := &tally{began: time.Now(), size: size, done: make(chan struct{})}
	t.want.Store(-1)
	return t
}

// blank returns a value to be stamped again and again. Peers encode it before they return.
func (t *tally) blank() *value {
	data := make([]byte, t.size)
	for i := range data {
		data[i] = byte(i * 7)
	}
	return &value{Value: data}
}

// stamp numbers a value. It reports false when there are no more numbers.
func (t *tally) stamp(v *value) bool {
	n := t.next.Add(1) - 1
	if t.seen != nil && n >= int64(len(t.seen)) {
		t.next.Add(-1)
		return false
	}
	t.stampAs(v, n)
	return true
}

func (t *tally) stampAs(v *value, n int64) {
	data := v.GetValue()
	binary.LittleEndian.PutUint64(data, uint64(n))
	binary.LittleEndian.PutUint64(data[8:], uint64(time.Since(t.began)))
}

// key is the key of a value: every key has as many.
func key(v *value) uint64 { return number(v) % keys }

func number(v *value) uint64 {
	if len(v.GetValue()) < stampSize {
		return 1<<64 - 1
	}
	return binary.LittleEndian.Uint64(v.GetValue())
}

var (
	errOnce    = errors.New("fails once")
	errForeign = errors.New("a message that nobody published")
)

// handle takes note of a handled value.
func (t *tally) handle(v *value) error {
	now := time.Since(t.began)
	n := number(v)
	if n >= uint64(len(t.seen)) || len(v.GetValue()) != t.size {
		return errForeign
	}
	if t.first.Load() == 0 {
		t.first.CompareAndSwap(0, int64(now))
	}
	if t.seen[n].Add(1) > 1 {
		t.again.Add(1)
		return nil
	}
	if t.delays != nil {
		t.delays[n] = now - time.Duration(binary.LittleEndian.Uint64(v.GetValue()[8:]))
	}
	if t.tokens != nil {
		<-t.tokens
	}
	t.settle(t.handled.Add(1))
	return nil
}

// handleFailing is handle for values of which some fail once.
func (t *tally) handleFailing(v *value) error {
	if n := number(v); n%failEvery == 0 && n < uint64(len(t.failed)) && !t.failed[n].Swap(true) {
		return errOnce
	}
	return t.handle(v)
}

// handleKeyed is handle for values whose keys have an order.
func (t *tally) handleKeyed(v *value) error {
	n := int64(number(v)) + 1
	if last := t.lastKey[key(v)].Swap(n); last > n {
		t.disorder.Add(1)
	}
	return t.handle(v)
}

// expect closes done when so many are handled, which they may be already.
func (t *tally) expect(n int64) {
	t.want.Store(n)
	t.settle(t.handled.Load())
}

func (t *tally) settle(handled int64) {
	if handled == t.want.Load() && t.want.CompareAndSwap(handled, -1) {
		close(t.done)
	}
}

// quantiles returns the median and the 99th percentile of the delays. The first tenth of the messages warms up.
func (t *tally) quantiles() (p50, p99 time.Duration) {
	delays := slices.Clone(t.delays[len(t.delays)/10:])
	slices.Sort(delays)
	return delays[len(delays)/2], delays[len(delays)*99/100]
}
