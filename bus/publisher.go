package bus

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// How the publisher groups. An atomic batch is synced to disk once, before its acknowledgement, but is staged in a file
// of its own first, which costs as much as a dozen syncs or more. Whether that pays depends on the server's sync
// setting and its disk, which a client cannot see, so it is measured: a group goes out as a batch when it is larger than
// the time of a batch divided by that of a single publish. The server takes at most 1000 messages a batch.
const (
	maxGroup      = 1000
	maxGroupBytes = 8 << 20
	minBatch      = 4 // also the smallest group of single publishes whose time tells something

	// Of so many groups the first messages of one go out singly, to measure.
	probeEvery = 64
	probeSize  = 16

	// What is believed at first: nats-server 2.15 with sync_interval always, on a small virtual machine.
	firstBatchTime  = 2500 * time.Microsecond
	firstSingleTime = 200 * time.Microsecond
)

// headers that the bus adds to a message of an atomic batch (nats-architecture-and-design: ADR-50).
const (
	headerBatchID     = "Nats-Batch-Id"
	headerBatchSeq    = "Nats-Batch-Sequence"
	headerBatchCommit = "Nats-Batch-Commit"
)

// ackTimeout is how long one attempt waits for its acknowledgement.
const ackTimeout = 5 * time.Second

// entry is one message on its way. err is valid once the entry's call is done, and nobody's business before.
type entry struct {
	msg  *nats.Msg
	key  string // partition key, "" for none
	via  string // of a scheduled message: where the server will send it, which is in the same stream
	to   string // of a scheduled message: where it goes in the end, "" if that is via
	err  error
	call *call
}

// call counts down the entries of one publish; done is closed when all have their result.
type call struct {
	mu   sync.Mutex
	left int
	done chan struct{}
}

func (e *entry) finish(err error) {
	e.err = err
	e.call.mu.Lock()
	defer e.call.mu.Unlock()
	if e.call.left--; e.call.left == 0 {
		close(e.call.done)
	}
}

// isNameless says that the server cannot tell a duplicate of the message.
func (e *entry) isNameless() bool { return len(e.msg.Header[headerMsgID]) == 0 }

// publisher sends messages to their streams by group commit: what is waiting for a stream, callers of one message
// included, goes out as one atomic batch, with no timer. A lone message goes alone at once.
type publisher struct {
	nc   *nats.Conn
	js   jetstream.JetStream
	acks *acks

	// admit, if not nil, must allow a stream before something is published to it, and again after a reconnect.
	admit func(ctx context.Context, stream *jetstream.StreamInfo) error

	mu    sync.Mutex
	lanes map[string]*lane  // by stream
	known map[string]string // subject -> stream
	epoch uint64            // reconnects of the connection when the streams were allowed
}

func newPublisher(nc *nats.Conn, js jetstream.JetStream) *publisher {
	return &publisher{nc: nc, js: js, acks: newAcks(nc), lanes: map[string]*lane{}, known: map[string]string{}}
}

// lane is the queue of one stream.
type lane struct {
	pub        *publisher
	atomic     bool
	partitions atomic.Int32 // of the stream

	// Moving averages, for who is at work on the queue.
	batchTime  time.Duration // of a batch, whatever its size: most of it is the staging
	singleTime time.Duration // of a single publish among others
	groups     int           // that could have been batches

	mu    sync.Mutex
	queue []*entry
	busy  bool // a group is on its way. One at a time: two would halve the groups and keep no order
}

