package bus

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
)

// acks matches publish acknowledgements with those who wait for them: one inbox for the connection, a number as the
// token behind it. It stands in for the mux of the client library, which spends a fifth of its time with encoding/json. The
// subscription lives as long as the connection.
type acks struct {
	nc     *nats.Conn
	prefix string // inbox with a trailing dot

	mu      sync.Mutex
	sub     *nats.Subscription
	last    uint64 // number given out
	waiters map[uint64]*waiter
	idle    []*waiter
}

// waiter waits for one acknowledgement after the other, under one reply subject: the server finds its way faster to a
// subject that it knows. It is used again only after a stream's acknowledgement: one that is late would be taken for another's.
type waiter struct {
	acks  *acks
	id    uint64
	reply string
	done  chan error // the first result
	msg   *nats.Msg  // that [burst] is to send
	timer *time.Timer

	// For [acks.receive], under acks.mu.
	waiting bool
	trip    trip  // of a message sent singly
	flow    *flow // of a fast batch, which gets more than one message
}

// maxIdle bounds the waiters that are kept for later.
const maxIdle = 4096

func newAcks(nc *nats.Conn) *acks {
	return &acks{nc: nc, prefix: nc.NewInbox() + ".", waiters: map[uint64]*waiter{}}
}

// nextID returns an id that is unique among all connections, for an atomic batch.
func (a *acks) nextID() string {
	inbox := strings.TrimSuffix(a.prefix, ".")
	a.mu.Lock()
	defer a.mu.Unlock()
	a.last++
	return inbox[strings.LastIndexByte(inbox, '.')+1:] + "-" + strconv.FormatUint(a.last, 10)
}

// add returns a waiter: the caller sends a message with its reply subject and then waits. A trip or a flow, if there is one,
// learns of what the server answers.
func (a *acks) add(t trip, f *flow) *waiter {
	a.mu.Lock()
	defer a.mu.Unlock()
	var w *waiter
	if n := len(a.idle) - 1; n >= 0 && f == nil {
		w, a.idle = a.idle[n], a.idle[:n]
	} else {
		a.last++
		w = &waiter{acks: a, id: a.last, done: make(chan error, 1)}
		w.reply = a.prefix + strconv.FormatUint(w.id, 10)
		a.waiters[w.id] = w
	}
	w.waiting, w.trip, w.flow = true, t, f
	if a.sub == nil {
		sub, err := a.nc.Subscribe(a.prefix+">", a.receive)
		if err != nil {
			delete(a.waiters, w.id)
			w.waiting = false
			t.lose()
			w.done <- fromNATS("bus: subscribe to acknowledgements", err)
			return w
		}
		a.sub = sub
		go a.watch(a.nc.StatusChanged())
	}
	return w
}

// watch ends the waits when the connection breaks: the acknowledgements of what was sent will not come. It lives as long
// as the connection does.
func (a *acks) watch(changes chan nats.Status) {
	defer a.nc.RemoveStatusListener(changes)
	if a.nc.IsClosed() { // before the listener was there
		return
	}
	for status := range changes {
		if status == nats.CONNECTED {
			continue
		}
		a.mu.Lock()
		var lost []*waiter
		for _, w := range a.waiters {
			if w.waiting {
				lost = append(lost, w)
			}
		}
		a.mu.Unlock()
		for _, w := range lost {
			w.resolve(&postrider.Error{
				Code: postrider.Unavailable, Op: "bus: publish", Err: nats.ErrDisconnected,
				Msg: "the connection to NATS was lost before the acknowledgement: it may have been stored",
			})
		}
		if status == nats.CLOSED {
			return
		}
	}
}

// receive takes an acknowledgement. It is called for one after the other.
func (a *acks) receive(msg *nats.Msg) {
	token, rest, _ := strings.Cut(msg.Subject[len(a.prefix):], ".")
	id, notOurs := strconv.ParseUint(token, 10, 64)
	if notOurs != nil {
		return
	}
	a.mu.Lock()
	w := a.waiters[id]
	if w == nil || !w.waiting {
		a.mu.Unlock()
		return
	}
	if w.flow != nil {
		a.mu.Unlock()
		w.flow.receive(msg, rest)
		return
	}
	ours, err := parseAck(msg)
	if !ours {
		a.mu.Unlock()
		return
	}
	w.waiting = false
	t := w.trip
	a.mu.Unlock()
	t.end()
	w.done <- err
}

