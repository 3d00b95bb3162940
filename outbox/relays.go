package outbox

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/migrate"
)

// RelaysConfig configures [Relays]. Only Outboxes is required.
type RelaysConfig struct {
	// Outboxes are whose messages are sent, each of a schema of its own in one database. Required.
	Outboxes []*Outbox

	// Connections is how many outboxes are served at once, 1 to 1,000, each with a connection of the pool; one more is used
	// now and then. Default 4.
	Connections int

	// Relay is how each outbox is served. Leave Outbox empty.
	Relay RelayConfig
}

// Relays sends what is in many outboxes of one database, such as the schemas of tenants. Other than as many of [Relay] it
// has a connection and the lease of an outbox only while there is something to send: all that rest are looked at with one
// statement in each PollInterval. Any number of Relays may run, in one process or several; they share the
// outboxes as the work comes. Where there is more to do than Connections, outboxes take turns of two seconds. The guarantees are
// those of Relay, which one of the outboxes may have beside it. Its methods are safe for concurrent use.
//
// The tables of an outbox that rests are not truncated before there is work again. That the broker has lost something of it
// (see [Tailer]) is noticed every five seconds.
type Relays struct {
	pool    *pgxpool.Pool
	log     *slog.Logger
	poll    time.Duration
	news    string     // the statement
	loss    *lossWatch // nil: the publisher cannot tell what the broker has
	members []*member
	slots   chan struct{}
	look    chan struct{} // soon
}

type member struct {
	relay *Relay
	due   chan struct{}
}

// turn is how long an outbox is served before another one may be, rest how long there must be nothing more for it.
const (
	turn = 2 * time.Second
	rest = 100 * time.Millisecond
)

// NewRelays returns relays that send the messages of cfg.Outboxes to pub. It does no I/O before Run.
func NewRelays(pool *pgxpool.Pool, pub postrider.Publisher, cfg RelaysConfig) (*Relays, error) {
	if cfg.Connections == 0 {
		cfg.Connections = 4
	}
	bad := postrider.InvalidArgument
	switch {
	case len(cfg.Outboxes) == 0:
		return nil, postrider.Errorf(bad, "outbox: RelaysConfig.Outboxes is empty: want what outbox.New returned")
	case cfg.Connections < 1 || cfg.Connections > 1000:
		return nil, postrider.Errorf(bad, "outbox: RelaysConfig.Connections is %d: want 1 to 1,000", cfg.Connections)
	case cfg.Relay.Outbox != nil:
		return nil, postrider.Errorf(bad, "outbox: RelaysConfig.Relay.Outbox is set: name it in Outboxes")
	case cfg.Relay.Logical.Mode != LogicalOff:
		return nil, postrider.Errorf(bad, "outbox: RelaysConfig.Relay.Logical is set: an outbox that rests has no connection to be told by")
	}
	s := &Relays{pool: pool, slots: make(chan struct{}, cfg.Connections), look: make(chan struct{}, 1)}
	var news, tails []string
	seen := map[string]bool{}
	for i, o := range cfg.Outboxes {
		one := cfg.Relay
		one.Outbox = o
		r, err := NewRelay(pool, pub, one)
		if err != nil {
			return nil, fmt.Errorf("outbox: RelaysConfig.Outboxes[%d]: %w", i, err)
		}
		if seen[o.cfg.Schema] {
			return nil, postrider.Errorf(bad, "outbox: RelaysConfig.Outboxes[%d]: schema %s is there twice", i, o.cfg.Schema)
		}
		seen[o.cfg.Schema] = true
		schema, err := migrate.Quote(o.cfg.Schema)
		if err != nil { // New has checked it
			return nil, err
		}
		r.brief = true
		s.poll, s.log = r.cfg.PollInterval, r.cfg.Logger
		s.members = append(s.members, &member{r, make(chan struct{}, 1)})
		number := func(sql string) string { return strings.Replace(migrate.In(schema, sql), "$1", strconv.Itoa(i), 1) }
		news, tails = append(news, number(outboxNews)), append(tails, number(outboxTails))
	}
	s.news = strings.Join(news, " union all ")
	if tailer, ok := pub.(Tailer); ok {
		s.loss = &lossWatch{pub: tailer, sql: strings.Join(tails, " union all ") + " order by at desc"}
	}
	return s, nil
}

// outboxNews says if there is something to send in an outbox that nobody serves, as [cursor.begin] does: number $1. It reads
// a sequence and a row.
const outboxNews = `
	select $1 from :"schema".postrider_outbox_relay as r, :"schema".postrider_outbox_seq as s
	where paused_at is null
		and expires not between clock_timestamp() and clock_timestamp() + make_interval(secs => ttl)
		and (s.last_value - (not s.is_called)::int > floor or cur is not null
			or exists (select from pg_snapshot_xip(prev) as x where pg_visible_in_snapshot(x, pg_current_snapshot())))`

// Stats returns the figures of one of the outboxes as of now, without I/O.
func (s *Relays) Stats(o *Outbox) Stats {
	for _, m := range s.members {
		if m.relay.outbox == o {
			return m.relay.Stats()
		}
	}
	return Stats{}
}

// Run sends until ctx ends, as [Relay.Run] does. An outbox that is not migrated is an error, which ends it.
func (s *Relays) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, m := range s.members {
		wg.Go(func() {
			if err := s.serve(ctx, m); err != nil {
				cancel(err)
			}
		})
	}
	if s.loss != nil {
		wg.Go(func() { s.watchTails(ctx, s.loss) })
	}
	for ctx.Err() == nil {
		switch err := s.lookForNews(ctx); {
		case hasState(err, undefinedTable, undefinedSchema):
			cancel(postrider.Errorf(postrider.FailedPrecondition, "outbox: call outbox.Migrate first: %w", err))
		case err != nil && ctx.Err() == nil:
			s.log.WarnContext(ctx, "cannot look for messages, will try again", "component", "outbox", "error", err)
		}
		next := time.NewTimer(s.poll)
		select {
		case <-ctx.Done():
		case <-next.C:
		case <-s.look:
		}
		next.Stop()
	}
	wg.Wait()
	if err := context.Cause(ctx); ctx.Err() != err { //nolint:errorlint // a cause of our own, or none
		return err
	}
	return nil
}

// lookForNews asks in one statement which outboxes have something that nobody sends.
func (s *Relays) lookForNews(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, max(10*s.poll, 5*time.Second))
	defer cancel()
	rows, err := s.pool.Query(ctx, s.news)
	if err != nil {
		return err
	}
	found, err := pgx.CollectRows(rows, pgx.RowTo[int])
	if err != nil {
		return err
	}
	for _, i := range found {
		poke(s.members[i].due)
	}
	return nil
}

// serve has turns of one outbox, whenever there is a reason.
func (s *Relays) serve(ctx context.Context, m *member) error {
	o := m.relay.outbox
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.due:
		case <-o.wake:
		case <-o.committed:
		}
		select {
		case <-ctx.Done():
			return nil
		case s.slots <- struct{}{}:
		}
		limited, cancel := context.WithTimeout(ctx, turn)
		err := m.relay.Run(limited)
		cancel()
		<-s.slots
		if err != nil {
			return err
		}
		poke(s.look) // there may be more, of this one too
	}
}