// publish sends entries and returns the result of each. When ctx ends first, those that are on their way have an unknown
// outcome, and the entries must not be used again. Entries of one stream keep their order: the next group of a call is
// queued when the one before it is settled, and not sent when it failed.
func (p *publisher) publish(ctx context.Context, entries []*entry) []error {
	if len(entries) == 1 { // nearly always, and worth six allocations
		l, err := p.laneOf(ctx, entries[0])
		if err != nil {
			return []error{err}
		}
		return l.publish(ctx, entries)
	}
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

func (l *lane) publish(ctx context.Context, entries []*entry) []error {
	errs := make([]error, 0, len(entries))
	var failed error // passes, but what comes after it must wait for the next attempt
	for len(entries) > 0 {
		chunk := entries[:min(len(entries), maxGroup)]
		entries = entries[len(chunk):]
		if failed == nil {
			var settled bool
			if settled, failed = l.publishChunk(ctx, chunk); settled {
				for _, e := range chunk {
					errs = append(errs, e.err)
				}
				continue
			}
		}
		for range chunk {
			errs = append(errs, failed)
		}
	}
	return errs
}

// publishChunk queues entries, has the queue worked on if it is not, and waits until they are settled or ctx ends. The
// error is one that passes, if there was one.
func (l *lane) publishChunk(ctx context.Context, chunk []*entry) (settled bool, passing error) {
	c := &call{left: len(chunk), done: make(chan struct{})}
	for _, e := range chunk {
		e.call = c
	}
	l.mu.Lock()
	l.queue = append(l.queue, chunk...)
	lead := !l.busy
	l.busy = true
	l.mu.Unlock()
	if lead {
		go l.work() // not the caller's own work: the group may need longer than the caller has
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		return false, &postrider.Error{
			Code: postrider.CodeOf(ctx.Err()), Op: "bus: publish", Err: ctx.Err(),
			Msg: "gave up waiting for the acknowledgement: it may have been stored",
		}
	}
	for _, e := range chunk {
		if e.err != nil && postrider.Retryable(e.err) {
			return true, e.err
		}
	}
	return true, nil
}

// work sends what is queued, group by group.
func (l *lane) work() {
	for {
		runtime.Gosched() // callers that are ready join the group, those of the group before it above all
		l.send(l.take())
		l.mu.Lock()
		l.busy = len(l.queue) > 0
		more := l.busy
		l.mu.Unlock()
		if !more {
			return
		}
	}
}

// take removes a group from the queue.
func (l *lane) take() []*entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, bytes := 0, 0
	for n < len(l.queue) && n < maxGroup && (n == 0 || bytes < maxGroupBytes) {
		bytes += len(l.queue[n].msg.Data)
		n++
	}
	group := l.queue[:n:n]
	l.queue = l.queue[n:]
	if len(l.queue) == 0 {
		l.queue = nil
	}
	return group
}

// send publishes a group and gives each entry its result. A batch that is refused or whose outcome is unknown is sent
// again one by one: a duplicate id refuses the whole batch, and a bad message must not fail its neighbours. Without ids the
// server would store twice what it has already: an unknown outcome is then the result.
func (l *lane) send(group []*entry) {
	if !l.atomic || len(group) < minBatch {
		_ = l.single(group)
		return
	}
	if l.groups++; l.groups%probeEvery == 1 { // what a single publish takes must be known while batches are used
		head := group[:min(len(group), probeSize)]
		group = group[len(head):]
		if err := l.measured(head); err != nil {
			for _, e := range group { // must not overtake
				l.finish(e, err)
			}
			return
		}
	}
	began := time.Now()
	if len(group) < minBatch || l.singleTime < l.batchTime/time.Duration(len(group)) {
		_ = l.measured(group)
		l.batchTime += (firstBatchTime - l.batchTime) / 64 // one slow batch must not be the last
		return
	}
	err := l.pub.batch(group)
	if err == nil {
		l.batchTime += (time.Since(began) - l.batchTime) / 8
	}
	unknown := errors.Is(err, postrider.DeadlineExceeded) && slices.ContainsFunc(group, (*entry).isNameless)
	if err == nil || unknown || errors.Is(err, postrider.Unavailable) {
		for _, e := range group {
			l.finish(e, err)
		}
		return
	}
	for i, e := range group {
		p := l.pub.acks.add()
		l.pub.transmit(e.msg, p)
		if err = p.wait(); err != nil && postrider.Retryable(err) {
			for _, e := range group[i:] { // what comes later must not overtake
				l.finish(e, err)
			}
			return
		}
		l.finish(e, err)
	}
}

// measured is single, and notes the time that it takes.
func (l *lane) measured(group []*entry) error {
	began := time.Now()
	err := l.single(group)
	if n := len(group); n >= minBatch {
		l.singleTime += (time.Since(began)/time.Duration(n) - l.singleTime) / 4
	}
	return err
}