// resolve ends the wait with a result that did not come from the server.
func (w *waiter) resolve(err error) {
	w.acks.mu.Lock()
	waiting := w.waiting
	if waiting {
		w.waiting = false
		delete(w.acks.waiters, w.id)
	}
	t := w.trip
	w.acks.mu.Unlock()
	if waiting {
		t.lose()
		w.done <- err
	}
}

// wait returns the result, within a time and as long as ctx lasts; afterwards the waiter is another's. Without an
// acknowledgement the outcome is open.
func (w *waiter) wait(ctx context.Context, timeout time.Duration) error {
	if w.timer == nil {
		w.timer = time.NewTimer(timeout)
	} else {
		w.timer.Reset(timeout)
	}
	var err error
	select {
	case err = <-w.done:
	case <-w.timer.C:
		w.resolve(noAck(timeout))
		err = <-w.done
	case <-ctx.Done():
		w.resolve(gaveUp(ctx))
		err = <-w.done
	}
	w.timer.Stop()
	a := w.acks
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.waiters[w.id] == w {
		if err == nil && w.flow == nil && len(a.idle) < maxIdle {
			a.idle = append(a.idle, w)
		} else {
			delete(a.waiters, w.id)
		}
	}
	return err
}

// noAck is the result of what was not acknowledged in time.
func noAck(timeout time.Duration) error {
	return &postrider.Error{
		Code: postrider.DeadlineExceeded, Op: "bus: publish",
		Msg: fmt.Sprintf("no acknowledgement within %v: it may have been stored", timeout),
	}
}

// gaveUp is the result of what was sent when the caller's context ended.
func gaveUp(ctx context.Context) error {
	return &postrider.Error{
		Code: postrider.CodeOf(ctx.Err()), Op: "bus: publish", Err: ctx.Err(),
		Msg: "gave up waiting for the acknowledgement: it may have been stored",
	}
}

// pubAck is what a server answers to a publish (nats-server: server/stream.go, JSPubAckResponse, BatchFlowAck, BatchFlowErr).
type pubAck struct {
	Stream string    `json:"stream"`
	Seq    uint64    `json:"seq"`
	Count  uint64    `json:"count"` // of a batch
	Type   string    `json:"type"`  // within a fast batch: "ack", "gap", "err"; "" for the last answer
	Error  *ackError `json:"error"`
}

type ackError struct {
	Code        int    `json:"code"`
	ErrCode     uint16 `json:"err_code"`
	Description string `json:"description"`
}

func (e *ackError) err() error {
	err := &postrider.Error{
		Code: apiCode(e.Code, e.ErrCode), Op: "bus: publish",
		Msg: e.Description + " (JetStream error " + strconv.Itoa(int(e.ErrCode)) + ")",
	}
	if e.ErrCode == errMessageTooLarge {
		return postrider.Permanent(err)
	}
	return err
}

// parseAck reads a publish acknowledgement; the error is what it says. The common form is told without a JSON parser. An answer
// that is not ours does not come from a stream: somebody else may answer what is published.
func parseAck(msg *nats.Msg) (ours bool, err error) {
	if bytes.HasPrefix(msg.Data, []byte(`{"stream":`)) && !bytes.Contains(msg.Data, []byte(`"error"`)) {
		return true, nil
	}
	ack, ours, err := parsePubAck(msg)
	return ours && (err != nil || ack.Stream != ""), err
}

func parsePubAck(msg *nats.Msg) (ack pubAck, ours bool, err error) {
	if len(msg.Data) == 0 && msg.Header.Get("Status") == "503" {
		return ack, true, noStream()
	}
	switch {
	case json.Unmarshal(msg.Data, &ack) != nil:
		return ack, false, nil //nolint:nilerr // somebody else has written it
	case ack.Error != nil && ack.Error.ErrCode > 0:
		return ack, true, ack.Error.err()
	default:
		return ack, ack.Error == nil && (ack.Stream != "" || ack.Type != ""), nil
	}
}
