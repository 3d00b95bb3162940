package outbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
)

// The cursor is written at most this often, or after so many messages: each write leaves a dead version of its row, which
// a long transaction elsewhere makes expensive. What a crash repeats for it are duplicates by id.
const (
	writeInterval = 100 * time.Millisecond
	writeMessages = 10_000
)

var errLeaseLost = errors.New("outbox: the lease was not renewed in time, or another relay has it")

// term is one time of leading, from taking the lease to losing it or giving it back. The lease is a row and times are
// the database's, so it works through a pooler; the fence, which counts the terms, makes writes of an earlier
// leader void (Gray and Cheriton 1989 for the lease, Kleppmann 2016 for the token). By our own clock the lease ends a third early,
// and with it the term's context.
//
// A term has one connection. What it has read but not written is true only while the server lives: after a crash
// PostgreSQL may hand out xids again that nobody wrote to disk. So a lost connection ends the term, as does a start time
// of the server that changed behind a pooler, and the next term begins with the cursor as written.
//
// All fields belong to the goroutine of lead.
type term struct {
	r     *Relay
	conn  *pgxpool.Conn
	owner string
	fence int64

	ctx    context.Context // the lease
	cancel context.CancelCauseFunc
	expiry *time.Timer // cancels ctx

	identity string    // of the outbox
	started  time.Time // the server's start
	period   float64   // seconds, of the ring

	pages    chan page // to the sender
	results  chan result
	inFlight int // pages handed out and not settled
	limit    int // of the next page

	reading cursor        // with what is in flight
	done    cursor        // without
	highest int64         // number last read from the sequence ...
	floor   int64         // ... and before the cursor write that committed last
	settled int64         // numbers up to here are done, or were open
	skew    time.Duration // our clock less the server's
	behind  int64         // page.since of the last page in flight
	paused  bool          // nothing more is to be read
	busy    time.Time     // when there was something to do

	written   time.Time // when the cursor was
	unwritten int       // messages done since
	noted     uint64    // of Relay.published, what is written
	rate      float64   // messages a second, as written
	ringSeen  time.Time // when the ring was looked at
	ringError string    // the last one, to log it once

	kept *kept      // what need not be sent again
	tail *tailWatch // nil: the publisher cannot tell what the broker has

	feeding feeding // logical replication

	direct   *direct
	throttle throttle
	account  account
	early    map[int64]*postrider.Message // what went directly and was not read since
}

// newTerm takes the lease. It returns nil if another relay has it. With search it looks first for what the broker still has.
func (r *Relay) newTerm(ctx context.Context, owner string, search bool) (*term, error) {
	acquireCtx, cancel := context.WithTimeout(ctx, r.cfg.LeaseTTL)
	defer cancel()
	conn, err := r.pool.Acquire(acquireCtx)
	if err != nil {
		return nil, fmt.Errorf("outbox: connect: %w", err)
	}
	t, err := r.takeLease(ctx, conn, owner, search, nil)
	if t == nil {
		conn.Release()
	}
	return t, err
}

func (r *Relay) takeLease(ctx context.Context, conn *pgxpool.Conn, owner string, search bool, k *kept) (*term, error) {
	begun := time.Now()
	queryCtx, cancel := context.WithTimeout(ctx, r.cfg.LeaseTTL)
	defer cancel()

	t := &term{
		r: r, conn: conn, owner: owner, limit: r.cfg.BatchSize, pages: make(chan page, readAhead), results: make(chan result, readAhead),
		direct: &direct{came: make(chan struct{}, 1)}, early: map[int64]*postrider.Message{},
	}
	var s stored
	var home bool
	err := conn.QueryRow(queryCtx, r.outbox.q.acquire, owner, r.cfg.LeaseTTL.Seconds()).Scan(
		&t.fence, &t.identity, &t.period, &home, &t.started, &s.prev, &s.cur, &s.last, &s.floor, &s.floors)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, nil
	case hasState(err, undefinedTable, undefinedSchema):
		return nil, postrider.Errorf(postrider.FailedPrecondition, "outbox: schema %s has no outbox: call outbox.Migrate first", r.outbox.cfg.Schema)
	case hasState(err, readOnly):
		return nil, postrider.Errorf(postrider.Unavailable, "outbox: take lease: %s: %w", readOnlyHint, err)
	case err != nil:
		return nil, fmt.Errorf("outbox: take lease: %w", err)
	}
	if err := r.checkSequence(queryCtx, conn); err != nil {
		return nil, err
	}
	if !home {
		if err := t.adopt(ctx); err != nil {
			return nil, err
		}
		return r.takeLease(ctx, conn, owner, false, nil)
	}
	if tailer, ok := r.pub.(Tailer); ok {
		tails, moved, back, err := t.goBack(queryCtx, tailer, s, search)
		if err != nil {
			return nil, err
		}
		if moved {
			return r.takeLease(ctx, conn, owner, false, back)
		}
		if t.kept = k; k != nil { // else what is not sent again might be lost unseen
			maps.Copy(tails, k.tails)
		}
		t.tail = newTailWatch(tailer, r.log, tails)
	}
	if t.done, err = s.load(); err != nil {
		return nil, fmt.Errorf("outbox: read cursor: %w", err)
	}
	t.reading, t.floor, t.settled, t.noted = t.done, t.done.floor, t.done.floor, r.published.Load()
	t.account.settle(t.done.solid())
	t.busy = begun
	t.written = begun.Add(-writeInterval) // the first page is written down at once: terms may be short
	t.ctx, t.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	t.expiry = time.AfterFunc(t.left(begun), func() { t.cancel(errLeaseLost) })
	return t, nil
}