// single publishes each message with an acknowledgement of its own, all at once but for messages of one key: the second
// of them waits until the first is stored, and is not sent if it was not, lest it should overtake it. It returns an error
// that passes, if there was one.
func (l *lane) single(group []*entry) (passing error) {
	type sent struct {
		*entry
		ack *pendingAck
	}
	var wave []sent
	keys := map[string]bool{}    // of the wave
	failed := map[string]error{} // by key
	settle := func() {
		for _, s := range wave {
			err := s.ack.wait()
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
	for _, e := range group {
		if e.key != "" && keys[e.key] {
			settle()
		}
		if err := failed[e.key]; err != nil {
			l.finish(e, err)
			continue
		}
		ack := l.pub.acks.add()
		l.pub.transmit(e.msg, ack)
		wave = append(wave, sent{e, ack})
		keys[e.key] = true
	}
	settle()
	return passing
}

// finish gives an entry its result. A stream that does not answer may have gone: it is looked up again next time.
func (l *lane) finish(e *entry, err error) {
	if errors.Is(err, nats.ErrNoResponders) {
		l.pub.forget(e.wanted())
	}
	e.finish(err)
}

// batch publishes a group as one atomic batch; only the last message asks for an answer.
func (p *publisher) batch(group []*entry) error {
	id := p.acks.nextID()
	last := len(group) - 1
	ack := p.acks.add()
	// The entries' own headers must stay fit for single publishes. The client library is done with a message when it
	// returns, so one copy serves all.
	msg := &nats.Msg{Header: make(nats.Header, len(group[0].msg.Header)+3)}
	batchID, batchSeq := []string{id}, []string{""}
	for i, e := range group {
		clear(msg.Header)
		maps.Copy(msg.Header, e.msg.Header)
		batchSeq[0] = strconv.Itoa(i + 1)
		msg.Header[headerBatchID], msg.Header[headerBatchSeq] = batchID, batchSeq
		msg.Subject, msg.Data = e.msg.Subject, e.msg.Data
		if i == last {
			msg.Header[headerBatchCommit] = []string{"1"}
			p.transmit(msg, ack)
			break
		}
		if err := p.nc.PublishMsg(msg); err != nil {
			ack.resolve(fromNATS("bus: publish", err))
			break
		}
	}
	return ack.wait()
}

// transmit sends a message whose acknowledgement resolves ack.
func (p *publisher) transmit(msg *nats.Msg, ack *pendingAck) {
	if !p.nc.IsConnected() {
		// The client library would keep the message and send it whenever the server is back, long after the caller has
		// given up.
		ack.resolve(&postrider.Error{
			Code: postrider.Unavailable, Op: "bus: publish to " + msg.Subject, Unprocessed: true,
			Msg: "not connected to NATS (" + strings.ToLower(p.nc.Status().String()) + ")",
		})
		return
	}
	m := *msg
	m.Reply = ack.reply
	if err := p.nc.PublishMsg(&m); err != nil {
		ack.resolve(fromNATS("bus: publish to "+msg.Subject, err))
	}
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

// lane finds the stream that takes a subject.
func (p *publisher) lane(ctx context.Context, subject string) (*lane, error) {
	p.mu.Lock()
	if p.admit != nil {
		if epoch := p.nc.Stats().Reconnects; epoch != p.epoch {
			clear(p.known)
			p.epoch = epoch
		}
	}
	if name, ok := p.known[subject]; ok {
		defer p.mu.Unlock()
		return p.lanes[name], nil
	}
	p.mu.Unlock()
	op := "bus: find the stream of " + subject
	if !p.nc.IsConnected() {
		return nil, &postrider.Error{Code: postrider.Unavailable, Op: op, Msg: "not connected to NATS", Unprocessed: true}
	}
	name, err := p.js.StreamNameBySubject(ctx, subject)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, &postrider.Error{
			Code: postrider.FailedPrecondition, Op: op, Unprocessed: true,
			Msg: "no stream takes this subject: declare one in bus.Config.Streams", Err: err,
		}
	}
	if err != nil {
		return nil, unsent(fromNATS(op, err))
	}
	stream, err := p.js.Stream(ctx, name)
	if err != nil {
		return nil, unsent(fromNATS(op, err))
	}
	if p.admit != nil {
		if err := p.admit(ctx, stream.CachedInfo()); err != nil {
			return nil, err
		}
	}
	cfg := stream.CachedInfo().Config
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lanes[name] == nil {
		// With replicas the Raft log groups the syncs by itself.
		p.lanes[name] = &lane{
			pub: p, atomic: cfg.AllowAtomicPublish && cfg.Replicas <= 1,
			batchTime: firstBatchTime, singleTime: firstSingleTime,
		}
	}
	p.lanes[name].partitions.Store(int32(partitions(cfg)))
	if len(p.known) >= maxKnownSubjects {
		clear(p.known)
	}
	p.known[subject] = name
	return p.lanes[name], nil
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
