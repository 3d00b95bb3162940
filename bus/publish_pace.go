package bus

import (
	"sync/atomic"
	"time"
)

// pace is what publishing to a stream takes, in moving averages of nanoseconds; 0 is unknown. What the bytes of the data take
// is left out: they take it in either way, and large messages would be taken for ones that are synced.
type pace struct {
	alone  atomic.Int64 // a single publish alone: most of it is the way to the server and back
	single atomic.Int64 // what each message in front of it adds
	batch  atomic.Int64 // an atomic batch, whatever its size: most of it is the staging

	samples atomic.Int64 // that single is made of
	lone    atomic.Int64 // messages that were alone
	singles atomic.Int64 // messages on their way singly
	batches atomic.Int64 // atomic batches begun and ended: odd while one is on its way
	stored  atomic.Int64 // messages of fast batches
}

const (
	// What an atomic batch is believed to take at first: nats-server 2.15 with sync_interval always on a small virtual machine.
	firstBatchTime = 2500 * time.Microsecond

	// Below this time a message costs nearly as much within a batch, and no batch pays. With a sync for every message it
	// is a multiple of it, without one a fraction.
	cheapSingle = 60 * time.Microsecond

	// What a byte is believed to take: with 16 KiB a message takes 33 µs where it takes 16 with 1 KiB.
	nanosPerByte = 2

	// How much of the average is a message's own: little where all are measured, lest a moment's pause should count much, and
	// more where few are.
	shareOfMany = 1024
	shareOfFew  = 16
	shareOfLess = 4

	// A message tells what those in front of it took if there are so many.
	minAhead = 8
)

// isCheap says if no batch pays.
func (p *pace) isCheap() bool { return p.single.Load() <= int64(cheapSingle) }

// pays says if n messages are better published as an atomic batch, by a margin, since in a group each waits for all.
func (p *pace) pays(n int) bool {
	single, batch := p.single.Load(), p.batch.Load()
	if single == 0 { // few shall be on their way until it is known
		return n > probeSize
	}
	return n >= minBatch && !p.isCheap() && p.alone.Load()+int64(n)*single > batch+batch/2
}

// batched notes what a batch took. More than before is believed soon, because where batches do not pay few shall tell; but one
// that was held up by something else must not be the last.
func (p *pace) batched(d time.Duration, bytes int) {
	have, took := p.batch.Load(), max(1, int64(d)-int64(bytes)*nanosPerByte)
	if took > have {
		learn(&p.batch, min(took, 4*have), 2)
	} else {
		learn(&p.batch, took, 8)
	}
}

// trip is the way of one message that is sent singly. The zero trip tells nothing.
type trip struct {
	pace    *pace
	began   time.Time
	ahead   int64 // messages in front of it
	batches int64
	bytes   int   // of data, taken for those of each message in front of it too
	share   int64 // one in so many of the average is its own
}

func (p *pace) begin(bytes int, share int64) trip {
	return trip{pace: p, began: time.Now(), ahead: p.singles.Add(1) - 1, batches: p.batches.Load(), bytes: bytes, share: share}
}

// end notes the acknowledgement.
func (t trip) end() {
	p := t.pace
	if p == nil {
		return
	}
	behind := p.singles.Add(-1)
	took := int64(time.Since(t.began))
	switch {
	case t.batches%2 == 1 || t.batches != p.batches.Load(): // a batch was in front of it
	case t.ahead == 0 && behind == 0:
		if p.lone.Add(1) == 1 {
			return // the first of all may be slow, and then nothing would be left of what those in front of others take
		}
		if learn(&p.alone, took, 64); took < p.alone.Load() { // a pause is not what it takes
			p.alone.Store(took)
		}
	case t.ahead >= minAhead: // the server acknowledges in bursts: the time between two acknowledgements tells nothing
		n := p.samples.Add(1)
		each := max(max(took-p.alone.Load(), 0)/t.ahead-int64(t.bytes)*nanosPerByte, 0)
		share := min(t.share, n)
		if t.share == shareOfFew && each < p.single.Load() { // the first of all may be slow, and a sync is never fast
			share = min(share, shareOfLess)
		}
		learn(&p.single, each, share)
		if n%shareOfMany == 0 { // slow batches must not be the last
			learn(&p.batch, int64(firstBatchTime), 16)
		}
	}
}

// lose notes that there is no acknowledgement.
func (t trip) lose() {
	if t.pace != nil {
		t.pace.singles.Add(-1)
	}
}

// learn takes a value into an average.
func learn(average *atomic.Int64, value, share int64) {
	have := average.Load()
	if have == 0 {
		share = 1
	}
	average.Store(max(1, have+(value-have)/share)) // one of two at the same time may be lost
}
