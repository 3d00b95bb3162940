package membus

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/internal/backoff"
)

// subscription is one handler's share in the messages of a group.
type subscription struct {
	bus.Settings

	bus     *Bus
	handler postrider.Handler
	log     *slog.Logger

	// The broker's lock guards these.
	group *group
	fence uint64             // of an ordered group: larger than that of every member before
	held  map[*delivery]bool // being handled
}

// run serves the subscription until ctx ends, then waits for the handlers.
func (s *subscription) run(ctx context.Context) error {
	// Handlers outlive ctx: they end by themselves, or at DrainTimeout.
	handlerCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var handlers sync.WaitGroup
	slots := make(chan struct{}, s.Concurrency)
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			continue
		case slots <- struct{}{}:
		}
		if s.handler.IsBatch() {
			if batch := s.takeBatch(ctx); batch != nil {
				handlers.Go(func() {
					s.handleBatch(handlerCtx, batch)
					<-slots
				})
			}
		} else if d := s.bus.broker.take(ctx, s, 0); d != nil {
			handlers.Go(func() {
				s.handle(handlerCtx, d)
				<-slots
			})
		}
	}
	s.bus.broker.leave(s)
	done := make(chan struct{})
	go func() { handlers.Wait(); close(done) }()
	timer := time.NewTimer(s.bus.cfg.DrainTimeout)
	defer timer.Stop()
	select {
	case <-done:
		return nil
	case <-timer.C:
	}
	cancel()
	timer.Reset(time.Second) // what a cancelled handler gets to return
	select {
	case <-done:
	case <-timer.C:
	}
	return postrider.Errorf(postrider.DeadlineExceeded,
		"membus: drain group %s of %s: handlers were still running after DrainTimeout (%v) and were cancelled",
		s.Group, s.handler.Name(), s.bus.cfg.DrainTimeout)
}

// handle runs the handler on one message and settles it.
func (s *subscription) handle(ctx context.Context, d *delivery) {
	m, err := s.open(d)
	var reply *postrider.Message
	if err == nil {
		reply, err = s.handler.Handle(ctx, m)
	}
	s.settle(context.WithoutCancel(ctx), d, m, reply, err)
}

// open reads a message. The error is that of one which cannot be handled.
func (s *subscription) open(d *delivery) (*postrider.Message, error) {
	m, err := d.message(s.bus.topic(d.subject))
	m.Delivery = postrider.Delivery{
		Attempt: d.attempt, Stream: d.stream, Sequence: d.sequence, Stored: d.at, Group: s.Group, Fence: s.fence,
	}
	switch {
	case err != nil:
		return m, postrider.Permanent(postrider.Errorf(postrider.InvalidArgument, "membus: not a valid CloudEvent: %w", err))
	case d.event == nil && !s.handler.IsRaw():
		return m, postrider.Permanent(postrider.Errorf(postrider.InvalidArgument, "membus: not a CloudEvent: it has no attributes"))
	}
	switch wanted, err := s.Wants(m); {
	case err != nil:
		return m, err
	case !wanted:
		return m, errUnwanted
	}
	return m, d.expired("handle", m)
}

// errUnwanted is the outcome of a message that the filter does not want.
var errUnwanted = errors.New("membus: the filter does not want the message")

// settle decides what becomes of a handled message, by the rules of package bus: nothing is settled before what follows
// from it is stored.
func (s *subscription) settle(ctx context.Context, d *delivery, m, reply *postrider.Message, err error) {
	b := s.bus
	if errors.Is(err, errUnwanted) {
		b.count(func(st *bus.Stats) { st.Filtered++ })
		b.broker.settled(s, d, -1)
		return
	}
	dead := false
	if err != nil {
		if delay, again := backoff.Next(s.Retry, d.attempt, err); again {
			if _, asked := postrider.RetryDelay(err); !asked && b.broker.Deterministic {
				delay = backoff.Bound(s.Retry, d.attempt)
			}
			s.retry(d, m, delay, err)
			return
		}
		if s.parks(d, m, err) {
			s.park(d, m, err)
			return
		}
		if s.handler.IsCall() {
			reply = postrider.ErrorReply(m, err)
		}
		dead = !s.refuses(m, err)
	}
	if reply != nil && reply.Topic != "" {
		if pubErr := b.Publish(ctx, reply); pubErr != nil {
			s.log.Warn("reply not published, the command is delivered again", "id", m.ID, "replyto", reply.Topic, "error", pubErr)
			s.retry(d, m, backoff.Bound(s.Retry, d.attempt), errors.Join(err, pubErr))
			return
		}
	}
	if dead {
		s.deadLetter(d, m, err)
	} else {
		b.count(func(st *bus.Stats) { st.Handled++ })
	}
	b.broker.settled(s, d, -1)
}

// refuses says if an error is the refusal of a command: an answer, and its asker gets it. Anything else that failed for good
// is kept.
func (s *subscription) refuses(m *postrider.Message, err error) bool {
	if !s.handler.IsCall() || postrider.Retryable(err) {
		return false
	}
	reply := postrider.ErrorReply(m, err)
	return reply != nil && reply.Topic != ""
}

// retry has the message delivered again after a delay.
func (s *subscription) retry(d *delivery, m *postrider.Message, delay time.Duration, err error) {
	if limit := s.bus.broker.MaxDelay; limit > 0 {
		delay = min(delay, limit)
	}
	s.log.Debug("attempt failed", "id", m.ID, "type", m.Type, "attempt", d.attempt, "delay", delay, "error", err)
	s.bus.count(func(st *bus.Stats) { st.Retried++ })
	s.bus.broker.settled(s, d, delay)
}

// count changes the counters, unless the process has died.
func (b *Bus) count(change func(*bus.Stats)) {
	b.broker.mu.Lock()
	defer b.broker.mu.Unlock()
	if !b.dead {
		change(&b.stats)
	}
}
