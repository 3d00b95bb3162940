package bus

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// ackTimeout is how long one attempt waits for its acknowledgement.
const ackTimeout = 5 * time.Second

// publisher sends messages to their streams. How, is for the [lane] of a stream to say.
type publisher struct {
	nc      *nats.Conn
	js      jetstream.JetStream
	acks    *acks
	burst   *burst
	timeout time.Duration // of one acknowledgement

	// admit, if not nil, must allow a stream before something is published to it, and again after a reconnect.
	admit func(ctx context.Context, stream *jetstream.StreamInfo) error

	mu    sync.RWMutex
	lanes map[string]*lane // by stream
	known map[string]*lane // by subject
	epoch uint64           // reconnects of the connection when the streams were allowed
}

func newPublisher(nc *nats.Conn, js jetstream.JetStream) *publisher {
	p := &publisher{
		nc: nc, js: js, acks: newAcks(nc), timeout: ackTimeout, lanes: map[string]*lane{}, known: map[string]*lane{},
	}
	p.burst = &burst{pub: p}
	return p
}

// publish sends entries and returns the result of each. When ctx ends first, those that are on their way have an unknown
// outcome, and the entries must not be used again. Entries of one stream keep their order: see [lane.publish].
func (p *publisher) publish(ctx context.Context, entries []*entry) []error {
	errs := make([]error, len(entries))
	type part struct {
		lane    *lane
		entries []*entry
		index   []int
	}
	var parts []*part
	for n, e := range entries {
		l, err := p.laneOf(ctx, e)
		if err != nil {
			errs[n] = err
			continue
		}
		i := 0
		for i < len(parts) && parts[i].lane != l {
			i++
		}
		if i == len(parts) {
			parts = append(parts, &part{lane: l})
		}
		parts[i].entries, parts[i].index = append(parts[i].entries, e), append(parts[i].index, n)
	}
	var wg sync.WaitGroup
	for i, part := range parts {
		work := func() {
			for i, err := range part.lane.publish(ctx, part.entries) {
				errs[part.index[i]] = err
			}
		}
		if i < len(parts)-1 {
			wg.Go(work)
		} else {
			work() // nearly always the only one
		}
	}
	wg.Wait()
	return errs
}

// transmit sends a message whose acknowledgement w waits for.
func (p *publisher) transmit(msg *nats.Msg, w *waiter) {
	msg.Reply = w.reply
	if err := p.send(msg); err != nil {
		w.resolve(err)
	}
}

// send sends a message if the connection is there. The client library would keep it and send it whenever the server is back,
// long after the caller has given up.
func (p *publisher) send(msg *nats.Msg) error {
	if !p.nc.IsConnected() {
		return &postrider.Error{
			Code: postrider.Unavailable, Op: "bus: publish to " + msg.Subject, Unprocessed: true,
			Msg: "not connected to NATS (" + strings.ToLower(p.nc.Status().String()) + ")",
		}
	}
	if err := p.nc.PublishMsg(msg); err != nil {
		return fromNATS("bus: publish to "+msg.Subject, err)
	}
	return nil
}

// laneOf finds the lane of an entry, and the partition if the stream has any. An entry that is scheduled must have a
// stream to go to in the end.
func (p *publisher) laneOf(ctx context.Context, e *entry) (*lane, error) {
	if e.to != "" {
		if _, err := p.lane(ctx, e.to); err != nil {
			return nil, err
		}
	}
	l, err := p.lane(ctx, e.wanted())
	if err == nil {
		e.divide(int(l.partitions.Load()))
	}
	return l, err
}

// laneKnown returns the lane of a subject if the server need not be asked, else nil.
func (p *publisher) laneKnown(subject string) *lane {
	if p.admit != nil {
		epoch := p.nc.Stats().Reconnects
		p.mu.Lock()
		defer p.mu.Unlock()
		if epoch != p.epoch {
			clear(p.known)
			p.epoch = epoch
		}
		return p.known[subject]
	}
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.known[subject]
}

// lane finds the stream that takes a subject.
func (p *publisher) lane(ctx context.Context, subject string) (*lane, error) {
	if l := p.laneKnown(subject); l != nil {
		return l, nil
	}
	op := "bus: find the stream of " + subject
	if !p.nc.IsConnected() {
		return nil, &postrider.Error{Code: postrider.Unavailable, Op: op, Msg: "not connected to NATS", Unprocessed: true}
	}
	// A server that is losing its leader answers nothing: one attempt must not take all the time.
	attempt, cancel := context.WithTimeout(ctx, ackTimeout)
	defer cancel()
	name, err := p.js.StreamNameBySubject(attempt, subject)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, &postrider.Error{
			Code: postrider.FailedPrecondition, Op: op, Unprocessed: true,
			Msg: "no stream takes this subject: declare one in bus.Config.Streams", Err: &missing{subject},
		}
	}
	if err != nil {
		return nil, unsent(fromNATS(op, err))
	}
	stream, err := p.js.Stream(attempt, name)
	if err != nil {
		return nil, unsent(fromNATS(op, err))
	}
	if p.admit != nil {
		if err := p.admit(ctx, stream.CachedInfo()); err != nil {
			return nil, err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	cfg := stream.CachedInfo().Config
	l := p.lanes[name]
	if l == nil {
		l = newLane(p, cfg)
		p.lanes[name] = l
	}
	l.partitions.Store(int32(partitions(cfg)))
	if len(p.known) >= maxKnownSubjects {
		clear(p.known)
	}
	p.known[subject] = l
	return l, nil
}

// unsent marks an error that came before anything was sent.
func unsent(err error) error {
	if e, ok := errors.AsType[*postrider.Error](err); ok && !e.Unprocessed {
		marked := *e
		marked.Unprocessed = true
		return &marked
	}
	return err
}

// forget drops what is known about a subject: its stream may have gone.
func (p *publisher) forget(subject string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.known, subject)
}

// maxKnownSubjects bounds the cache of subjects; topics are few, replies to many instances may not be.
const maxKnownSubjects = 4096

// noStream is the error for a publish that nobody answered.
func noStream() error {
	return &postrider.Error{
		Code: postrider.Unavailable, Op: "bus: publish", Unprocessed: true,
		Msg: fmt.Sprintf("the stream does not answer (%v)", nats.ErrNoResponders), Err: nats.ErrNoResponders,
	}
}
