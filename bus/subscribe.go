package bus

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// SubscribeOption sets how one subscription is served.
type SubscribeOption func(*subscribeConfig)

// Position is where a group that did not exist before begins in the stream.
type Position int

// Positions.
const (
	// DeliverNew begins with the messages that are published from now on: the default for events, so that a new service never
	// handles the past by surprise.
	DeliverNew Position = iota + 1

	// DeliverAll begins with the oldest message that the stream has: the default for commands, which are meant for this
	// service whenever it starts.
	DeliverAll

	fromSequence
	fromTime
)

type subscribeConfig struct {
	group       string
	concurrency int
	retry       postrider.RetryPolicy
	ackWait     time.Duration
	from        Position
	sequence    uint64    // with fromSequence
	since       time.Time // with fromTime
	ordered     bool
	broadcast   bool

	parkFailures bool

	breakerLimit int
	breakerPause time.Duration
	rate         float64

	batch      int // 0: the handler takes one at a time
	batchWait  time.Duration
	batchGiven bool

	prefetch      int // 0: by the time that handlers take
	prefetchBytes int

	filter func(m *postrider.Message) bool // nil: everything is wanted
}

// Group names the group: each message goes to one member of each group, and the group keeps its place in the stream
// while no member runs. By custom it is the service's name. Default [Config.Group].
func Group(name string) SubscribeOption { return func(c *subscribeConfig) { c.group = name } }

// Concurrency is how many messages this process handles at once, or [Batch]es, 1 to 10,000. Default 16 messages, or one
// batch.
func Concurrency(n int) SubscribeOption { return func(c *subscribeConfig) { c.concurrency = n } }

// Retry sets the policy for failed attempts. A delay is kept by the server, so that it blocks nobody and outlives this
// process. Default: the zero [postrider.RetryPolicy].
func Retry(p postrider.RetryPolicy) SubscribeOption { return func(c *subscribeConfig) { c.retry = p } }

// AckWait is how long a message stays with a process that shows no sign of life; then another one gets it. Handlers may
// take longer: the bus signals for as long as they run. At least 1 s. Default 10 s.
func AckWait(d time.Duration) SubscribeOption { return func(c *subscribeConfig) { c.ackWait = d } }

// From says where a new group begins. A group that exists goes on where it was. Default [DeliverNew] for events,
// [DeliverAll] for commands.
func From(p Position) SubscribeOption { return func(c *subscribeConfig) { c.from = p } }

// FromSequence has a new group begin with a sequence number of the stream.
func FromSequence(seq uint64) SubscribeOption {
	return func(c *subscribeConfig) { c.from, c.sequence = fromSequence, seq }
}

// FromTime has a new group begin with the first message that was stored at t or later.
func FromTime(t time.Time) SubscribeOption {
	return func(c *subscribeConfig) { c.from, c.since = fromTime, t }
}

// Broadcast has every instance handle every message, instead of one instance of the group: to drop a cache, to follow a
// stream. It begins where [From] says, with new messages unless told otherwise, each time that [Bus.Run] starts; while it
// runs it misses nothing, and when it ends its place is forgotten. Retries and dead letters are as always.
func Broadcast() SubscribeOption { return func(c *subscribeConfig) { c.broadcast = true } }

// Ordered has messages with the same partition key ([postrider.KeyBy]) handled one at a time, in the order of the stream;
// other keys run beside them, up to [Concurrency]. A failed attempt keeps its key waiting, and no other, until it succeeds or
// the message is in the dead letters, or, with [postrider.Park], for as long as it takes: see [Bus.Parked].
//
// The instances of the group share the keys, if the stream has partitions ([Stream].Partitions) and the topic does not end
// in ">"; otherwise one instance is active. When one stops, others take over its keys at once, when it dies, within about
// three seconds, and when one comes, it gets its part as the others finish what they have begun. After a take-over, or
// a broken connection, messages that were handled before may come again, in order and with older ones first: wrap the
// handler with package idempotency. An instance that was stopped for a while may finish what it had begun beside its
// successor: where that matters, have what the handler writes to refuse a smaller Delivery.Fence than it has seen.
func Ordered() SubscribeOption { return func(c *subscribeConfig) { c.ordered = true } }

// ParkFailures has a subscription that is [Ordered] park the key of whatever message would go to the dead letters, as if its
// handler had returned [postrider.Park]: for what must never be handled without what came before it. What cannot be
// decoded counts, and what has expired; a refused command whose asker gets the answer does not. A message without a key goes to
// the dead letters.
func ParkFailures() SubscribeOption { return func(c *subscribeConfig) { c.parkFailures = true } }

