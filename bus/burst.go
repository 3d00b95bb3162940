package bus

import (
	"runtime"
	"slices"
	"sync"
)

// burst sends what callers publish at about the same time in one go. The client library writes to its connection as soon as it has
// something to write and a processor is free, so that with callers who each send for themselves it writes nearly every
// message by itself, which costs client and server more than all else about a message (docs/adr/0011).
type burst struct {
	pub *publisher

	mu    sync.Mutex
	queue []*waiter // whose messages wait to be sent

	out   sync.Mutex // whose holder is sending; comes before mu
	spare []*waiter
}

// burstSize is how many messages are sent without looking for more. A quarter of those on their way keeps the server at
// work while the callers prepare the others.
func burstSize(flying int) int { return max(4, flying/4) }

// send sends the message of w, of which so many are on their way with it, or leaves that to another caller. The first in
// the queue lets those run who are ready, and sends what has come by then.
func (b *burst) send(w *waiter, flying int) {
	if flying <= 1 {
		b.pub.transmit(w.msg, w)
		return
	}
	b.mu.Lock()
	b.queue = append(b.queue, w)
	n := len(b.queue)
	b.mu.Unlock()
	switch {
	case n >= burstSize(flying):
	case n == 1:
		runtime.Gosched()
	default:
		return
	}
	b.out.Lock()
	defer b.out.Unlock()
	b.mu.Lock()
	queue := b.queue
	b.queue = b.spare
	b.mu.Unlock()
	for _, w := range queue {
		msg := w.msg
		w.msg = nil // before it is sent: with its acknowledgement the waiter is another's
		b.pub.transmit(msg, w)
	}
	clear(queue)
	b.spare = queue[:0]
}

// withdraw returns when the message of w is sent or will not be: then it is the caller's again.
func (b *burst) withdraw(w *waiter) {
	b.out.Lock()
	defer b.out.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.queue = slices.DeleteFunc(b.queue, func(other *waiter) bool { return other == w })
}
