package rpc

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/envelope"
	"github.com/postrider/postrider/postridertest"
)

func TestClientConnectionLost(t *testing.T) {
	t.Parallel()
	srv := postridertest.NewNATS(t)
	serverConn, clientConn := srv.Connect(), srv.Connect()
	g := newGate()
	serve(t, serverConn, ServerConfig{}, reserve.Handler(g.handle))
	c := dial(t, clientConn, ClientConfig{Timeout: time.Hour})

	pending := goCall(c, 1)
	<-g.entered
	srv.Stop()
	_, err := (<-pending).unpack() // an hour would fail the test
	wantError(t, err, postrider.Unavailable, false)

	// What is called meanwhile is not left in a buffer to run when nobody waits for it.
	_, err = Call(t.Context(), c, reserve, &item{SKU: 2})
	wantError(t, err, postrider.Unavailable, true)

	waiting := goCall(c, 3, WaitForReady())
	close(g.open)
	srv.Start()
	if res, err := (<-waiting).unpack(); err != nil || res.ID != "3" {
		t.Errorf("the call that waited for the connection: %v, %v", res, err)
	}
	if sku := <-g.entered; sku != 3 {
		t.Errorf("call %d ran", sku)
	}
}

func (r result) unpack() (*hold, error) { return r.res, r.err }

func TestClientClose(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	g := newGate()
	serve(t, nc, ServerConfig{}, reserve.Handler(g.handle))
	defer close(g.open)
	c := dial(t, nc, ClientConfig{})
	pending := goCall(c, 1)
	<-g.entered
	c.Close()
	c.Close()
	_, err := (<-pending).unpack()
	wantError(t, err, postrider.Unavailable, false)
	_, err = Call(t.Context(), c, reserve, &item{})
	wantError(t, err, postrider.FailedPrecondition, true)
	if !nc.IsConnected() {
		t.Error("the connection was closed with the client")
	}
}

func TestClientConfigIsChecked(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	for _, cfg := range []ClientConfig{{Prefix: "a..b"}, {Prefix: "a.>"}, {Source: "%zz"}, {Timeout: -1}} {
		if _, err := NewClient(nc, cfg); postrider.CodeOf(err) != postrider.InvalidArgument {
			t.Errorf("%+v: error %v, want InvalidArgument", cfg, err)
		}
	}
}

// puppet answers calls as the test tells it to, well or badly.
type puppet struct {
	t    *testing.T
	nc   *nats.Conn
	sub  *nats.Subscription
	msgs chan *nats.Msg
}

func newPuppet(t *testing.T, nc *nats.Conn) *puppet {
	t.Helper()
	p := &puppet{t: t, nc: nc, msgs: make(chan *nats.Msg, 100)}
	var err error
	if p.sub, err = nc.ChanSubscribe("rpc.stock.v1.Reserve", p.msgs); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	return p
}

// reply is a well-formed reply to msg with the given id in it.
func (p *puppet) reply(msg *nats.Msg, id string) []byte {
	p.t.Helper()
	number, event, _, err := cutFrame(msg.Data[1:])
	if err != nil {
		p.t.Fatal(err)
	}
	var req postrider.Message
	if err := envelope.ParseProto(event, &req); err != nil {
		p.t.Fatal(err)
	}
	h := reserve.Handler(func(context.Context, *item) (*hold, error) { return &hold{ID: id}, nil })
	reply, err := h.Handle(p.t.Context(), &req)
	if err != nil {
		p.t.Fatal(err)
	}
	reply.Source = "//puppet"
	return appendFrame([]byte{compactMarker}, number, reply)
}

func (p *puppet) send(subject string, data []byte) {
	p.t.Helper()
	if err := p.nc.Publish(subject, data); err != nil {
		p.t.Fatal(err)
	}
}

// Replies that come late, twice or broken are nobody's outcome, though the slot of the call is used again.
func TestClientStrayReplies(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	p := newPuppet(t, nc)
	c := dial(t, nc, ClientConfig{})

	_, err := Call(t.Context(), c, reserve, &item{}, Timeout(20*time.Millisecond))
	wantError(t, err, postrider.DeadlineExceeded, false)
	late := <-p.msgs

	second := goCall(c, 2)
	msg := <-p.msgs
	if late.Reply == msg.Reply {
		t.Error("the reply subject of a call without an answer is used again")
	}
	p.send(late.Reply, p.reply(late, "late"))
	p.send(msg.Reply, p.reply(late, "late")) // the earlier number on the later subject
	for _, junk := range []string{"", "{}", "\xff", "\xff\x00", "\xff\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff", "\xfe"} {
		p.send(msg.Reply, []byte(junk))
	}
	p.send(msg.Reply, p.reply(msg, "second"))
	p.send(msg.Reply, p.reply(msg, "twice"))
	if res, err := (<-second).unpack(); err != nil || res.ID != "second" {
		t.Fatalf("second call: %v, %v", res, err)
	}

	third := goCall(c, 3)
	again := <-p.msgs
	if again.Reply != msg.Reply {
		t.Error("the reply subject of an answered call is not used again")
	}
	p.send(again.Reply, p.reply(msg, "twice"))
	p.send(again.Reply, p.reply(again, "third"))
	if res, err := (<-third).unpack(); err != nil || res.ID != "third" {
		t.Errorf("third call: %v, %v", res, err)
	}
}

