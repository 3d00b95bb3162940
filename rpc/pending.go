package rpc

import (
	"strconv"
	"sync"
	"time"

	"github.com/postrider/postrider"
)

// pending is the table of a client's calls that wait for their outcome. Its slots are reused, last in first out; a
// slot's number carries a generation, so that a reply to an earlier call of the slot finds nobody.
//
// Each slot has a reply subject, which it keeps as long as its calls end with an answer. Repeating subjects spare the
// NATS server a route lookup that misses its cache. One subject for a whole service would spare it a few more, but the
// server's "no responders" (status 503) names the reply subject and the method and nothing else: with several calls under
// way to a method whose last instance just left, it would not say which of them met nobody, and the calls that this
// instance still answers while it drains would be failed with it. So one subject belongs to one call at a time, and a
// call that ends without an answer (time-out, cancelled, connection lost) takes its subject with it: whatever still
// arrives there is not taken for the outcome of a later call.
type pending struct {
	inbox string // reply subjects are inbox.<token>

	mu      sync.Mutex
	slots   []*slot
	free    []*slot
	byReply map[string]*slot
	replies uint64 // reply subjects handed out
	active  int
	refuse  *postrider.Error // why no call may begin now: not connected, closed; nil when one may
}

type slot struct {
	number  uint64 // generation in the upper 32 bits, index in the lower
	reply   string
	subject string
	expires time.Time
	active  bool
	done    chan outcome // holds one; read once by the caller for every call that ended through finish
}

// outcome is what a call ends with: an event in the CloudEvents protobuf format, or an error.
type outcome struct {
	event []byte
	err   *postrider.Error
}

func newPending(inbox string) *pending {
	return &pending{inbox: inbox, byReply: make(map[string]*slot)}
}

// begin enters a call. The caller then waits on done and calls release, or calls abandon. first reports that no other
// call is pending.
func (p *pending) begin(subject string, expires time.Time) (s *slot, first bool, err *postrider.Error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refuse != nil {
		e := *p.refuse
		return nil, false, &e
	}
	if n := len(p.free); n > 0 {
		s, p.free = p.free[n-1], p.free[:n-1]
	} else {
		s = &slot{number: uint64(len(p.slots)), done: make(chan outcome, 1)}
		p.slots = append(p.slots, s)
		p.newReply(s)
	}
	s.subject, s.expires, s.active = subject, expires, true
	p.active++
	return s, p.active == 1, nil
}

// newReply gives a slot a reply subject that was never used.
func (p *pending) newReply(s *slot) {
	delete(p.byReply, s.reply)
	p.replies++
	s.reply = p.inbox + "." + strconv.FormatUint(p.replies, 36)
	p.byReply[s.reply] = s
}

// finish ends the call of a slot. The lock is held. done has room: it is empty whenever a call begins.
func (p *pending) finish(s *slot, o outcome, answered bool) {
	s.active = false
	p.active--
	if !answered {
		p.newReply(s)
	}
	s.done <- o
}

// answer ends the call with that number. It reports false when there is none: it has ended, or the reply is a duplicate.
func (p *pending) answer(number uint64, event []byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	index := number & 0xffffffff
	if index >= uint64(len(p.slots)) {
		return false
	}
	s := p.slots[index]
	if !s.active || s.number != number {
		return false
	}
	p.finish(s, outcome{event: event}, true)
	return true
}

// unserved ends the call whose reply subject this is: nobody serves its method.
func (p *pending) unserved(reply string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.byReply[reply]; s != nil && s.active {
		p.finish(s, outcome{err: &postrider.Error{
			Code: postrider.Unavailable, Unprocessed: true,
			Msg: "nobody serves " + s.subject + ": is the service running, with the same prefix?",
		}}, true)
	}
}

// fail ends the calls that why returns an error for.
func (p *pending) fail(why func(*slot) *postrider.Error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.active == 0 {
		return
	}
	for _, s := range p.slots {
		if s.active {
			if err := why(s); err != nil {
				p.finish(s, outcome{err: err}, false)
			}
		}
	}
}

// close ends all calls with lost and lets none begin until open.
func (p *pending) close(refuse, lost *postrider.Error) {
	p.mu.Lock()
	p.refuse = refuse
	p.mu.Unlock()
	p.fail(func(*slot) *postrider.Error { e := *lost; return &e })
}

func (p *pending) open() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse = nil
}

// abandon ends a call that nobody waits for any more. It reports false when the call has its outcome already; then the
// caller takes it from done.
func (p *pending) abandon(s *slot) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !s.active {
		return false
	}
	s.active = false
	p.active--
	p.newReply(s)
	p.put(s)
	return true
}

// release gives back the slot of a call whose outcome was taken.
func (p *pending) release(s *slot) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.put(s)
}

func (p *pending) put(s *slot) {
	s.number += 1 << 32
	p.free = append(p.free, s)
}

// idle reports whether no call is pending.
func (p *pending) idle() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.active == 0
}
