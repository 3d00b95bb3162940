package bus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/backoff"
)

// Config configures a [Bus]. Only Source is required.
type Config struct {
	// Source is the CloudEvents source of what this service publishes, a URI reference: "//shop/orders". Required.
	Source string

	// Group is the group of subscriptions that name none, by custom the service's name. Without it every subscription
	// of an event needs [Group].
	Group string

	// Streams are declared before the first use: see [Stream]. Declare every stream that this service publishes to.
	Streams []Stream

	// DeadLetters is the stream that keeps the messages which could not be handled, and the log of what was done with
	// them. It is declared by a bus that subscribes, with topics of its own: leave Topics empty. Name is by default
	// "DEAD_LETTERS"; MaxAge is zero by default, so that a letter stays until somebody has acted on it. All that share
	// the stream must agree on it.
	DeadLetters Stream

	// Prefix stands before every subject, so that systems can share a server: "staging" makes orders.placed.v1 go to
	// staging.orders.placed.v1. Default none.
	Prefix string

	// Mode is how events are written. Readers take all modes, always. Default [Binary].
	Mode Mode

	// AllowDuplicates publishes without Nats-Msg-Id: the server does not look for duplicates, which costs it as much as all
	// other headers together, and memory for each id. Publish then tries again only what provably was not stored; a message
	// whose acknowledgement was lost fails with an error that says so, and whoever publishes it again may store it twice.
	// For groups that tell duplicates themselves by source and id (package idempotency). Not for an outbox relay whose
	// groups do not.
	AllowDuplicates bool

	// RequireDurable makes Run and Publish fail with FailedPrecondition unless it is proved that an acknowledged message
	// outlives a power cut: see [Bus.Durability]. A server that is away, or does not answer while others do, is waited for.
	RequireDurable bool

	// Monitors are the monitoring addresses of the servers, one for each, for example "http://nats-1:8222". They are asked
	// for the sync setting where the account may not ask the servers themselves: see [Bus.Durability]. Default none.
	Monitors []string

	// PublishTimeout bounds a publish, all its attempts together; the context's deadline does so too. Default 10 s.
	PublishTimeout time.Duration

	// DrainTimeout is how long Run waits for handlers at its end before it cancels their contexts. Default 30 s.
	DrainTimeout time.Duration

	// Middleware wraps every handler; the first is the outermost. [postrider.Stack] makes the usual one.
	Middleware []postrider.Middleware

	// Logger takes what an operator must know. Nil is silent.
	Logger *slog.Logger
}

