package outbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/backoff"
)

// RelayConfig configures a Relay. Only Outbox is required.
type RelayConfig struct {
	// Outbox is whose messages are sent. What is published through it in this process wakes the relay.
	Outbox *Outbox

	// BatchSize is how many messages go to the publisher at once, 1 to 10,000. Two batches are in memory, each of at most
	// 8 MiB or one message. Default 1000.
	BatchSize int

	// PollInterval is the longest wait between two looks at the database when nothing happens; after a message it begins
	// at 2 ms and doubles. It bounds the delay of messages published by other processes. Default 400 ms.
	PollInterval time.Duration

	// Listen, if not nil, is a pool of direct connections to the server, by no pooler: while the relay leads, one of them listens for
	// what writers notify that have neither Go nor NATS, after their commit: notify postrider_outbox, 'the schema'. It may be the
	// relay's own pool. Without it their messages wait for the next poll. Default none.
	Listen *pgxpool.Pool

	// LeaseTTL is how long a relay that died is waited for before another one takes over, beside a PollInterval and the time
	// to connect. One that hangs for two thirds of it, or cannot reach the database for so long, gives up its turn.
	// Default 3 s.
	LeaseTTL time.Duration

	// Retain is how long a message stays in its table at least; when it is sent by then it goes before about twice that, with
	// its whole table, unless a transaction that published beside it is still open. A truncation makes all
	// writers plan their statements anew: below a minute that can be felt. Negative: for ever. Default 5 min.
	Retain time.Duration

	// DrainTimeout bounds how long a publish in flight is waited for when Run's context ends. What it cuts short is
	// published again by the next relay. Default 10 s.
	DrainTimeout time.Duration

	// Metrics is told of every attempt to publish, when it has ended. It must be quick: nothing is sent while it runs. What
	// [Relay.Stats] has is to be asked for. Nil: nobody is told.
	Metrics func(ctx context.Context, a Attempt)

	// Logical lets messages come by logical replication where that can be had, instead of reading the tables. Off by default.
	Logical LogicalConfig

	// Logger is told of changes of state and of messages that go to the dead letters. Nil is silent.
	Logger *slog.Logger
}

