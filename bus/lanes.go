package bus

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"
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
	queue chan<- *delivered // has room for all that may be held
	byKey map[string]*keyLane
}

// keyLane is a key of which a message is with a worker, or waits to be tried again.
type keyLane struct {
	key     string
	first   *delivered   // that one
	waiting []*delivered // behind it
}

func newLanes(queue chan<- *delivered) *lanes {
	return &lanes{queue: queue, byKey: map[string]*keyLane{}}
}

// add takes a message that arrived. A message without a key waits for nobody.
func (l *lanes) add(d *delivered, key string) {
	if key != "" {
		if d.lane = l.byKey[key]; d.lane != nil {
			d.lane.waiting = append(d.lane.waiting, d)
			return
		}
		d.lane = &keyLane{key: key, first: d}
		l.byKey[key] = d.lane
	}
	l.queue <- d
}

// next opens the lane of a message that is settled.
func (l *lanes) next(d *delivered) {
	lane := d.lane
	switch {
	case lane == nil || l.byKey[lane.key] != lane: // the second: all was forgotten meanwhile
	case len(lane.waiting) == 0:
		delete(l.byKey, lane.key)
	default:
		lane.first = lane.waiting[0]
		lane.waiting[0] = nil
		lane.waiting = lane.waiting[1:]
		l.queue <- lane.first
	}
}

// retryInPlace has a message handled again after a delay, while its key waits and other keys go on. The heartbeat keeps
// it ours.
func (s *subscription) retryInPlace(d *delivered, delay time.Duration) {
	d.again()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.later(d, delay)
}

// later gives a message that is with nobody to a worker, after a delay or at once. The lock is held.
func (s *subscription) later(d *delivered, delay time.Duration) {
	d.begun = false
	switch {
	case s.draining: // which gives it back
		return
	case !d.isHeld(): // the next owner has it, which may be us again
		s.lanes.next(d)
		return
	}
	if delay == 0 {
		d.timer = nil
		s.queue <- d
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(delay, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if d.timer == timer {
			s.later(d, 0)
		}
	})
	d.timer = timer
}

// Ownership of an ordered subscription. The consumer is pinned to one client (a priority group of nats-server 2.11),
// whose pulls carry the pin; those of the others wait. An owner that sends no pull for ownerTTL has lost the pin, and so
// believes it itself. Pinning alone keeps no order: what the old owner held would come after newer messages. So a new
// owner resets the consumer (nats-server 2.14) to the last message up to which all are acknowledged, and drops what
// arrives until the deliveries start again at one. What was acknowledged beyond that point comes again.
//
// Who does not own the consumer asks for one message only, the one that tells of the pin, so that nothing is delivered
// while the reset is on its way: a consumer with replicas (nats-server 2.15.2) puts that behind the reset in its Raft log,
// takes all before it for delivered, and forgets what was not acknowledged of it when another server leads.
//
// The reset does not end the pulls that the server has, and one that came on a connection which only its client knows to be
// broken gets the deliveries that begin anew. An owner that sees only later ones gives the pin back: those pulls carry it, and
// the server drops them.
const (
	ownerGroup = "owner"
	ownerTTL   = 3 * time.Second
)

// owned looks at the pin of a message that arrived and says if it is to be handled. The lock is held.
func (s *subscription) owned(d *delivered) bool {
	if pin := d.Header.Get("Nats-Pin-Id"); pin != s.pin { // the consumer is ours, as of now
		s.disown()
		s.pin, s.takeOver, s.lastPull = pin, true, time.Now() // if that is late, claim finds out
		s.signal()
		return false
	}
	if !s.takeOver {
		return true
	}
	// What was on its way before the reset has a number above that of the message which told of the pin.
	at, err := placeOf(d.Reply)
	switch {
	case !s.wasReset:
	case err == nil && at.consumer == 1:
		s.takeOver = false
	case d.Sub == s.sub: // on which nothing was asked for before the reset
		s.astray = true
		s.signal()
	}
	return !s.takeOver
}

// disown forgets the messages of an ownership that has ended. The lock is held.
func (s *subscription) disown() {
	s.pin, s.fence, s.term, s.takeOver, s.wasReset, s.astray = "", 0, 0, false, false, false
	s.parked = nil
	s.letGo()
	for _, d := range slices.Clone(s.held) { // those that run: what comes of them is the next owner's business
		s.release(d)
	}
}

// letGo forgets all messages that no worker has begun: they come again, here or to another owner. Handlers that run cannot
// be called back, so their keys stay busy. The lock is held.
func (s *subscription) letGo() {
	for _, d := range slices.Clone(s.held) {
		if d.begun {
			continue
		}
		s.release(d)
		if d.timer != nil {
			d.timer.Stop()
		}
	}
	for key, lane := range s.lanes.byKey {
		if lane.waiting = nil; !lane.first.begun {
			delete(s.lanes.byKey, key)
		}
	}
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
	pin, begin, astray := s.pin, s.takeOver && !s.wasReset, s.astray
	s.mu.Unlock()
	switch {
	case astray:
		s.log.Info("the deliveries began anew on a lost connection: giving up the ordered subscription", "durable", s.durable)
		s.unpin(ctx)
		s.forgetPulls()
		s.mu.Lock()
		s.disown()
		s.mu.Unlock()
		return nil
	case begin:
		return s.claim(ctx, pin)
	}
	return nil
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
func (s *subscription) mayBegin(d *delivered) (fence uint64, may bool) {
	if s.lanes == nil {
		return 0, true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.expired() || s.draining || !d.isHeld() {
		return 0, false
	}
	d.begun, d.behind = true, s.parkedOf(d)
	return s.fence, true
}

// giveBackAll hands what is left after the drain to the next owner, in the order of the stream.
func (s *subscription) giveBackAll() {
	s.mu.Lock()
	left := slices.Clone(s.held)
	s.mu.Unlock()
	sequence := func(d *delivered) uint64 {
		at, _ := placeOf(d.Reply)
		return at.sequence
	}
	slices.SortFunc(left, func(a, b *delivered) int { return cmp.Compare(sequence(a), sequence(b)) })
	for _, d := range left {
		s.giveBack(d.Msg)
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