func (c Config) withDefaults() Config {
	c.DeadLetters.Name = cmp.Or(c.DeadLetters.Name, "DEAD_LETTERS")
	c.PublishTimeout = cmp.Or(c.PublishTimeout, 10*time.Second)
	c.DrainTimeout = cmp.Or(c.DrainTimeout, 30*time.Second)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

func (c Config) validate() error {
	bad := func(field, format string, args ...any) error {
		return postrider.Errorf(postrider.InvalidArgument, "bus: Config.%s %s", field, fmt.Sprintf(format, args...))
	}
	if c.Source == "" {
		return bad("Source", "is required: a URI reference that names this service, for example //shop/orders")
	}
	if _, err := url.Parse(c.Source); err != nil {
		return bad("Source", "must be a URI reference: %v", err)
	}
	for token := range strings.SplitSeq(c.Prefix, ".") {
		if c.Prefix != "" && !isToken(token) {
			return bad("Prefix", "is %q: want tokens of letters, digits, - and _, joined by dots", c.Prefix)
		}
	}
	if c.Group != "" && !isToken(c.Group) {
		return bad("Group", "is %q: want letters, digits, - and _", c.Group)
	}
	if c.Mode < Binary || c.Mode > JSON {
		return bad("Mode", "is %d: want Binary, Compact or JSON", c.Mode)
	}
	for i, s := range c.Streams {
		if !isToken(s.Name) {
			return bad(fmt.Sprintf("Streams[%d].Name", i), "is %q: want letters, digits, - and _", s.Name)
		}
		if len(s.Topics) == 0 {
			return bad(fmt.Sprintf("Streams[%d].Topics", i), "is empty: name what stream %s takes", s.Name)
		}
		for _, topic := range s.Topics {
			if !isTopicFilter(topic) {
				return bad(fmt.Sprintf("Streams[%d].Topics", i), "has %q: want tokens joined by dots, \"*\" for any one, \">\" at the end for all that follow", topic)
			}
		}
		if s.Partitions < 0 || s.Partitions > maxPartitions {
			return bad(fmt.Sprintf("Streams[%d].Partitions", i), "is %d: want 1 to %d, or 0 for none", s.Partitions, maxPartitions)
		}
	}
	for i, m := range c.Monitors {
		if u, err := url.Parse(m); err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
			return bad(fmt.Sprintf("Monitors[%d]", i), "is %q: want the address of a server's monitoring port, http://host:8222", m)
		}
	}
	if i := slices.IndexFunc(c.Middleware, func(m postrider.Middleware) bool { return m == nil }); i >= 0 {
		return bad(fmt.Sprintf("Middleware[%d]", i), "is nil")
	}
	if !isToken(c.DeadLetters.Name) {
		return bad("DeadLetters.Name", "is %q: want letters, digits, - and _", c.DeadLetters.Name)
	}
	if len(c.DeadLetters.Topics) > 0 {
		return bad("DeadLetters.Topics", "is %v: the bus sets it", c.DeadLetters.Topics)
	}
	if c.DeadLetters.Partitions != 0 {
		return bad("DeadLetters.Partitions", "is %d: dead letters have no order", c.DeadLetters.Partitions)
	}
	if c.PublishTimeout < 0 || c.DrainTimeout < 0 {
		return bad("PublishTimeout and DrainTimeout", "must not be negative")
	}
	return nil
}

// isToken says if s can be one token of a subject and the name of a stream or consumer.
func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_'
	})
}

// isTopicFilter says if s can stand in Stream.Topics: tokens as NATS takes them, with wildcards.
func isTopicFilter(s string) bool {
	tokens := strings.Split(s, ".")
	for i, t := range tokens {
		switch {
		case t == "*", t == ">" && i == len(tokens)-1:
		case t == "", strings.ContainsAny(t, "*> \t\r\n"):
			return false
		}
	}
	return true
}

// Bus publishes events to JetStream and hands them to handlers. It is a [postrider.Publisher] and a [postrider.Runner],
// safe for concurrent use.
type Bus struct {
	nc  *nats.Conn
	js  jetstream.JetStream
	cfg Config
	log *slog.Logger
	pub *publisher

	entries sync.Pool // of *entry
	proof   *proof

	declaring   sync.Mutex
	declared    atomic.Bool
	ownDeclared atomic.Bool
	warned      sync.Map // names of streams

	mu      sync.Mutex
	subs    []*subscription
	asyncs  map[*Async]struct{} // at work, or with failures that nobody has seen
	running bool
	started chan struct{}

	stats counters
}

type counters struct {
	published, handled, filtered, retried, deadLettered, parked atomic.Int64
}

// Stats counts what a [Bus] has done since it was made.
type Stats struct {
	Published    int64 // messages that a stream acknowledged, duplicates included
	Handled      int64 // messages whose handler succeeded, or refused a command
	Filtered     int64 // messages that a [Filter] did not want
	Retried      int64 // failed attempts that are tried again
	DeadLettered int64 // messages moved to the dead letters
	Parked       int64 // messages moved to their parked key
}