func (c RelayConfig) withDefaults() RelayConfig {
	set := func(d *time.Duration, value time.Duration) {
		if *d == 0 {
			*d = value
		}
	}
	set(&c.PollInterval, 400*time.Millisecond)
	set(&c.LeaseTTL, 3*time.Second)
	set(&c.Retain, 5*time.Minute)
	set(&c.DrainTimeout, 10*time.Second)
	c.Logical = c.Logical.withDefaults()
	if c.BatchSize == 0 {
		c.BatchSize = 1000
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

func (c RelayConfig) validate() error {
	switch bad := postrider.InvalidArgument; {
	case c.Outbox == nil:
		return postrider.Errorf(bad, "outbox: RelayConfig.Outbox is nil: want what outbox.New returned")
	case c.BatchSize < 1 || c.BatchSize > 10_000:
		return postrider.Errorf(bad, "outbox: RelayConfig.BatchSize is %d: want 1 to 10,000", c.BatchSize)
	case c.PollInterval < pollMin:
		return postrider.Errorf(bad, "outbox: RelayConfig.PollInterval is %v: want at least %v", c.PollInterval, pollMin)
	case c.LeaseTTL < 100*time.Millisecond:
		return postrider.Errorf(bad, "outbox: RelayConfig.LeaseTTL is %v: want at least 100 ms", c.LeaseTTL)
	case c.Retain > 0 && c.Retain < 100*time.Millisecond:
		return postrider.Errorf(bad, "outbox: RelayConfig.Retain is %v: want at least 100 ms, or a negative value", c.Retain)
	case c.DrainTimeout < 0:
		return postrider.Errorf(bad, "outbox: RelayConfig.DrainTimeout is %v: want a positive duration", c.DrainTimeout)
	default:
		return c.Logical.validate()
	}
}

// Relay sends what is in an outbox. Any number of relays may run for one outbox, in one process or several: one leads,
// the others wait to take over. Its methods are safe for concurrent use.
type Relay struct {
	outbox *Outbox
	pool   *pgxpool.Pool
	pub    postrider.Publisher
	cfg    RelayConfig
	log    *slog.Logger

	feedQueries feedQueries

	leading         atomic.Bool
	search          atomic.Bool // Run begins with the search for what the broker still has
	brief           bool        // Run returns when another relay leads, or there is nothing more to send
	logical         atomic.Bool
	published, died atomic.Uint64
	depth           atomic.Int64
	oldest          atomic.Int64 // Unix nanoseconds by our clock, 0: none

	failure atomic.Pointer[string] // the last one, until it is written
}

// NewRelay returns a relay that sends the messages of cfg.Outbox to pub. While it leads it holds one connection of the
// pool. It does no I/O before Run.
func NewRelay(pool *pgxpool.Pool, pub postrider.Publisher, cfg RelayConfig) (*Relay, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if pool == nil || pub == nil {
		return nil, postrider.Errorf(postrider.InvalidArgument, "outbox: a relay needs the outbox's pool and a publisher to send to, and one of them is nil")
	}
	return &Relay{
		outbox: cfg.Outbox, pool: pool, pub: pub, cfg: cfg,
		log:         cfg.Logger.With("component", "outbox", "schema", cfg.Outbox.cfg.Schema),
		feedQueries: newFeedQueries(cfg.Outbox.cfg.Schema),
	}, nil
}

// Attempt is one try to publish some messages.
type Attempt struct {
	Began time.Time
	Took  time.Duration

	// Sent and Dead count the messages that were accepted and those that were refused for good, Waiting those that are to be
	// tried again.
	Sent, Dead, Waiting int

	// Lag is the age of the oldest message when the attempt ended.
	Lag time.Duration

	// Err is the first reason why messages wait.
	Err error
}

// Stats is what a [Relay] has done and what it sees.
type Stats struct {
	// Leading says that this relay is the one that sends. Depth and Lag are zero where it is not.
	Leading bool

	// Logical says that messages come by logical replication now.
	Logical bool

	// Published and Dead count the messages that this relay has sent and moved to the dead letters.
	Published, Dead uint64

	// Depth is about how many messages wait to be sent. Numbers of rolled-back messages count until the relay has passed
	// them.
	Depth int64

	// Lag is the age of the oldest message that waits to be sent, zero if none does.
	Lag time.Duration
}

// Stats returns the figures as of now, without I/O.
func (r *Relay) Stats() Stats {
	s := Stats{Leading: r.leading.Load(), Logical: r.logical.Load(), Published: r.published.Load(), Dead: r.died.Load()}
	if s.Leading {
		s.Depth = r.depth.Load()
		if at := r.oldest.Load(); at != 0 {
			s.Lag = max(0, time.Since(time.Unix(0, at)))
		}
	}
	return s
}

// retry is how the relay waits for a database or a publisher that is away.
func retry() postrider.RetryPolicy {
	return postrider.RetryPolicy{Attempts: -1, Initial: 50 * time.Millisecond, Max: 2 * time.Second}
}

// Run sends until ctx ends. Then it finishes the batch in flight, writes how far it is, gives the lease back so that another
// relay goes on at once, and returns nil. A database or a publisher that is away is waited for; only an outbox that is
// not migrated or whose sequence was altered is an error, and what [LogicalOn] says.
func (r *Relay) Run(ctx context.Context) error {
	state := "" // the last that was logged, so that each change is logged once
	say := func(level slog.Level, msg string, args ...any) {
		if msg != state {
			state = msg
			r.log.Log(ctx, level, msg, args...)
		}
	}
	defer r.hearPokes(ctx)()
	owner, search := ownerName(), r.search.Swap(false)
	mustFeed := r.cfg.Logical.Mode == LogicalOn
	for attempt := 1; ctx.Err() == nil; attempt++ {
		var t *term
		var err error
		if mustFeed {
			err = r.mayFeed(ctx)
			mustFeed = err != nil
		}
		if err == nil {
			t, err = r.newTerm(ctx, owner, search)
		}
		switch {
		case errors.Is(err, postrider.FailedPrecondition):
			return err
		case err == nil && t == nil:
			if r.brief {
				return nil
			}
			say(slog.LevelInfo, "another relay leads, waiting to take over")
			attempt = 0
			wait(ctx, r.cfg.PollInterval)
		case err == nil:
			level := slog.LevelInfo
			if r.brief {
				level = slog.LevelDebug
			}
			say(level, "relay leads", "fence", t.fence)
			began := time.Now()
			err = t.lead(ctx)
			if search = errors.Is(err, errTailLost); time.Since(began) > r.cfg.LeaseTTL {
				attempt = 1
			}
			if err == nil && r.brief {
				return nil
			}
		}
		if err != nil && ctx.Err() == nil {
			r.fail(err)
			say(slog.LevelWarn, "relay cannot go on, will try again", "error", err)
			_ = backoff.Wait(ctx, retry(), attempt) // when ctx ends, so does the loop
		}
	}
	return nil
}

// ownerName is the name of a Run in the lease: where it is, for operators, and what makes it unique.
func ownerName() string {
	host, _ := os.Hostname()
	return fmt.Sprintf("%s/%d/%s", text(errors.New(host)), os.Getpid(), postrider.NewID())
}

// fail keeps an error for Status.
func (r *Relay) fail(err error) {
	s := text(err)
	r.failure.Store(&s)
}

// maxText bounds what is written of an error, in bytes.
const maxText = 8 << 10

// text is an error as PostgreSQL takes it, whatever is quoted in it.
func text(err error) string {
	s := err.Error()
	return strings.ReplaceAll(strings.ToValidUTF8(s[:min(len(s), maxText)], "?"), "\x00", "?")
}

func wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