// CircuitBreaker pauses the group, in all its instances, for a while after so many attempts in a row have failed in this one
// with errors that may pass: when what the handler needs is down, trying on burns the attempts of message after message.
// When the pause is over one message is tried; if it fails the group is paused again. Default: no circuit breaker.
func CircuitBreaker(failures int, pause time.Duration) SubscribeOption {
	return func(c *subscribeConfig) { c.breakerLimit, c.breakerPause = failures, pause }
}

// RateLimit bounds how many messages a second this process begins to handle, evenly spaced, retries included; each instance
// has a limit of its own. Default: none.
func RateLimit(perSecond float64) SubscribeOption {
	return func(c *subscribeConfig) { c.rate = perSecond }
}

// readOptions fills in the defaults and checks what the options of a subscription say.
func readOptions(h postrider.Handler, group string, opts []SubscribeOption) (subscribeConfig, error) {
	c := subscribeConfig{group: group}
	for i, opt := range opts {
		if opt == nil {
			return c, postrider.Errorf(postrider.InvalidArgument, "bus: subscribe %s: option %d is nil", h.Name(), i+1)
		}
		opt(&c)
	}
	if h.IsBatch() {
		c.concurrency = cmp.Or(c.concurrency, 1)
	}
	c.concurrency = cmp.Or(c.concurrency, 16)
	c.ackWait = cmp.Or(c.ackWait, 10*time.Second)
	if c.from == 0 {
		c.from = DeliverNew
		if h.IsCall() {
			c.from = DeliverAll
		}
	}
	bad := func(format string, args ...any) (subscribeConfig, error) {
		return c, postrider.Errorf(postrider.InvalidArgument, "bus: subscribe "+h.Name()+": "+format, args...)
	}
	switch {
	case h.Topic() == "":
		return c, postrider.Errorf(postrider.InvalidArgument, "bus: subscribe: the Handler is the zero value: make it with Topic.Handler or Method.Handler")
	case checkPartitions(h.Topic()) != nil:
		return bad("%w", checkPartitions(h.Topic()))
	case !isToken(c.group):
		return bad("group %q: want letters, digits, - and _: set Config.Group or the option Group", c.group)
	case c.concurrency < 1 || c.concurrency > 10_000:
		return bad("Concurrency is %d: want 1 to 10,000", c.concurrency)
	case c.ackWait < time.Second:
		return bad("AckWait is %v: want at least 1s", c.ackWait)
	case c.from < DeliverNew || c.from > fromTime:
		return bad("From is %d: want DeliverNew or DeliverAll", c.from)
	case c.breakerLimit < 0 || c.breakerPause < 0 || (c.breakerLimit == 0) != (c.breakerPause == 0):
		return bad("CircuitBreaker is %d failures and %v: want both positive", c.breakerLimit, c.breakerPause)
	case c.rate < 0 || c.rate > 1e6:
		return bad("RateLimit is %v: want 0 to 1,000,000 a second", c.rate)
	case c.parkFailures && !c.ordered:
		return bad("ParkFailures is for Ordered subscriptions: the others have no order to keep")
	case c.ordered && c.broadcast:
		return bad("Ordered and Broadcast exclude each other: one instance is active, or all are")
	}
	if err := errors.Join(c.retry.Validate(), c.checkBatch(h), c.checkPrefetch()); err != nil {
		return bad("%w", err)
	}
	return c, nil
}

// Subscribe has h handle the messages of its topic, from [Bus.Run] on. Events come to one member of each group. The
// handler of a [postrider.Method] gets the commands sent to it, and its reply goes to the topic that the command asks
// for. Errors: InvalidArgument for an option out of range, AlreadyExists for a second handler of the same topic and
// group, FailedPrecondition once Run was called.
func (b *Bus) Subscribe(h postrider.Handler, opts ...SubscribeOption) error {
	c, err := readOptions(h, b.cfg.Group, opts)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.running {
		return postrider.Errorf(postrider.FailedPrecondition, "bus: subscribe %s: Run was called already: subscribe before it", h.Name())
	}
	for _, s := range b.subs {
		if s.cfg.group == c.group && s.handler.Topic() == h.Topic() {
			return postrider.Errorf(postrider.AlreadyExists,
				"bus: subscribe %s: group %s has a handler for this topic already", h.Name(), c.group)
		}
	}
	s := &subscription{
		bus: b, cfg: c, handler: h.With(b.cfg.Middleware...), subject: b.subject(h.Topic()),
		durable: durableName(c.group, h.Topic()), slots: make(chan struct{}, c.concurrency),
	}
	if c.broadcast {
		s.durable += "-" + postrider.NewID()
	}
	if c.rate > 0 {
		s.pacer = &pacer{interval: time.Duration(float64(time.Second) / c.rate)}
	}
	if c.breakerLimit > 0 {
		s.breaker = newBreaker(c.breakerLimit, c.breakerPause)
	}
	s.log = b.log.With("group", c.group, "topic", h.Topic())
	b.subs = append(b.subs, s)
	return nil
}