// New makes a bus on a connection, which stays the caller's: the bus neither closes it nor sets its handlers. New
// starts nothing. The error is InvalidArgument and names the field.
func New(nc *nats.Conn, cfg Config) (*Bus, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if nc == nil {
		return nil, postrider.Errorf(postrider.InvalidArgument, "bus: the connection is nil: want what nats.Connect returned")
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, fromNATS("bus: new", err)
	}
	b := &Bus{nc: nc, js: js, cfg: cfg, log: cfg.Logger.With("component", "bus"), started: make(chan struct{}), asyncs: map[*Async]struct{}{}}
	b.pub = newPublisher(nc, js)
	b.pub.timeout = min(b.pub.timeout, cfg.PublishTimeout)
	b.proof = newProof(nc, cfg.Monitors)
	if cfg.RequireDurable {
		b.pub.admit = b.proof.admit
	}
	return b, nil
}

// Stats returns the counters.
func (b *Bus) Stats() Stats {
	return Stats{
		Published: b.stats.published.Load(), Handled: b.stats.handled.Load(), Filtered: b.stats.filtered.Load(),
		Retried: b.stats.retried.Load(), DeadLettered: b.stats.deadLettered.Load(), Parked: b.stats.parked.Load(),
	}
}

// Started returns a channel that is closed once [Bus.Run] has streams and consumers in place: what is published from then
// on is not missed by a new group.
func (b *Bus) Started() <-chan struct{} { return b.started }

// Run declares the streams, starts the subscriptions and blocks. When ctx ends it takes no new messages, gives back at
// once those that were fetched and not started, waits for running handlers, and returns nil. Publishing goes on to work
// after Run has returned, as long as the connection is open. Run waits for a server that is away; it fails when the
// server refuses a stream or a consumer, when handlers outlive DrainTimeout, when an [Async] could not publish, and when the
// connection is closed: connect with nats.MaxReconnects(-1), or nats.go gives up after some two minutes without a server.
func (b *Bus) Run(ctx context.Context) error {
	b.mu.Lock()
	if b.running {
		b.mu.Unlock()
		return postrider.Errorf(postrider.FailedPrecondition, "bus: Run was called twice")
	}
	b.running = true
	subs := slices.Clone(b.subs)
	for _, s := range b.subs {
		subs = append(subs, s.redelivery())
	}
	if len(subs)+len(b.cfg.Streams) > 0 {
		subs = append(subs, b.forwarder())
	}
	b.mu.Unlock()
	return errors.Join(b.run(ctx, subs), b.flush(ctx))
}

func (b *Bus) run(ctx context.Context, subs []*subscription) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	closed := b.nc.StatusChanged(nats.CLOSED)
	defer b.nc.RemoveStatusListener(closed)
	if b.nc.IsClosed() {
		return connectionClosed()
	}
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-closed:
			stop(connectionClosed())
		case <-ctx.Done():
		}
	})
	err := b.serve(ctx, subs)
	stop(nil)
	watch.Wait()
	if cause := context.Cause(ctx); errors.Is(cause, nats.ErrConnectionClosed) {
		err = errors.Join(cause, err)
	}
	return err
}

func connectionClosed() error {
	return &postrider.Error{
		Code: postrider.Unavailable, Op: "bus: run", Err: nats.ErrConnectionClosed,
		Msg: "the connection to NATS is closed: connect with nats.MaxReconnects(-1) so that it outlives a server that is away, and close it after Run",
	}
}

func (b *Bus) serve(ctx context.Context, subs []*subscription) error {
	if err := b.start(ctx, subs); err != nil || ctx.Err() != nil {
		return err
	}
	close(b.started)
	errs := make([]error, len(subs))
	var wg sync.WaitGroup
	for i, s := range subs {
		wg.Go(func() { errs[i] = s.run(ctx) })
	}
	wg.Wait()
	<-ctx.Done() // a bus without subscriptions lives as long as the others
	return errors.Join(errs...)
}

