package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
)

// ServerConfig configures a [Server]. The zero value is ready to use.
type ServerConfig struct {
	// Source is the CloudEvents source of the replies, a URI reference. Default: "//" and the name of the service.
	Source string

	// Prefix stands before the subjects of all methods, joined by a dot: a namespace, a tenant. Server and client must
	// have the same. Default: none.
	Prefix string

	// Queue is the queue group: of all servers in it that serve a method one gets a call. Default "q", as in the NATS
	// micro protocol.
	Queue string

	// Version of the service as discovery shows it, a semantic version. Default "0.0.0".
	Version string

	// MaxConcurrent is how many handlers run at once. Default 64.
	MaxConcurrent int

	// QueueSize is how many calls wait when all handlers are busy; calls beyond are refused as busy. Negative: none
	// waits. Default 1024.
	QueueSize int

	// DrainTimeout is how long Run waits at its end for calls that were accepted; then their contexts are cancelled.
	// Negative: as long as they take. Default 30 s.
	DrainTimeout time.Duration

	// Middleware wraps all handlers, the first given is the outermost. [postrider.Stack] makes the usual one.
	Middleware []postrider.Middleware

	// Logger is told of handlers that fail as Internal and of replies that cannot be sent. Default: silent.
	Logger *slog.Logger
}