// maxAckPending is how many messages of a group may be on their way or wait for a retry, in all its instances.
const maxAckPending = 20_000

// bind finds the stream of the topic and makes the durable consumer exist, or that of each partition. It is repeated when
// the consumer is lost.
func (s *subscription) bind(ctx context.Context) error {
	b, op := s.bus, "bus: subscribe "+s.handler.Name()
	name, err := b.js.StreamNameBySubject(ctx, s.subject)
	if err != nil {
		if e := fromNATS(op, err); postrider.CodeOf(e) != postrider.NotFound {
			return e
		}
		return &postrider.Error{
			Code: postrider.FailedPrecondition, Op: op, Err: err,
			Msg: "no stream takes " + s.subject + ": declare one in bus.Config.Streams",
		}
	}
	stream, err := b.js.Stream(ctx, name)
	if err != nil {
		return fromNATS(op, err)
	}
	b.warn(stream.CachedInfo().Config)
	if s.stream != name { // workers read it
		s.stream = name
	}
	if s.cfg.ordered && s.parkedStream == nil {
		if s.parkedStream, err = b.parkedStream(ctx); err != nil {
			return err
		}
	}
	n := partitions(stream.CachedInfo().Config)
	if s.partition != "" || n == 0 {
		return s.bindConsumer(ctx, stream, n)
	}
	if !s.cfg.ordered || strings.HasSuffix(s.subject, ">") { // which cannot be filtered by partition
		if err := s.undivided(ctx, stream); err != nil {
			return err
		}
		return s.bindConsumer(ctx, stream, n)
	}
	s.shares = n
	for p := n - 1; p >= 0; p-- { // the group's own is the last to change: the others begin where it is
		if err := s.share(p).bindConsumer(ctx, stream, n); err != nil {
			return err
		}
	}
	return nil
}

// bindConsumer makes a consumer exist in a stream with n partitions.
func (s *subscription) bindConsumer(ctx context.Context, stream jetstream.Stream, n int) error {
	cfg := jetstream.ConsumerConfig{
		Durable:       s.durable,
		FilterSubject: s.subject,
		DeliverPolicy: jetstream.DeliverNewPolicy,
		AckPolicy:     jetstream.AckExplicitPolicy,
		AckWait:       s.cfg.ackWait,
		MaxDeliver:    -1, // attempts are counted here: the server would drop the message
		MaxAckPending: maxAckPending,
		MaxWaiting:    512,
	}
	if n > 0 {
		cfg.FilterSubject, cfg.FilterSubjects = "", s.filters()
	}
	if s.cfg.ordered {
		cfg.PriorityPolicy, cfg.PriorityGroups, cfg.PinnedTTL = jetstream.PriorityPolicyPinned, []string{ownerGroup}, ownerTTL
	}
	switch s.cfg.from {
	case DeliverAll:
		cfg.DeliverPolicy = jetstream.DeliverAllPolicy
	case fromSequence:
		cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, s.cfg.sequence
	case fromTime:
		cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, &s.cfg.since
	case DeliverNew:
	}
	if s.cfg.broadcast {
		cfg.Name, cfg.Durable, cfg.InactiveThreshold = s.durable, "", broadcastMemory
		s.mu.Lock()
		if s.lastSequence > 0 { // the consumer was lost
			cfg.DeliverPolicy, cfg.OptStartSeq, cfg.OptStartTime = jetstream.DeliverByStartSequencePolicy, s.lastSequence+1, nil
		}
		s.mu.Unlock()
	}
	op := "bus: subscribe " + s.handler.Name() + ": consumer " + s.durable + " of stream " + s.stream
	have, err := stream.Consumer(ctx, s.durable)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		return fromNATS(op, s.begin(ctx, stream, cfg))
	}
	if err != nil {
		return fromNATS(op, err)
	}
	began := have.CachedInfo().Config // that cannot be changed, nor needs to be
	if other := otherFilters(began, append(s.filters(), s.subject)); other != "" {
		return postrider.Errorf(postrider.FailedPrecondition,
			"%s: it is there for another topic, %s: rename the group or the topic, for names that differ in dots, - and _ alone make the same consumer", op, other)
	}
	cfg.DeliverPolicy, cfg.OptStartSeq, cfg.OptStartTime = began.DeliverPolicy, began.OptStartSeq, began.OptStartTime
	_, err = stream.UpdateConsumer(ctx, cfg)
	return fromNATS(op, err)
}

