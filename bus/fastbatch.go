package bus

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
)

// A fast batch (nats-server 2.14; nats-architecture-and-design: ADR-50) is a row of messages of which the server acknowledges
// every so many. Control data are in the reply subject:
//
//	<inbox>.<batch>.<messages between acknowledgements>.<what to do about a gap>.<number in the batch>.<operation>.$FI
//
// An error or a gap ends the batch: what comes behind is not stored. A known id is passed over in silence, and counts.
const (
	fastWindow = 1000          // messages on their way without an acknowledgement
	fastGap    = ".500.fail."  // an acknowledgement for half of that; a gap ends the batch
	fastStart  = ".0.$FI"      // operations
	fastAppend = ".1.$FI"      //
	fastCommit = ".2.$FI"      //
	fastNumber = 3             // position of the number, behind the inbox
	errFastOff = uint16(10205) // the stream takes no fast batches
	errFastMax = uint16(10211) // too many at once
)

// flow is how far a fast batch has come. [acks.receive] tells it.
type flow struct {
	lane   *lane
	waiter *waiter       // done when the batch has ended
	signal chan struct{} // there is something new
	n      int           // messages

	mu     sync.Mutex
	stored int    // so many are stored, from the first on
	failed int    // number of the message that ended the batch, 0 for none
	err    error  // its error
	code   uint16 // and the server's number for that
}

// receive takes what the server says about a batch; to which message is in the subject.
func (f *flow) receive(msg *nats.Msg, subject string) {
	ack, ours, err := parsePubAck(msg)
	if !ours {
		return
	}
	f.mu.Lock()
	before, end := f.stored, false
	switch {
	case ack.Type == "ack":
		f.stored = max(f.stored, f.number(ack.Seq))
	case ack.Type == "gap": // the last answer tells how many were stored
	case err == nil:
		f.stored, end = max(f.stored, f.number(ack.Count)), true
	case f.failed == 0:
		f.err, f.failed = err, f.number(ack.Seq)
		if ack.Error != nil {
			f.code = ack.Error.ErrCode
		}
		if end = ack.Type != "err"; end { // as to a single publish: there is no batch, and no other answer
			if fields := strings.Split(subject, "."); len(fields) > fastNumber {
				number, _ := strconv.ParseUint(fields[fastNumber], 10, 64)
				f.failed = f.number(number)
			}
		}
	}
	stored := f.stored
	f.mu.Unlock()
	f.lane.pace.stored.Add(int64(stored - before))
	if end {
		f.waiter.resolve(nil)
		return
	}
	select {
	case f.signal <- struct{}{}:
	default:
	}
}

// number is what the server says about a number of messages, within reason.
func (f *flow) number(n uint64) int { return int(min(n, uint64(f.n))) }

func (f *flow) progress() (stored int, failed bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.stored, f.failed > 0
}

// fastBatch publishes entries as one fast batch and gives a result to as many as it returns: to all of them, or to those up
// to the first that the server refuses for good; what is behind that is not stored. The error is one that passes, if there was
// one; then all have their results.
func (l *lane) fastBatch(ctx context.Context, entries []*entry) (settled int, passing error) {
	f := &flow{lane: l, signal: make(chan struct{}, 1), n: len(entries)}
	f.waiter = l.pub.acks.add(trip{}, f)
	began, before := time.Now(), l.pace.stored.Load()
	sent, lost := f.send(ctx, entries)
	if lost == nil && f.failed == 0 {
		if n := l.pace.stored.Load() - before; n >= probeSize { // other batches share the time
			learn(&l.pace.single, max(int64(time.Since(began))-l.pace.alone.Load(), 0)/n, 4)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case lost == nil && f.failed == 0: // or a gap, because the connection has lost a message
		settled = f.stored
	case f.code == errFastOff, f.code == errFastMax:
	case lost == nil && f.stored >= f.failed-1:
		settled, lost = f.failed, f.err
	case lost == nil && f.code == errMessageTooLarge && !slices.ContainsFunc(entries[:f.failed-1], (*entry).isNameless):
		return l.refusedAlone(ctx, entries, f.failed-1, f.err)
	case lost == nil: // it may be tried again, whatever f.err is
		lost = postrider.Errorf(postrider.Unavailable, "bus: publish: the server gave up the batch, it may have been stored: %v", f.err)
		fallthrough
	default:
		for i, e := range entries {
			switch {
			case i < f.stored:
				l.finish(e, nil)
			case i < sent:
				l.finish(e, lost)
			default:
				l.finish(e, unsent(lost))
			}
		}
		return len(entries), lost
	}
	settled = min(max(settled, 0), len(entries)) // whatever the answer said
	for i, e := range entries[:settled] {
		if i == settled-1 {
			l.finish(e, lost)
		} else {
			l.finish(e, nil)
		}
	}
	if lost != nil && postrider.Retryable(lost) {
		for _, e := range entries[settled:] { // must not overtake
			l.finish(e, lost)
		}
		return len(entries), lost
	}
	return settled, nil
}

// refusedAlone ends a batch of which the server refused one entry for good as it would a single message, one too large for the
// stream: then it says nothing about those before it, which it may have stored. They are sent again; it knows their ids.
func (l *lane) refusedAlone(ctx context.Context, entries []*entry, n int, refusal error) (settled int, passing error) {
	if n > 0 {
		if settled, passing = l.fastBatch(ctx, entries[:n]); settled < n {
			return settled, passing
		}
	}
	l.finish(entries[n], refusal)
	if passing != nil {
		for _, e := range entries[n+1:] { // must not overtake
			l.finish(e, unsent(passing))
		}
		return len(entries), passing
	}
	return n + 1, nil
}

// send sends entries, with a window, and waits for the end of the batch. It returns how many went out, and an error if the
// server has not had the last word.
func (f *flow) send(ctx context.Context, entries []*entry) (sent int, lost error) {
	w, pub := f.waiter, f.lane.pub
	prefix := w.reply + "." + pub.acks.nextID() + fastGap
	reply := make([]byte, 0, len(prefix)+len("1000000")+len(fastCommit))
	timer := time.NewTimer(pub.timeout)
	defer timer.Stop()
	seen, bytes := 0, 0 // stored, as far as it was noticed; size of what is on its way
	for {
		stored, failed := f.progress()
		for ; seen < stored; seen++ {
			bytes -= len(entries[seen].msg.Data)
		}
		if !failed && sent < len(entries) && sent-seen < fastWindow && (sent == seen || bytes < maxGroupBytes) {
			msg, op := entries[sent].msg, fastAppend
			switch sent {
			case len(entries) - 1:
				op = fastCommit
			case 0:
				op = fastStart
			}
			reply = strconv.AppendInt(append(reply[:0], prefix...), int64(sent)+1, 10)
			msg.Reply = string(append(reply, op...))
			if err := pub.send(msg); err != nil {
				w.resolve(err)
				return sent, <-w.done
			}
			bytes += len(msg.Data)
			sent++
			continue
		}
		select {
		case err := <-w.done:
			return sent, err
		case <-f.signal:
			timer.Reset(pub.timeout)
		case <-timer.C:
			w.resolve(noAck(pub.timeout))
		case <-ctx.Done():
			w.resolve(gaveUp(ctx))
		}
	}
}