func (c ServerConfig) withDefaults() ServerConfig {
	if c.Queue == "" {
		c.Queue = "q"
	}
	if c.Version == "" {
		c.Version = "0.0.0"
	}
	if c.MaxConcurrent == 0 {
		c.MaxConcurrent = 64
	}
	if c.QueueSize == 0 {
		c.QueueSize = 1024
	}
	c.QueueSize = max(c.QueueSize, 0)
	if c.DrainTimeout == 0 {
		c.DrainTimeout = 30 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

func (c ServerConfig) validate() error {
	if err := checkPrefix("ServerConfig.Prefix", c.Prefix); err != nil {
		return err
	}
	if c.MaxConcurrent < 0 {
		return postrider.Errorf(postrider.InvalidArgument, "rpc: ServerConfig.MaxConcurrent is %d: want at least 1", c.MaxConcurrent)
	}
	if strings.ContainsAny(c.Queue, " \t\r\n") {
		return postrider.Errorf(postrider.InvalidArgument, "rpc: ServerConfig.Queue is %q: want no spaces", c.Queue)
	}
	if err := checkMiddleware("ServerConfig.Middleware", c.Middleware); err != nil {
		return err
	}
	if _, err := url.Parse(c.Source); err != nil {
		return postrider.Errorf(postrider.InvalidArgument, "rpc: ServerConfig.Source must be a URI reference: %w", err)
	}
	return nil
}

// Server answers calls over one NATS connection. Register before Run. Its methods are safe for concurrent use.
type Server struct {
	nc      *nats.Conn
	cfg     ServerConfig
	id      string
	buffers sync.Pool // *[]byte, where replies are encoded

	mu      sync.Mutex
	methods []*method
	started time.Time // zero until Run
}

// method is a handler with its address and its figures.
type method struct {
	handler       postrider.Handler
	service, name string // "stock.v1", "Reserve"
	subject       string
	source        string
	stats         stats
}

// NewServer returns a server that serves nothing yet. The connection stays the caller's and must outlive Run.
func NewServer(nc *nats.Conn, cfg ServerConfig) (*Server, error) {
	if nc == nil {
		return nil, nilConnection()
	}
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	return &Server{
		nc: nc, cfg: cfg, id: postrider.NewID(),
		buffers: sync.Pool{New: func() any { return new([]byte) }},
	}, nil
}

// Register adds the handlers of methods. One of a topic is InvalidArgument, a second one for the same method
// AlreadyExists, and one that comes after Run FailedPrecondition; then none of hs is added.
func (s *Server) Register(hs ...postrider.Handler) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.started.IsZero() {
		return postrider.Errorf(postrider.FailedPrecondition, "rpc: the server runs already: register before Run")
	}
	methods := s.methods
	for _, h := range hs {
		if !h.IsCall() {
			return postrider.Errorf(postrider.InvalidArgument,
				"rpc: handler %q is not one of a method: make it with Method.Handler", h.Name())
		}
		for _, m := range methods {
			if m.handler.Name() == h.Name() {
				return postrider.Errorf(postrider.AlreadyExists, "rpc: method %s has a handler already", h.Name())
			}
		}
		service, name, _ := strings.Cut(h.Name(), "/")
		m := &method{
			handler: h.With(s.cfg.Middleware...), service: service, name: name,
			subject: subjectOf(s.cfg.Prefix, h.Name()), source: s.cfg.Source,
		}
		if m.source == "" {
			m.source = "//" + service
		}
		methods = append(methods, m)
	}
	s.methods = methods
	return nil
}

// Run serves the registered methods until ctx ends. Then it takes no new calls, finishes those that arrived, sends their
// replies and returns nil. The contexts of handlers end with the deadlines of their calls and at DrainTimeout, not with
// ctx; a handler that ignores its context holds Run. Run may be called once. An error means that the connection is
// closed or that NATS permissions do not let the server subscribe.
func (s *Server) Run(ctx context.Context) error {
	s.mu.Lock()
	again := !s.started.IsZero()
	if !again {
		s.started = time.Now()
	}
	s.mu.Unlock()
	if again {
		return postrider.Errorf(postrider.FailedPrecondition, "rpc: the server runs already or ran: make a new one")
	}

	// The one context of all handlers: it has the values of ctx and ends when draining takes too long.
	work, abort := context.WithCancel(context.WithoutCancel(ctx))
	defer abort()
	closed := s.nc.StatusChanged(nats.CLOSED)
	defer s.nc.RemoveStatusListener(closed)

	p := newPool(s.cfg.MaxConcurrent, s.cfg.QueueSize, func(c *inbound) { s.handle(work, c) })
	subs, err := s.subscribe(ctx, p)
	if err == nil {
		select {
		case <-ctx.Done():
		case <-closed:
			err = &postrider.Error{Code: postrider.Unavailable, Op: "rpc: serve", Err: nats.ErrConnectionClosed}
		}
	}
	if s.cfg.DrainTimeout > 0 {
		timer := time.AfterFunc(s.cfg.DrainTimeout, abort)
		defer timer.Stop()
	}
	subs.drain(work)
	p.drain()
	return errors.Join(err, s.flush(work, err))
}

// flush makes sure that the replies have left this process.
func (s *Server) flush(ctx context.Context, failed error) error {
	if failed != nil || s.nc.IsClosed() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
	defer cancel()
	if err := s.nc.FlushWithContext(ctx); err != nil {
		return &postrider.Error{Code: postrider.Unavailable, Op: "rpc: flush replies", Err: err}
	}
	return nil
}

// flushTimeout bounds the wait for one round trip to the NATS server.
const flushTimeout = 5 * time.Second

// subscribe subscribes to methods and discovery. What it returns must be drained also when it fails.
func (s *Server) subscribe(ctx context.Context, p *pool) (*subscriptions, error) {
	subs := &subscriptions{closed: make(chan struct{}, len(s.methods)*(1+discoverySubjects))}
	before := s.nc.LastError()
	for _, m := range s.methods {
		err := subs.add(s.nc.QueueSubscribe(m.subject, s.cfg.Queue, func(msg *nats.Msg) { s.receive(p, m, msg) }))
		if err != nil {
			return subs, &postrider.Error{Code: postrider.Unavailable, Op: "rpc: subscribe to " + m.subject, Err: err}
		}
	}
	if err := s.announce(subs); err != nil {
		return subs, err
	}
	ctx, cancel := context.WithTimeout(ctx, flushTimeout)
	defer cancel()
	if err := s.nc.FlushWithContext(ctx); err != nil {
		s.cfg.Logger.Warn("rpc: NATS does not answer yet; the server serves once it does", "error", err)
	}
	// NATS tells of a denied subscription before it answers the flush. The error handler is the user's, so we look here.
	if err := s.nc.LastError(); errors.Is(err, nats.ErrPermissionViolation) && err != before { //nolint:errorlint // the same report
		for _, m := range s.methods {
			if strings.Contains(err.Error(), `"`+m.subject+`"`) {
				return subs, &postrider.Error{Code: postrider.PermissionDenied, Op: "rpc: subscribe to " + m.subject, Err: err}
			}
		}
	}
	return subs, nil
}

// subscriptions are drained together.
type subscriptions struct {
	subs   []*nats.Subscription
	closed chan struct{} // one for each subscription that has handed over all it got
}

func (s *subscriptions) add(sub *nats.Subscription, err error) error {
	if err != nil {
		return err
	}
	sub.SetClosedHandler(func(string) { s.closed <- struct{}{} })
	s.subs = append(s.subs, sub)
	return nil
}

// drain takes no new messages and waits until those that arrived have been handed over, or ctx ends.
func (s *subscriptions) drain(ctx context.Context) {
	draining := 0
	for _, sub := range s.subs {
		if sub.Drain() == nil { // else the connection is closed, and the subscription with it
			draining++
		}
	}
	for range draining {
		select {
		case <-s.closed:
		case <-ctx.Done():
			for _, sub := range s.subs {
				_ = sub.Unsubscribe()
			}
			return
		}
	}
}

// receive takes a request and admits it or refuses it. It runs on the goroutine of the subscription and does not block.
func (s *Server) receive(p *pool, m *method, msg *nats.Msg) {
	err := parseRequest(m, msg, time.Now(), func(c *inbound) {
		refused := c.refused
		if refused == nil {
			refused = p.submit(c)
		}
		if refused != nil {
			s.refuse(c, refused)
		}
	})
	if err != nil { // a frame without a number that could be answered
		c := newInbound(m, formBare, msg.Reply, time.Now())
		c.request.ID, c.request.Type = postrider.NewID(), m.handler.Name()
		s.refuse(c, postrider.Errorf(postrider.InvalidArgument, "%w", err))
	}
}

// refuse answers a call that does not run.
func (s *Server) refuse(c *inbound, why error) {
	c.method.stats.record(0, why)
	s.reply(c, postrider.ErrorReply(c.request, why))
}

// handle runs the handler of an admitted call and answers it.
func (s *Server) handle(ctx context.Context, c *inbound) {
	if why := c.late(ctx); why != nil {
		s.refuse(c, why)
		return
	}
	if !c.expires.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, c.expires)
		defer cancel()
	}
	start := time.Now()
	reply, err := c.method.handler.Handle(ctx, c.request)
	c.method.stats.record(time.Since(start), err)
	if err != nil {
		err = notOurs(err)
		if postrider.CodeOf(err) == postrider.Internal {
			s.cfg.Logger.Error("rpc: handler failed", "method", c.method.handler.Name(), "id", c.request.ID, "error", err)
		}
		reply = postrider.ErrorReply(c.request, err)
	}
	s.reply(c, reply)
}

// notOurs takes Unprocessed from an error that the handler got from a call of its own: that call did not run, this one did.
func notOurs(err error) error {
	var e *postrider.Error
	if errors.As(err, &e) && e.Unprocessed && strings.HasPrefix(e.Op, opCall) {
		ran := *e
		ran.Unprocessed, ran.Err = false, err
		return &ran
	}
	return err
}

// late returns why an admitted call is not run after all.
func (c *inbound) late(ctx context.Context) error {
	if ctx.Err() != nil {
		return &postrider.Error{
			Code: postrider.Unavailable, Unprocessed: true, Msg: "the server is shutting down and did not get to the call",
		}
	}
	if !c.expires.IsZero() && !time.Now().Before(c.expires) {
		return &postrider.Error{
			Code: postrider.DeadlineExceeded, Unprocessed: true,
			Msg: fmt.Sprintf("the call expired after %v in the server's queue and did not run", time.Since(c.arrived).Round(time.Millisecond)),
		}
	}
	return nil
}
