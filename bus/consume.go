package bus

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/backoff"
)

// subscription is one handler's share in the messages of a durable pull consumer.
//
//	server --pull--> inbox --receive--> queue --worker--> handler --settle--> ack, delayed nak, or dead letter
//
// receive registers every message that arrives, so that the heartbeat keeps it alive from then on, waiting or running,
// and so that the drain settles each one. Pulls ask for no more than fills the queue.
type subscription struct {
	bus     *Bus
	cfg     subscribeConfig
	handler postrider.Handler
	subject string // what its consumer takes
	durable string
	stream  string
	own     bool          // reads from the bus's own stream: see redelivery
	main    *subscription // of one that does: whose redelivery it is
	log     *slog.Logger
	breaker *breaker      // nil: none
	pacer   *pacer        // nil: none
	slots   chan struct{} // bounds the handlers at work, together with the redelivery's

	gathering sync.Mutex // held by the worker that fills a batch

	mu       sync.Mutex
	sub      *nats.Subscription
	asked    int          // requested from the server and not yet received
	holdings holdings     // their bytes
	held     []*delivered // received and not settled, in no order
	lastSign time.Time    // when the server was last heard of
	lastPull time.Time    // when the server was last asked

	handlerTime  time.Duration // that a message takes, on average
	lastSequence uint64        // of a broadcast: the last that arrived
	draining     bool
	stop         chan struct{} // closed when draining begins
	lost         bool          // the consumer is gone: bind again

	// In a stream with partitions, see members.go.
	shares    int    // how many parts an ordered subscription has, also in each part
	partition string // the one that this part reads

	// Of an ordered subscription only, see lanes.go.
	lanes    *lanes
	pin      string // tells the server that we own the consumer
	fence    uint64 // the token of this ownership, the latest if it has drawn several
	term     uint64 // the token that it began with
	takeOver bool   // deliveries are dropped until they begin anew
	wasReset bool   // the consumer was told to begin anew
	astray   bool   // and did, but somewhere else
	queue    chan *delivered
	wake     chan struct{} // tells the pull loop that there may be room

	// Of an ordered subscription only, see park.go.
	parking      sync.Mutex // held while something is stored there
	parkedStream jetstream.Stream
	parked       parked // nil until the owner has read it
	answers      string // of the redelivery: begins the subjects on which the owner answers it
}

const (
	pullExpiry    = 30 * time.Second
	pullHeartbeat = 2 * time.Second
)

// How many messages a process takes in advance: large pulls spare the server work, but what one process holds no other
// instance can handle, and it comes back only after AckWait if the process dies. So it takes what keeps the workers busy
// for this long, by the time that handlers have taken lately, and at most maxPrefetch.
const (
	prefetchTime = 50 * time.Millisecond
	maxPrefetch  = 2000
)

// capacity is how many messages the process holds at most, at the least those being handled and as many to follow. Ordered
// keys wait for each other, so more are held, for other keys to go on. The lock is held.
func (s *subscription) capacity() int {
	least := 2 * s.cfg.atOnce()
	if s.cfg.ordered {
		least = 64 + 8*s.cfg.atOnce()
	}
	if s.cfg.prefetch > 0 {
		return s.cfg.prefetch
	}
	if s.handlerTime == 0 { // not known yet
		return least
	}
	return max(least, min(maxPrefetch, int(prefetchTime/s.handlerTime)*s.cfg.concurrency))
}

// run serves the subscription until ctx ends, then drains.
func (s *subscription) run(ctx context.Context) error {
	if s.shares > 0 {
		return s.runShares(ctx)
	}
	return s.serve(ctx, ctx)
}

