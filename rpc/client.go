package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
)

// ClientConfig configures a [Client]. The zero value is ready to use.
type ClientConfig struct {
	// Source is the CloudEvents source of the requests, a URI reference that names the calling service, for example
	// "//shop/orders". Default: "//client/" and the name of the NATS connection.
	Source string

	// Prefix stands before the subjects of all methods, joined by a dot: a namespace, a tenant. Server and client must
	// have the same. Default: none.
	Prefix string

	// Timeout bounds a call that has no [Timeout] of its own. A deadline of the call's context counts too, the earlier
	// one wins. Default 5 s.
	Timeout time.Duration

	// Middleware wraps every call; the first is the outermost. What it wraps sends the request and returns the reply, which
	// may be that of an error. The deadline counts for both together.
	Middleware []postrider.Middleware

	// Logger is told of replies that cannot be read. Default: silent.
	Logger *slog.Logger
}

func (c ClientConfig) withDefaults(nc *nats.Conn) ClientConfig {
	if c.Source == "" {
		c.Source = "//client/" + url.PathEscape(nc.Opts.Name)
	}
	if c.Timeout == 0 {
		c.Timeout = 5 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

func (c ClientConfig) validate() error {
	if err := checkPrefix("ClientConfig.Prefix", c.Prefix); err != nil {
		return err
	}
	if _, err := url.Parse(c.Source); err != nil {
		return postrider.Errorf(postrider.InvalidArgument, "rpc: ClientConfig.Source must be a URI reference: %w", err)
	}
	if err := checkMiddleware("ClientConfig.Middleware", c.Middleware); err != nil {
		return err
	}
	if c.Timeout < 0 {
		return postrider.Errorf(postrider.InvalidArgument, "rpc: ClientConfig.Timeout is %v: want a positive duration", c.Timeout)
	}
	return nil
}

// sweepInterval is how late a time-out may be noticed. One timer for all calls costs nothing per call.
const sweepInterval = 5 * time.Millisecond

// Client makes calls over one NATS connection, with [Call]. It is safe for concurrent use. The connection stays the
// caller's: several clients, servers and buses may share it, and its handlers are not touched.
type Client struct {
	nc      *nats.Conn
	cfg     ClientConfig
	pending *pending
	replies *nats.Subscription
	buffers sync.Pool // *[]byte, where requests are encoded

	statuses  chan nats.Status
	watching  sync.WaitGroup
	closeOnce sync.Once

	sweepMu   sync.Mutex
	sweeper   *time.Timer
	sweeping  bool // the timer is set
	closed    bool
	lastError error // the last permission violation seen on the connection
}

// NewClient returns a client. The caller closes it when the last call has returned.
func NewClient(nc *nats.Conn, cfg ClientConfig) (*Client, error) {
	if nc == nil {
		return nil, nilConnection()
	}
	cfg = cfg.withDefaults(nc)
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	c := &Client{
		nc: nc, cfg: cfg, pending: newPending(nc.NewInbox()),
		buffers: sync.Pool{New: func() any { return new([]byte) }},
	}
	c.lastError = nc.LastError()
	c.sweeper = time.AfterFunc(math.MaxInt64, c.sweep)

	var err error
	if c.replies, err = nc.Subscribe(c.pending.inbox+".*", c.receive); err != nil {
		return nil, &postrider.Error{Code: postrider.Unavailable, Op: "rpc: subscribe to replies", Err: err}
	}
	// The listener is registered before the first look, so that no change falls in between.
	c.statuses = nc.StatusChanged()
	if !nc.IsConnected() {
		c.pending.close(notConnected(nc), connectionLost())
	}
	c.watching.Go(c.watch)
	return c, nil
}

// Close ends the calls that are still pending and gives back what the client holds on the connection. The connection
// stays open. Calls after Close fail.
func (c *Client) Close() {
	c.closeOnce.Do(func() {
		c.nc.RemoveStatusListener(c.statuses)
		c.watching.Wait()
		_ = c.replies.Unsubscribe() // fails only when the connection is closed, and then there is nothing to give back
		c.pending.close(
			&postrider.Error{Code: postrider.FailedPrecondition, Unprocessed: true, Msg: "the client is closed"},
			&postrider.Error{Code: postrider.Unavailable, Msg: "the client was closed while the call was pending; it may have run"})
		c.sweepMu.Lock()
		defer c.sweepMu.Unlock()
		c.closed = true
		c.sweeper.Stop()
	})
}

// watch ends the pending calls when the connection is lost. NATS itself would leave them to their time-out: it buffers
// what is published meanwhile, and answers to what was published before are lost.
func (c *Client) watch() {
	for status := range c.statuses {
		if status == nats.CONNECTED {
			c.pending.open()
		} else {
			c.pending.close(notConnected(c.nc), connectionLost())
		}
	}
}

func nilConnection() error {
	return postrider.Errorf(postrider.InvalidArgument, "rpc: the connection is nil: want what nats.Connect returned")
}

func checkMiddleware(field string, mw []postrider.Middleware) error {
	for i, m := range mw {
		if m == nil {
			return postrider.Errorf(postrider.InvalidArgument, "rpc: %s[%d] is nil", field, i)
		}
	}
	return nil
}

func notConnected(nc *nats.Conn) *postrider.Error {
	return &postrider.Error{
		Code: postrider.Unavailable, Unprocessed: true, Err: nc.LastError(),
		Msg: "the connection to NATS is down; the request was not sent",
	}
}

func connectionLost() *postrider.Error {
	return &postrider.Error{
		Code: postrider.Unavailable, Err: nats.ErrDisconnected,
		Msg: "the connection to NATS was lost after the request was sent; it may have run",
	}
}

// receive takes what arrives on the reply subjects.
func (c *Client) receive(msg *nats.Msg) {
	if len(msg.Data) == 0 && msg.Header.Get("Status") == "503" {
		c.pending.unserved(msg.Subject)
		return
	}
	if len(msg.Data) == 0 || msg.Data[0] != compactMarker {
		// Not from a server of ours: a stream that captures the method's subject acknowledges requests, for example.
		c.cfg.Logger.Warn("rpc: a reply is not in the compact form", "subject", msg.Subject, "size", len(msg.Data))
		return
	}
	for rest := msg.Data[1:]; len(rest) > 0; {
		number, event, more, err := cutFrame(rest)
		if err != nil {
			c.cfg.Logger.Warn("rpc: a reply cannot be read", "subject", msg.Subject, "error", err)
			return
		}
		rest = more
		if !c.pending.answer(number, event) {
			c.cfg.Logger.Debug("rpc: a reply came late or twice", "subject", msg.Subject)
		}
	}
}

// send publishes one request and waits for its outcome.
func (c *Client) send(ctx context.Context, subject string, m *postrider.Message, expires time.Time) ([]byte, *postrider.Error) {
	left := time.Until(expires)
	if left <= 0 {
		return nil, &postrider.Error{
			Code: postrider.DeadlineExceeded, Unprocessed: true, Err: context.DeadlineExceeded,
			Msg: "the deadline was over before the request was sent",
		}
	}
	if err := m.SetExtension(postrider.ExtDeadline, formatDeadline(left)); err != nil {
		return nil, &postrider.Error{Code: postrider.Internal, Unprocessed: true, Err: err}
	}
	s, first, err := c.pending.begin(subject, expires)
	if err != nil {
		return nil, err
	}
	if first {
		c.startSweeper()
	}
	if err := c.publish(s, m); err != nil {
		if c.pending.abandon(s) {
			return nil, err
		}
		<-s.done // the connection went down meanwhile, and this call with it
		c.pending.release(s)
		return nil, err
	}

	var o outcome
	select {
	case o = <-s.done:
	case <-ctx.Done():
		if c.pending.abandon(s) {
			return nil, &postrider.Error{
				Code: postrider.CodeOf(ctx.Err()), Err: ctx.Err(),
				Msg: "the call's context ended before an answer came; it may have run",
			}
		}
		o = <-s.done
	}
	c.pending.release(s)
	return o.event, o.err
}

func (c *Client) publish(s *slot, m *postrider.Message) *postrider.Error {
	buf := c.buffers.Get().(*[]byte) //nolint:forcetypeassert // the pool holds nothing else
	defer c.buffers.Put(buf)
	*buf = appendFrame(append((*buf)[:0], compactMarker), s.number, m)
	if limit := c.nc.MaxPayload(); int64(len(*buf)) > limit {
		return tooLarge("request", len(*buf), limit, true)
	}
	if err := c.nc.PublishRequest(s.subject, s.reply, *buf); err != nil {
		return &postrider.Error{
			Code: postrider.Unavailable, Unprocessed: true, Err: err,
			Msg: fmt.Sprintf("the request was not sent: %v", err),
		}
	}
	return nil
}

func tooLarge(what string, size int, limit int64, unprocessed bool) *postrider.Error {
	return &postrider.Error{
		Code: postrider.ResourceExhausted, Unprocessed: unprocessed,
		Msg: fmt.Sprintf("the %s takes %d bytes and the NATS server accepts %d (max_payload): send less, or raise the limit",
			what, size, limit),
	}
}

func (c *Client) startSweeper() {
	c.sweepMu.Lock()
	defer c.sweepMu.Unlock()
	if !c.sweeping && !c.closed {
		c.sweeping = true
		c.sweeper.Reset(sweepInterval)
	}
}

// sweep ends the calls whose time is over and those that NATS permissions refused.
func (c *Client) sweep() {
	denied := c.newViolation()
	now := time.Now()
	c.pending.fail(func(s *slot) *postrider.Error {
		if denied != nil && c.denies(denied, s.subject) {
			return &postrider.Error{
				Code: postrider.PermissionDenied, Err: denied,
				Msg: "the permissions of this NATS user do not allow the call: " + denied.Error(),
			}
		}
		if now.After(s.expires) {
			return &postrider.Error{
				Code: postrider.DeadlineExceeded, Err: context.DeadlineExceeded,
				Msg: "no answer before the deadline; it may have run",
			}
		}
		return nil
	})

	c.sweepMu.Lock()
	defer c.sweepMu.Unlock()
	// A call that begins after this look finds sweeping false, or has been seen by it.
	c.sweeping = !c.closed && !c.pending.idle()
	if c.sweeping {
		c.sweeper.Reset(sweepInterval)
	}
}

// newViolation returns a permission violation that the connection reported since the last sweep. NATS answers a denied
// publish with nothing but an asynchronous error; the connection's error handler belongs to the user, but the last error
// can be read. It is a best effort: of two violations within one sweep interval the first is not seen, and its call
// times out.
func (c *Client) newViolation() error {
	err := c.nc.LastError()
	if !errors.Is(err, nats.ErrPermissionViolation) || err == c.lastError { //nolint:errorlint // the same report, not the same kind
		return nil
	}
	c.lastError = err
	return err
}

// denies reports whether a violation is about a method's subject, or about the replies.
func (c *Client) denies(violation error, subject string) bool {
	text := violation.Error()
	return strings.Contains(text, `"`+subject+`"`) || strings.Contains(text, `"`+c.replies.Subject+`"`)
}