// When the last instance leaves, only the calls that met nobody fail; those that it still answers do not.
func TestClientNobodyServesWhileOthersArePending(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	p := newPuppet(t, nc)
	c := dial(t, nc, ClientConfig{})
	const n = 5
	var served []chan result
	var msgs []*nats.Msg
	for i := range n {
		served = append(served, goCall(c, i))
		msgs = append(msgs, <-p.msgs)
	}
	if err := p.sub.Unsubscribe(); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		_, err := (<-goCall(c, 100+i)).unpack()
		wantError(t, err, postrider.Unavailable, true)
	}
	for i := range n {
		p.send(msgs[i].Reply, p.reply(msgs[i], fmt.Sprint(i)))
		if res, err := (<-served[i]).unpack(); err != nil || res.ID != fmt.Sprint(i) {
			t.Errorf("call %d: %v, %v", i, res, err)
		}
	}
}

func TestClientUnreadableResponse(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	p := newPuppet(t, nc)
	c := dial(t, nc, ClientConfig{})
	for _, data := range []string{"not json", `{"id":`} {
		pending := goCall(c, 1)
		msg := <-p.msgs
		number, _, _, _ := cutFrame(msg.Data[1:])
		p.send(msg.Reply, appendFrame([]byte{compactMarker}, number, &postrider.Message{
			ID: "1", Source: "//puppet", Type: "x", Data: []byte(data),
		}))
		_, err := (<-pending).unpack()
		wantError(t, err, postrider.Internal, false)
		if postrider.Retryable(err) {
			t.Error("the error is retryable")
		}
	}
}

func TestClientManyCallsAtOnce(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	serve(t, nc, ServerConfig{}, reserve.Handler(echo))
	c := dial(t, nc, ClientConfig{Timeout: time.Minute})
	const callers, each = 32, 50
	errs := make(chan error, callers)
	for i := range callers {
		go func() {
			for j := range each {
				sku := i*each + j
				res, err := Call(context.Background(), c, reserve, &item{SKU: sku})
				if err == nil && res.ID != fmt.Sprint(sku) {
					err = fmt.Errorf("call %d got the response %s", sku, res.ID)
				}
				if err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range callers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if n := len(c.pending.slots); n > callers {
		t.Errorf("%d slots for %d calls at once", n, callers)
	}
}

// The first middleware of a client is the outermost; it sees the request before it is sent, and the reply, also that of an error.
func TestClientMiddleware(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	serve(t, nc, ServerConfig{}, reserve.Handler(func(_ context.Context, it *item) (*hold, error) {
		if it.SKU < 0 {
			return nil, postrider.Errorf(postrider.NotFound, "no such thing")
		}
		return &hold{ID: "h-1"}, nil
	}))
	var order []string
	note := func(name string) postrider.Middleware {
		return func(next postrider.HandlerFunc) postrider.HandlerFunc {
			return func(ctx context.Context, m *postrider.Message) (*postrider.Message, error) {
				if _, bounded := ctx.Deadline(); !bounded || m.Type != reserve.Name() || m.Source != "//test" {
					t.Errorf("%s sees %+v, with a deadline: %v", name, m, bounded)
				}
				reply, err := next(ctx, m)
				order = append(order, name+" "+reply.Extension(postrider.ExtErrorCode))
				return reply, err
			}
		}
	}
	c, err := NewClient(nc, ClientConfig{Source: "//test", Middleware: []postrider.Middleware{note("outer"), note("inner")}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if res, err := Call(t.Context(), c, reserve, &item{SKU: 1}); err != nil || res.ID != "h-1" {
		t.Errorf("response is %+v, %v", res, err)
	}
	if _, err := Call(t.Context(), c, reserve, &item{SKU: -1}); !errors.Is(err, postrider.NotFound) {
		t.Errorf("error is %v, want the handler's", err)
	}
	if got := strings.Join(order, ", "); got != "inner , outer , inner NOT_FOUND, outer NOT_FOUND" {
		t.Errorf("order is %q", got)
	}
	silent := func(postrider.HandlerFunc) postrider.HandlerFunc {
		return func(context.Context, *postrider.Message) (*postrider.Message, error) { return nil, nil } //nolint:nilnil // the mistake
	}
	mute, err := NewClient(nc, ClientConfig{Source: "//test", Middleware: []postrider.Middleware{silent}})
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	if _, err := Call(t.Context(), mute, reserve, &item{SKU: 1}); !errors.Is(err, postrider.Internal) {
		t.Errorf("without a reply: %v, want Internal", err)
	}
}
