package bus

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
)

// acks matches publish acknowledgements with those who wait for them: one inbox for the connection, a counter as the
// last token of the reply subject. It stands in for the mux of the client library, which spends a fifth of its time
// with encoding/json. The subscription lives as long as the connection.
type acks struct {
	nc     *nats.Conn
	prefix string // inbox with a trailing dot
	next   atomic.Uint64

	mu      sync.Mutex
	sub     *nats.Subscription
	pending map[string]*pendingAck
}

// pendingAck is one acknowledgement that is awaited. Its first result counts.
type pendingAck struct {
	acks  *acks
	token string
	reply string
	done  chan error
}

func newAcks(nc *nats.Conn) *acks {
	return &acks{nc: nc, prefix: nc.NewInbox() + ".", pending: map[string]*pendingAck{}}
}

// nextID returns an id that is unique among all connections, for an atomic batch.
func (a *acks) nextID() string {
	inbox := strings.TrimSuffix(a.prefix, ".")
	return inbox[strings.LastIndexByte(inbox, '.')+1:] + strconv.FormatUint(a.next.Add(1), 36)
}

// add registers an acknowledgement; the caller sends a message with its reply subject and then waits.
func (a *acks) add() *pendingAck {
	token := strconv.FormatUint(a.next.Add(1), 36)
	p := &pendingAck{acks: a, token: token, reply: a.prefix + token, done: make(chan error, 1)}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.pending[token] = p
	if a.sub == nil {
		sub, err := a.nc.Subscribe(a.prefix+"*", a.receive)
		if err != nil {
			delete(a.pending, token)
			p.done <- fromNATS("bus: subscribe to acknowledgements", err)
			return p
		}
		a.sub = sub
		go a.watch(a.nc.StatusChanged())
	}
	return p
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
		lost := slices.Collect(maps.Values(a.pending))
		a.mu.Unlock()
		for _, p := range lost {
			p.resolve(&postrider.Error{
				Code: postrider.Unavailable, Op: "bus: publish", Err: nats.ErrDisconnected,
				Msg: "the connection to NATS was lost before the acknowledgement: it may have been stored",
			})
		}
		if status == nats.CLOSED {
			return
		}
	}
}

func (a *acks) remove(token string) *pendingAck {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.pending[token]
	delete(a.pending, token)
	return p
}

func (a *acks) receive(msg *nats.Msg) {
	if p := a.remove(strings.TrimPrefix(msg.Subject, a.prefix)); p != nil {
		p.done <- parseAck(msg)
	}
}

// resolve ends the wait with a result that did not come from the server.
func (p *pendingAck) resolve(err error) {
	if p.acks.remove(p.token) != nil {
		p.done <- err
	}
}

// wait returns the result. Without an acknowledgement the outcome is open.
func (p *pendingAck) wait() error {
	timer := time.NewTimer(ackTimeout)
	defer timer.Stop()
	select {
	case err := <-p.done:
		return err
	case <-timer.C:
		p.resolve(&postrider.Error{
			Code: postrider.DeadlineExceeded, Op: "bus: publish",
			Msg: fmt.Sprintf("no acknowledgement within %v: it may have been stored", ackTimeout),
		})
		return <-p.done
	}
}

// parseAck reads a publish acknowledgement. The common form is told without a JSON parser.
func parseAck(msg *nats.Msg) error {
	if len(msg.Data) == 0 && msg.Header.Get("Status") == "503" {
		return noStream()
	}
	if bytes.HasPrefix(msg.Data, []byte(`{"stream":`)) && !bytes.Contains(msg.Data, []byte(`"error"`)) {
		return nil
	}
	var ack struct {
		Stream string `json:"stream"`
		Error  *struct {
			Code        int    `json:"code"`
			ErrCode     uint16 `json:"err_code"`
			Description string `json:"description"`
		} `json:"error"`
	}
	if err := json.Unmarshal(msg.Data, &ack); err != nil {
		return postrider.Errorf(postrider.Internal, "bus: publish: the server's acknowledgement cannot be read: %w", err)
	}
	if ack.Error == nil {
		return nil
	}
	err := &postrider.Error{
		Code: apiCode(ack.Error.Code, ack.Error.ErrCode), Op: "bus: publish",
		Msg: ack.Error.Description + " (JetStream error " + strconv.Itoa(int(ack.Error.ErrCode)) + ")",
	}
	if ack.Error.ErrCode == errMessageTooLarge {
		return postrider.Permanent(err)
	}
	return err
}
