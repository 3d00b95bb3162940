package outbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
)

// Status is how an outbox is doing, by what is in the database.
type Status struct {
	// Depth is how many committed messages wait to be sent: exact up to 10,000 but for a few that a relay at work is about to
	// pass, above that it is counted by numbers, those of rolled-back messages included. After a crash of the relay it has
	// those that will be sent again.
	Depth int64

	// Oldest is the age of the oldest message that waits, zero if none does.
	Oldest time.Duration

	// Rate is how many messages a second were sent, over about the last ten seconds. Zero if no relay leads.
	Rate float64

	// Sent counts the messages sent since the outbox was made; those of the last second of a relay that crashed are missing.
	Sent int64

	// Dead is how many messages are in the dead letters.
	Dead int64

	// Leader is the relay that sends, as host/process/id, "" if there is none. LeaseLeft is how long another one waits for it
	// if it is never heard of again. Fence counts the times that a relay took the lead.
	Leader    string
	LeaseLeft time.Duration
	Fence     int64

	// LastError is the last failure that the relay could tell of, and FailedAt when that was: it may be over.
	LastError string
	FailedAt  time.Time

	// Paused says who has paused the outbox, nil if nobody has.
	Paused *Pause

	// Ring is the size of the three tables with their indexes, in bytes.
	Ring [3]int64
}

// Pause is what [Outbox.Pause] did.
type Pause struct {
	By, Why string
	Since   time.Time
}

// Status reads how the outbox is doing, whoever runs its relay: one round trip, of a few milliseconds even behind a long
// outage. The pool is one on the outbox's database. What the relay of this process knows without I/O tells [Relay.Stats].
func (o *Outbox) Status(ctx context.Context, pool *pgxpool.Pool) (Status, error) {
	var s Status
	var oldest, left float64
	var failed, paused *time.Time
	var by, why string
	var ring []int64
	batch := &pgx.Batch{}
	batch.Queue(o.q.plan)
	batch.Queue(o.q.status).QueryRow(func(row pgx.Row) error {
		return row.Scan(&s.Depth, &oldest, &s.Rate, &s.Sent, &s.Dead, &s.Leader, &s.Fence, &left,
			&s.LastError, &failed, &paused, &by, &why, &ring)
	})
	if err := pool.SendBatch(ctx, batch).Close(); err != nil {
		return Status{}, o.unusable("read status", err)
	}
	s.Oldest, s.LeaseLeft = seconds(oldest), seconds(left)
	if failed != nil {
		s.FailedAt = *failed
	}
	if paused != nil {
		s.Paused = &Pause{By: by, Why: why, Since: *paused}
	}
	copy(s.Ring[:], ring)
	return s, nil
}

func seconds(s float64) time.Duration { return max(0, time.Duration(s*float64(time.Second))) }

// Action says who does something to an outbox and why. Both are kept in the table postrider_outbox_log.
type Action struct {
	By  string // who does it. Required
	Why string // Required
}

func (a Action) validate(op string) error {
	for _, f := range [...]struct{ name, text string }{{"By", a.By}, {"Why", a.Why}} {
		if f.text == "" || f.text != text(errors.New(f.text)) {
			return postrider.Errorf(postrider.InvalidArgument,
				"outbox: %s: Action.%s has %d bytes: want 1 to %d of UTF-8 text", op, f.name, len(f.text), maxText)
		}
	}
	return nil
}

// Pause makes all relays of the outbox stop sending, those that start later included, until [Outbox.Resume]. Messages go
// on to be published into the outbox and wait there. The relay that leads stops with its next look at the database, after
// RelayConfig.PollInterval at most; what it is sending by then is finished. An outbox that is paused already keeps the time since
// when it is.
func (o *Outbox) Pause(ctx context.Context, pool *pgxpool.Pool, a Action) error {
	if err := a.validate("pause"); err != nil {
		return err
	}
	if _, err := pool.Exec(ctx, o.q.pause, a.By, a.Why); err != nil {
		return o.unusable("pause", err)
	}
	return nil
}

// Resume ends a [Outbox.Pause]. It is no error if there is none.
func (o *Outbox) Resume(ctx context.Context, pool *pgxpool.Pool, a Action) error {
	if err := a.validate("resume"); err != nil {
		return err
	}
	if _, err := pool.Exec(ctx, o.q.resume, a.By, a.Why); err != nil {
		return o.unusable("resume", err)
	}
	return nil
}

// unusable explains an error of a statement: where there are no tables it is FailedPrecondition.
func (o *Outbox) unusable(op string, err error) error {
	if hasState(err, undefinedTable, undefinedSchema) {
		return postrider.Errorf(postrider.FailedPrecondition, "outbox: %s: schema %s has no outbox: call outbox.Migrate first", op, o.cfg.Schema)
	}
	if _, ok := errors.AsType[*postrider.Error](err); ok {
		return fmt.Errorf("outbox: %s: %w", op, err)
	}
	code := postrider.Unavailable
	if c := postrider.CodeOf(err); c != postrider.Unknown { // that of the context
		code = c
	}
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok {
		code = classOf(pg.Code)
	}
	return &postrider.Error{Code: code, Op: "outbox: " + op, Err: err}
}