// serve is run for one consumer. It ends with tenure, which ends with ctx: only then DrainTimeout begins.
func (s *subscription) serve(ctx, tenure context.Context) error {
	s.held, s.holdings.bytes = nil, 0
	s.queue = make(chan *delivered, max(maxPrefetch, s.cfg.prefetch)+64+8*s.cfg.atOnce()) // all that can be held
	s.wake, s.stop = make(chan struct{}, 1), make(chan struct{})
	if s.cfg.ordered {
		s.lanes = newLanes(s.queue)
	}
	// Handlers outlive ctx: they end by themselves, or at DrainTimeout.
	handlerCtx, cancelHandlers := context.WithCancel(context.WithoutCancel(ctx))
	defer cancelHandlers()
	var workers, helpers sync.WaitGroup
	for range s.cfg.concurrency {
		workers.Go(func() {
			if s.handler.IsBatch() {
				s.workBatches(handlerCtx)
				return
			}
			for d := range s.queue {
				if !s.admit() && s.lanes == nil {
					s.settled(d, 0)
					s.giveBack(d.Msg)
					continue
				}
				s.slots <- struct{}{}
				began := time.Now()
				if fence, may := s.mayBegin(d); !may {
					s.noProbe()
				} else if s.handle(handlerCtx, d, fence) {
					s.settled(d, time.Since(began))
				}
				<-s.slots
			}
		})
	}
	stopHelpers := make(chan struct{})
	helpers.Go(func() { s.heartbeat(stopHelpers) })
	if s.lanes != nil {
		helpers.Go(func() { s.keepOwnership(stopHelpers) })
	}

	unlisten := s.listen()
	s.pullLoop(tenure)
	s.drain()
	unlisten()
	close(s.queue)
	err := s.await(ctx, &workers, cancelHandlers)
	if s.lanes != nil {
		s.giveBackAll()
		s.unpin(context.WithoutCancel(ctx))
	}
	close(stopHelpers)
	helpers.Wait()
	if s.cfg.broadcast {
		s.forget(context.WithoutCancel(ctx))
	}
	if flushErr := s.bus.nc.FlushTimeout(ackTimeout); flushErr != nil && err == nil && s.bus.nc.IsConnected() {
		s.log.Warn("the last acknowledgements may be lost: their messages come again", "error", flushErr)
	}
	return err
}

// forget removes the consumer of a broadcast, which nobody else uses. If that fails the server does it later.
func (s *subscription) forget(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, ackTimeout)
	defer cancel()
	if err := s.bus.js.DeleteConsumer(ctx, s.stream, s.durable); err != nil {
		s.log.Debug("consumer not deleted", "consumer", s.durable, "error", err)
	}
}

// admit waits until a message may begin. It returns false when the drain begins first.
func (s *subscription) admit() bool {
	return (s.breaker == nil || s.breaker.enter(s.stop)) && (s.pacer == nil || s.pacer.wait(s.stop))
}

