package bus

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
)

// lanes gives the messages of an ordered subscription to the workers key by key: one message of a key is with a worker,
// those behind it wait in their lane. A key costs memory only while it has messages here.
//
//	arrive --key idle--> queue --worker--> settled --next of the lane--> queue
//	       --key busy--> lane
//	worker --failed, tried again in place--> (key stays busy) --after the delay--> queue
//
// The subscription's lock guards it.
type lanes struct {
	queue    chan<- *nats.Msg // has room for all that may be held
	waiting  map[string][]*nats.Msg
	keys     map[*nats.Msg]string
	attempts map[*nats.Msg]int // failed in place, beside those that the server counts
	timers   map[*nats.Msg]*time.Timer
}

func newLanes(queue chan<- *nats.Msg) *lanes {
	return &lanes{
		queue: queue, waiting: map[string][]*nats.Msg{}, keys: map[*nats.Msg]string{},
		attempts: map[*nats.Msg]int{}, timers: map[*nats.Msg]*time.Timer{},
	}
}

// add takes a message that arrived. A message without a key waits for nobody.
func (l *lanes) add(msg *nats.Msg, key string) {
	if key == "" {
		l.queue <- msg
		return
	}
	l.keys[msg] = key
	behind, busy := l.waiting[key]
	if busy {
		l.waiting[key] = append(behind, msg)
		return
	}
	l.waiting[key] = nil
	l.queue <- msg
}

// next opens the lane of a message that is settled.
func (l *lanes) next(msg *nats.Msg) {
	key, ok := l.keys[msg]
	if !ok {
		return
	}
	delete(l.keys, msg)
	delete(l.attempts, msg)
	behind := l.waiting[key]
	if len(behind) == 0 {
		delete(l.waiting, key)
		return
	}
	l.waiting[key] = behind[1:]
	l.queue <- behind[0]
}

// clear forgets everything.
func (l *lanes) clear() {
	for _, t := range l.timers {
		t.Stop()
	}
	clear(l.waiting)
	clear(l.keys)
	clear(l.attempts)
	clear(l.timers)
}

// retryInPlace has a message handled again after a delay, while its key waits and other keys go on. The heartbeat keeps
// it ours.
func (s *subscription) retryInPlace(msg *nats.Msg, delay time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining || !s.holds(msg) {
		return // the drain gives it back, or the next owner has it
	}
	s.lanes.attempts[msg]++
	s.lanes.timers[msg] = time.AfterFunc(delay, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if _, waits := s.lanes.timers[msg]; !waits || s.draining || !s.holds(msg) {
			return
		}
		delete(s.lanes.timers, msg)
		s.queue <- msg
	})
}

// triedHere is how often a message failed in its lane, beside the attempts that the server counts.
func (s *subscription) triedHere(msg *nats.Msg) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lanes.attempts[msg]
}

func (s *subscription) holds(msg *nats.Msg) bool {
	_, ok := s.held[msg]
	return ok
}

// Ownership of an ordered subscription. The consumer is pinned to one client (a priority group of nats-server 2.11),
// whose pulls carry the pin; those of the others wait. An owner that sends no pull for ownerTTL has lost the pin, and so
// believes it itself. Pinning alone keeps no order: what the old owner held would come after newer messages. So a new
// owner resets the consumer (nats-server 2.14) to the last message up to which all are acknowledged, and drops what
// arrives until the deliveries start again at one. What was acknowledged beyond that point comes again.
const (
	ownerGroup = "owner"
	ownerTTL   = 3 * time.Second
)

// owned looks at the pin of a message that arrived and says if it is to be handled. The lock is held.
func (s *subscription) owned(msg *nats.Msg) bool {
	if pin := msg.Header.Get("Nats-Pin-Id"); pin != s.pin { // the consumer is ours, as of now
		s.disown()
		s.pin, s.takeOver, s.lastPull = pin, true, time.Now() // if that is late, claim finds out
		s.signal()
		return false
	}
	if !s.takeOver {
		return true
	}
	// What was on its way before the reset has a number above that of the message which told of the pin.
	meta, err := msg.Metadata()
	s.takeOver = err != nil || meta.Sequence.Consumer != 1
	return !s.takeOver
}