// startRetry spaces the attempts to reach a server that is not there yet.
var startRetry = postrider.RetryPolicy{Attempts: -1, Initial: 100 * time.Millisecond, Max: 2 * time.Second} //nolint:gochecknoglobals // constant

// start makes streams and consumers exist. It waits for a server that is away, until ctx ends.
func (b *Bus) start(ctx context.Context, subs []*subscription) error {
	for attempt := 1; ctx.Err() == nil; attempt++ {
		err := b.bind(ctx, subs)
		if err == nil || !postrider.Retryable(err) {
			return err
		}
		if ctx.Err() == nil {
			b.log.Warn("cannot start yet", "error", err)
		}
		_ = backoff.Wait(ctx, startRetry, attempt) // when ctx ends, so does the loop
	}
	return nil
}

func (b *Bus) bind(ctx context.Context, subs []*subscription) error {
	if err := b.declare(ctx); err != nil {
		return err
	}
	if len(subs) > 0 {
		if err := b.declareDeadLetters(ctx); err != nil {
			return err
		}
		if err := b.declareOwn(ctx); err != nil {
			return err
		}
	}
	for _, s := range subs {
		if err := s.bind(ctx); err != nil {
			return err
		}
	}
	return b.proveDurable(ctx)
}

func (b *Bus) subject(topic string) string {
	if b.cfg.Prefix == "" {
		return topic
	}
	return b.cfg.Prefix + "." + topic
}

// topic is the opposite of subject, for the subject that a message came from, which may be that of a partition.
func (b *Bus) topic(subject string) string {
	subject = withoutPartition(subject)
	if b.cfg.Prefix == "" {
		return subject
	}
	return strings.TrimPrefix(subject, b.cfg.Prefix+".")
}

// fromNATS gives an error of the client library a code and says what was being done.
func fromNATS(op string, err error) error {
	if err == nil {
		return nil
	}
	if _, own := errors.AsType[*postrider.Error](err); own {
		return err
	}
	e := &postrider.Error{Code: postrider.Internal, Op: op, Err: err}
	var api *jetstream.APIError
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, nats.ErrTimeout):
		e.Code = postrider.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		e.Code = postrider.Canceled
	case errors.Is(err, nats.ErrConnectionClosed), errors.Is(err, nats.ErrConnectionReconnecting),
		errors.Is(err, nats.ErrDisconnected), errors.Is(err, nats.ErrNoResponders), errors.Is(err, nats.ErrConnectionDraining),
		errors.Is(err, nats.ErrNoServers):
		e.Code = postrider.Unavailable
	case errors.Is(err, nats.ErrPermissionViolation):
		e.Code = postrider.PermissionDenied
	case errors.As(err, &api):
		e.Code = apiCode(api.Code, uint16(api.ErrorCode))
	}
	return e
}

// Error numbers of the JetStream API (nats-server: server/errors.json) that mean something to the bus.
const (
	errNoResources      = 10047
	errInvalidStream    = 10052
	errMessageTooLarge  = 10054
	errWrongSequence    = 10071
	errNoReplicas       = 10074
	errStreamFull       = 10077
	errWrongSequenceNow = 10164
	errBadSchedule      = 10189
	errBadTimeZone      = 10223
)

// apiCode classifies an error of the JetStream API: code is HTTP-like, errCode is its own number.
func apiCode(code int, errCode uint16) postrider.Code {
	switch errCode {
	case errMessageTooLarge, errStreamFull:
		return postrider.ResourceExhausted
	case errWrongSequence, errWrongSequenceNow:
		return postrider.Aborted
	case errBadSchedule, errBadTimeZone:
		return postrider.InvalidArgument
	case errInvalidStream, errNoReplicas: // what the server does not do, with code 500
		return postrider.FailedPrecondition
	}
	switch {
	case code == 404:
		return postrider.NotFound
	case code == 429, code >= 500:
		return postrider.Unavailable
	default:
		return postrider.FailedPrecondition
	}
}