// await waits for the workers. After ctx has ended it cancels their contexts at DrainTimeout, and gives up on those that do
// not even then end.
func (s *subscription) await(ctx context.Context, workers *sync.WaitGroup, cancel context.CancelFunc) error {
	done := make(chan struct{})
	go func() { workers.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	timer := time.NewTimer(s.bus.cfg.DrainTimeout)
	defer timer.Stop()
	select {
	case <-done:
		return nil
	case <-timer.C:
	}
	cancel()
	timer.Reset(cancelGrace)
	select {
	case <-done:
	case <-timer.C:
	}
	return postrider.Errorf(postrider.DeadlineExceeded,
		"bus: drain group %s of %s: handlers were still running after DrainTimeout (%v) and were cancelled",
		s.cfg.group, s.handler.Name(), s.bus.cfg.DrainTimeout)
}

// cancelGrace is what a cancelled handler gets to return.
const cancelGrace = time.Second

// pullLoop keeps the queue filled until ctx ends. It starts over when the connection or the consumer was lost.
func (s *subscription) pullLoop(ctx context.Context) {
	ticker := time.NewTicker(pullHeartbeat / 2)
	defer ticker.Stop()
	connected := s.bus.nc.StatusChanged(nats.CONNECTED)
	defer s.bus.nc.RemoveStatusListener(connected)
	for attempt := 1; ctx.Err() == nil; {
		if err := s.pull(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("pull failed", "error", err)
			s.reset()
			_ = backoff.Wait(ctx, startRetry, attempt)
			attempt++
			continue
		}
		attempt = 1
		select {
		case <-ctx.Done():
		case <-s.wake:
		case <-ticker.C:
		case _, open := <-connected:
			s.reset() // the server has forgotten what a broken connection asked for
			if !open {
				connected = nil
			}
		}
	}
}

// pull asks the server for what the queue has room for, if that is worth a request.
func (s *subscription) pull(ctx context.Context) error {
	s.mu.Lock()
	silent := s.sub != nil && time.Since(s.lastSign) > 2*pullHeartbeat+pullHeartbeat/2
	lost, connected := s.lost, s.bus.nc.IsConnected()
	s.mu.Unlock()
	if !connected {
		s.reset()
		return nil // the ticker looks again
	}
	if silent || lost {
		s.reset()
		if err := s.bind(ctx); err != nil { // the consumer may have been deleted
			return err
		}
	}
	if s.lanes != nil {
		if err := s.assumeOwnership(ctx); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sub == nil {
		inbox := s.bus.nc.NewInbox()
		sub, err := s.bus.nc.Subscribe(inbox, s.receive)
		if err != nil {
			return fromNATS("bus: subscribe to "+s.durable, err)
		}
		_ = sub.SetPendingLimits(-1, -1) // bounded by what is asked for
		s.sub, s.asked, s.lost, s.lastSign = sub, 0, false, time.Now()
	}
	capacity := s.capacity()
	room := capacity - len(s.held) - s.asked
	if room < (capacity+1)/2 {
		return nil
	}
	if s.lanes != nil && (s.expired() || s.pin == "") {
		if s.asked > 0 {
			return nil
		}
		room = 1 // see lanes.go, on ownership
	}
	room, maxBytes := s.limitBytes(room, capacity)
	if room == 0 {
		return nil
	}
	request := fmt.Appendf(nil, `{"batch":%d,"expires":%d,"idle_heartbeat":%d%s`,
		room, pullExpiry.Nanoseconds(), pullHeartbeat.Nanoseconds(), maxBytes)
	if s.lanes != nil {
		request = fmt.Appendf(request, `,"group":%q`, ownerGroup)
		if s.pin != "" {
			request = fmt.Appendf(request, `,"id":%q`, s.pin)
		}
	}
	sent := time.Now()
	if err := s.bus.nc.PublishRequest(s.pullSubject(), s.sub.Subject, append(request, '}')); err != nil {
		return fromNATS("bus: pull from "+s.durable, err)
	}
	s.asked, s.lastPull = s.asked+room, sent
	return nil
}

func (s *subscription) pullSubject() string {
	return "$JS.API.CONSUMER.MSG.NEXT." + s.stream + "." + s.durable
}

// reset forgets the pull requests that are out. What they still bring goes to nobody and comes again after AckWait. In an
// ordered subscription newer messages would overtake it: the owner has the deliveries begin anew.
func (s *subscription) reset() {
	s.forgetPulls()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pin != "" {
		s.letGo()
		s.takeOver, s.wasReset = true, false
	}
}

// forgetPulls is the part of reset that a new owner needs too, who has the deliveries begin anew by itself.
func (s *subscription) forgetPulls() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sub != nil {
		_ = s.sub.Unsubscribe()
		s.sub = nil
	}
}

// receive is called for everything that arrives on the inbox, one after the other.
func (s *subscription) receive(msg *nats.Msg) {
	now := time.Now()
	if len(msg.Data) == 0 && msg.Header.Get("Status") != "" {
		s.mu.Lock()
		s.lastSign = now
		s.status(msg)
		s.mu.Unlock()
		s.signal()
		return
	}
	d := newDelivered(msg)
	d.since = now.UnixNano()
	key := ""
	if s.lanes != nil {
		key = d.key() // before the lock: it may have to read the whole message
	}
	s.mu.Lock()
	s.lastSign = now
	if s.asked > 0 {
		s.asked--
	}
	s.holdings.arrived(msg.Size())
	if s.draining || len(s.held) >= cap(s.queue) {
		s.mu.Unlock()
		s.giveBack(msg)
		return
	}
	defer s.mu.Unlock()
	if s.cfg.broadcast {
		if at, err := placeOf(msg.Reply); err == nil {
			s.lastSequence = max(s.lastSequence, at.sequence)
		}
	}
	// Sending under the lock is safe: the queue has room, and the drain closes it only after draining is set.
	switch {
	case s.lanes == nil:
		s.hold(d)
		s.queue <- d
	case s.owned(d):
		s.hold(d)
		s.lanes.add(d, key)
	}
}

// status handles a message of the server about a pull request. The lock is held.
func (s *subscription) status(msg *nats.Msg) {
	switch msg.Header.Get("Status") {
	case "100": // idle heartbeat
		return
	case "423": // another client has the pin
		s.disown()
	case "404", "408", "409": // the request has ended, with so many messages not delivered
		s.endedByBytes(msg.Header.Get("Description"))
		if n, err := strconv.Atoi(msg.Header.Get("Nats-Pending-Messages")); err == nil {
			s.asked = max(s.asked-n, 0)
			return
		}
	}
	// The consumer was deleted, the stream moved, nobody answers: start over.
	s.asked = 0
	s.lost = true
	s.log.Debug("pull request ended", "status", msg.Header.Get("Status"), "description", msg.Header.Get("Description"))
}

func (s *subscription) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// heartbeat tells the server at a third of AckWait that the messages held here are alive.
func (s *subscription) heartbeat(stop <-chan struct{}) {
	period := s.cfg.ackWait / 3
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	for {
		select {
		case <-stop:
			return
		case now := <-ticker.C:
			s.mu.Lock()
			alive := make([]*nats.Msg, 0, len(s.held))
			for _, d := range s.held {
				if now.UnixNano()-d.since > period.Nanoseconds()/2 {
					alive = append(alive, d.Msg)
				}
			}
			s.mu.Unlock()
			for _, msg := range alive {
				_ = s.bus.nc.Publish(msg.Reply, []byte("+WPI"))
			}
		}
	}
}

// drain takes no more messages and gives back at once those that no worker has begun.
func (s *subscription) drain() {
	s.mu.Lock()
	sub := s.sub
	s.draining = true
	s.mu.Unlock()
	close(s.stop)
	if sub != nil && s.bus.nc.IsConnected() {
		// Drain unsubscribes and then delivers what the server had sent before it knew.
		closed := sub.StatusChanged(nats.SubscriptionClosed)
		if sub.Drain() == nil {
			select {
			case <-closed:
			case <-time.After(ackTimeout):
			}
		}
	}
	for {
		select {
		case d := <-s.queue:
			if s.lanes == nil { // else it must wait for the one of its key that is being handled
				s.settled(d, 0)
				s.giveBack(d.Msg)
			}
		default:
			return
		}
	}
}

// giveBack lets the server deliver a message to somebody else now.
func (s *subscription) giveBack(msg *nats.Msg) { s.answer(msg, []byte("-NAK")) }

// settled forgets a message that was handled in some time, zero if it was not.
func (s *subscription) settled(d *delivered, took time.Duration) {
	s.mu.Lock()
	s.release(d)
	if took > 0 { // a moving average
		s.handlerTime += (took - s.handlerTime) / 16
	}
	if s.lanes != nil && !s.draining {
		s.lanes.next(d)
	}
	capacity := s.capacity()
	thirsty := capacity-len(s.held)-s.asked >= (capacity+1)/2
	s.mu.Unlock()
	if thirsty {
		s.signal()
	}
}