// disown forgets all messages of an ownership that has ended. Handlers that run cannot be called back. The lock is held.
func (s *subscription) disown() {
	s.pin, s.fence, s.takeOver, s.wasReset = "", 0, false, false
	s.lanes.clear()
	clear(s.held)
	for {
		select {
		case _, open := <-s.queue:
			if !open { // at the end of the drain
				return
			}
		default:
			return
		}
	}
}

// assumeOwnership does what a new owner has to do first.
func (s *subscription) assumeOwnership(ctx context.Context) error {
	s.mu.Lock()
	pin, begin := s.pin, s.takeOver && !s.wasReset
	s.wasReset = s.takeOver
	s.mu.Unlock()
	if !begin {
		return nil
	}
	err := s.claim(ctx, pin)
	if err != nil {
		s.mu.Lock()
		s.wasReset = false
		s.mu.Unlock()
	}
	return err
}

// keepOwnership sends pulls often enough, until the last handler has ended: the drain asks for no messages.
func (s *subscription) keepOwnership(stop <-chan struct{}) {
	ticker := time.NewTicker(ownerTTL / 6)
	defer ticker.Stop()
	for {
		select {
		case <-stop:
			return
		case <-ticker.C:
		}
		s.mu.Lock()
		if s.pin != "" && time.Since(s.lastPull) > ownerTTL/4 && !s.expired() && s.bus.nc.IsConnected() {
			// Any pull with the pin keeps it. This one brings nothing: nobody listens to its answer.
			request := fmt.Appendf(nil, `{"batch":1,"no_wait":true,"group":%q,"id":%q}`, ownerGroup, s.pin)
			sent := time.Now()
			if err := s.bus.nc.PublishRequest(s.pullSubject(), s.bus.nc.NewInbox(), request); err == nil {
				s.lastPull = sent
			}
		}
		s.mu.Unlock()
	}
}

// expired gives up an ownership that has run out: an owner that was stopped for a while, or cut off, must not renew what
// somebody else may have by now. The lock is held.
func (s *subscription) expired() bool {
	if s.pin == "" || time.Since(s.lastPull) <= ownerTTL {
		return false
	}
	s.log.Warn("ownership of the ordered subscription ran out", "durable", s.durable)
	s.disown()
	s.lost = true
	return true
}

// mayBegin says if a worker may begin with a message, and the fencing token of the ownership under which it does.
func (s *subscription) mayBegin(msg *nats.Msg) (fence uint64, may bool) {
	if s.lanes == nil {
		return 0, true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.expired() || s.draining {
		return 0, false
	}
	return s.fence, s.holds(msg)
}

// giveBackAll hands what is left after the drain to the next owner, in the order of the stream.
func (s *subscription) giveBackAll() {
	s.mu.Lock()
	left := slices.Collect(maps.Keys(s.held))
	s.mu.Unlock()
	sequence := func(m *nats.Msg) uint64 {
		if meta, err := m.Metadata(); err == nil {
			return meta.Sequence.Stream
		}
		return 0
	}
	slices.SortFunc(left, func(a, b *nats.Msg) int { return cmp.Compare(sequence(a), sequence(b)) })
	for _, msg := range left {
		s.giveBack(msg)
	}
}

// unpin lets another instance take over at once.
func (s *subscription) unpin(ctx context.Context) {
	s.mu.Lock()
	pinned := s.pin != ""
	s.mu.Unlock()
	if !pinned {
		return
	}
	stream, err := s.bus.js.Stream(ctx, s.stream)
	if err == nil {
		err = stream.UnpinConsumer(ctx, s.durable, ownerGroup)
	}
	if err != nil {
		s.log.Debug("not unpinned: another instance takes over when the pin runs out", "error", err)
	}
}