// otherFilters returns what a consumer that exists is for, if it is for none of our subjects: to change it would take its
// messages from the group that it belongs to.
func otherFilters(have jetstream.ConsumerConfig, ours []string) string {
	theirs := have.FilterSubjects
	if have.FilterSubject != "" {
		theirs = append(theirs, have.FilterSubject)
	}
	for _, subject := range theirs {
		if slices.Contains(ours, subject) {
			return ""
		}
	}
	return strings.Join(theirs, ", ")
}

// begin creates a consumer. One for a part of a group that was not divided before begins where the group is.
func (s *subscription) begin(ctx context.Context, stream jetstream.Stream, cfg jetstream.ConsumerConfig) error {
	group, err := s.groupConsumer(ctx, stream)
	switch {
	case err == nil:
		cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartSequencePolicy, nil
		cfg.OptStartSeq = group.CachedInfo().AckFloor.Stream + 1
	case errors.Is(err, jetstream.ErrConsumerNotFound):
		s.log.Info("new group", "stream", s.stream, "durable", s.durable, "from", s.cfg.from.String())
	default:
		return err
	}
	_, err = stream.CreateOrUpdateConsumer(ctx, cfg)
	return err
}

// broadcastMemory is how long the server keeps the place of an instance of a broadcast that is away.
const broadcastMemory = 5 * time.Minute

// Pause stops the delivery of a topic to a group, in all its instances, until a time or [Bus.Resume]. Messages wait in the
// stream; those that an instance has already are handled. The server keeps the pause over restarts. Errors: NotFound when
// the group has no such subscription, or no [Bus.Run] has begun it yet.
func (b *Bus) Pause(ctx context.Context, group, topic string, until time.Time) error {
	return b.pause(ctx, "bus: pause ", group, topic, until)
}

// Resume ends a pause. It does nothing to a group that is not paused.
func (b *Bus) Resume(ctx context.Context, group, topic string) error {
	return b.pause(ctx, "bus: resume ", group, topic, time.Time{})
}

func (b *Bus) pause(ctx context.Context, op, group, topic string, until time.Time) error {
	op += topic + " of group " + group
	for _, subject := range [...]string{b.subject(topic), b.groupSubject(group, topic)} { // of all, and of the group alone
		stream, err := b.js.StreamNameBySubject(ctx, subject)
		if err != nil {
			return fromNATS(op, err)
		}
		err = b.pauseConsumers(ctx, stream, durableName(group, topic), until)
		if errors.Is(err, jetstream.ErrConsumerNotFound) {
			return &postrider.Error{Code: postrider.NotFound, Op: op, Msg: "the group has no subscription to this topic", Err: err}
		}
		if err != nil {
			return fromNATS(op, err)
		}
	}
	return nil
}

// pauseConsumers pauses a consumer, and with it those of all partitions if there are any.
func (b *Bus) pauseConsumers(ctx context.Context, name, durable string, until time.Time) error {
	stream, err := b.js.Stream(ctx, name)
	if err != nil {
		return err
	}
	for p := range max(1, partitions(stream.CachedInfo().Config)) {
		_, err := stream.PauseConsumer(ctx, shareName(durable, p), until)
		if p > 0 && errors.Is(err, jetstream.ErrConsumerNotFound) {
			return nil // not divided
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// durableName is the name of a group's consumer. Such names have neither dots nor wildcards.
func durableName(group, topic string) string {
	return group + "-" + strings.ReplaceAll(withoutWildcards(topic), ".", "_")
}

func withoutWildcards(topic string) string {
	return strings.NewReplacer("*", "=any", ">", "=rest").Replace(topic)
}

// String says where a group begins.
func (p Position) String() string {
	switch p {
	case DeliverAll:
		return "all"
	case fromSequence:
		return "sequence"
	case fromTime:
		return "time"
	default:
		return "new"
	}
}