// left is how long a lease that was asked for at some time may still be used.
func (t *term) left(asked time.Time) time.Duration {
	return time.Until(asked.Add(t.r.cfg.LeaseTTL * 2 / 3))
}

// checkSequence makes sure that numbers are drawn in order. With a cache sessions hand out numbers drawn earlier.
func (r *Relay) checkSequence(ctx context.Context, conn *pgxpool.Conn) error {
	var cache int64
	sequence := pgx.Identifier{r.outbox.cfg.Schema, "postrider_outbox_seq"}.Sanitize()
	if err := conn.QueryRow(ctx, r.outbox.q.sequence, sequence).Scan(&cache); err != nil {
		return fmt.Errorf("outbox: check sequence: %w", err)
	}
	if cache != 1 {
		return postrider.Errorf(postrider.FailedPrecondition,
			"outbox: sequence %s has a cache of %d, which loses messages: ALTER SEQUENCE %[1]s CACHE 1", sequence, cache)
	}
	return nil
}

// adopt takes over an outbox that was restored into another cluster, where the xids of its rows and cursor mean
// nothing. What is in the ring is sent again; the ids tell that.
func (t *term) adopt(ctx context.Context) error {
	t.r.log.WarnContext(ctx, "the outbox comes from another database cluster: all that it retains is sent again")
	err := pgx.BeginTxFunc(ctx, t.conn, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, t.r.outbox.q.adopt, pgx.QueryExecModeSimpleProtocol); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, t.r.outbox.q.dropMarks, 0); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, t.r.outbox.q.adoptCursor, t.fence, t.owner)
		if err == nil && tag.RowsAffected() == 0 {
			err = errLeaseLost
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("outbox: adopt rows of another cluster: %w", err)
	}
	return nil
}

// writeIfDue writes the cursor when there is something new, and the lease in any case when a third of it is over. A
// number above the floor counts as new even if nothing was sent: the rows may have been rolled back, and only a write
// lets the floor rise above them.
func (t *term) writeIfDue() error {
	since := time.Since(t.written)
	news := t.unwritten > 0 || t.inFlight == 0 && t.highest > t.floor
	if news && (since >= writeInterval || t.unwritten >= writeMessages) || since >= t.r.cfg.LeaseTTL/3 {
		return t.write(t.ctx, false)
	}
	return nil
}

// write writes the cursor and renews the lease, or gives it back.
func (t *term) write(ctx context.Context, release bool) error {
	s := t.done.store()
	floors, err := json.Marshal(s.floors)
	if err != nil { // numbers: cannot happen
		return err
	}
	var ttl *float64
	if seconds := t.r.cfg.LeaseTTL.Seconds(); !release {
		ttl = &seconds
	}
	asked, published, failure := time.Now(), t.r.published.Load(), t.r.failure.Load()
	rate := smooth(t.rate, published-t.noted, asked.Sub(t.written))
	var highest int64
	err = t.conn.QueryRow(ctx, t.r.outbox.q.write, t.fence, t.owner, ttl, s.prev, s.cur, s.last, s.floor, string(floors),
		int64(published-t.noted), rate, failure).Scan(&highest, &t.paused)
	if errors.Is(err, pgx.ErrNoRows) {
		return errLeaseLost
	}
	if err != nil {
		return fmt.Errorf("outbox: write cursor: %w", err)
	}
	// The order matters: highest was read after this write took its xid, so it is good for the next one only.
	t.floor, t.highest = t.highest, max(t.highest, highest)
	t.written, t.unwritten, t.noted, t.rate = asked, 0, published, rate
	t.r.failure.CompareAndSwap(failure, nil)
	t.measure()
	t.expiry.Reset(t.left(asked))
	return nil
}

// smooth returns the rate of messages a second after n more in some time: a mean that forgets in about ten seconds.
func smooth(rate float64, n uint64, in time.Duration) float64 {
	if in <= 0 {
		return rate
	}
	return rate + (float64(n)/in.Seconds()-rate)*(1-math.Exp(-in.Seconds()/10))
}

// The SQLSTATEs that mean something to the relay.
const (
	duplicateObject = "42710"
	undefinedTable  = "42P01"
	undefinedSchema = "3F000"
	lockUnavailable = "55P03"
	noRight         = "42501"
	readOnly        = "25006"
)

// hasState reports whether err came from PostgreSQL with one of these SQLSTATEs.
func hasState(err error, states ...string) bool {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return false
	}
	return slices.Contains(states, pg.Code)
}
