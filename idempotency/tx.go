package idempotency

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
)

const (
	// rollbackTimeout bounds the roll-back when the handler's context has ended; then the connection is closed instead.
	rollbackTimeout = 5 * time.Second

	// busyDelay is what a copy waits whose twin is being handled. It is not short: the twin does the work, and each try
	// counts as an attempt.
	busyDelay = 5 * time.Second

	// briefLock is how long parts of a batch wait that has already waited for a copy of one of its messages.
	briefLock = 20 * time.Millisecond
)

// SQLSTATEs, see PostgreSQL's appendix A.
const (
	undefinedTable   = "42P01"
	invalidSchema    = "3F000"
	checkViolation   = "23514" // a row that no partition takes
	lockNotAvailable = "55P03"
)

func sqlState(err error) string {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		return e.Code
	}
	return ""
}

// tx is the transaction that a handler gets. The store commits it, not the handler.
type tx struct {
	pgx.Tx
	conn   *pgxpool.Conn
	misuse error // what a handler did that must not be committed
}

// begin opens a transaction and sends what claim queues in the same flight. The caller ends it.
func (s *Store) begin(ctx context.Context, claim func(*pgx.Batch)) (*tx, error) {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	var b pgx.Batch
	// Not the session's default: in REPEATABLE READ the claim would fail where here it sees the other copy's row.
	b.BeginTx(pgx.TxOptions{IsoLevel: pgx.ReadCommitted})
	claim(&b)
	results := conn.SendBatch(ctx, &b)
	t := &tx{Tx: results.Tx(), conn: conn}
	if err := results.Close(); err != nil {
		s.end(ctx, t)
		return nil, err
	}
	return t, nil
}

// commit sends what finish queues, if it is not nil, and COMMIT in one flight. It is the end of n messages.
func (s *Store) commit(ctx context.Context, t *tx, n int, finish func(*pgx.Batch)) error {
	if t.misuse != nil {
		return t.misuse
	}
	switch t.conn.Conn().PgConn().TxStatus() {
	case 'I':
		return postrider.Errorf(postrider.Internal, "the handler ended its transaction: it must return nil or an error instead")
	case 'E':
		return postrider.Errorf(postrider.Internal, "the handler returned nil after a statement failed: it must return the error")
	}
	var err error
	if finish == nil {
		err = t.Tx.Commit(ctx)
	} else {
		var b pgx.Batch
		finish(&b)
		b.Queue("commit")
		err = t.conn.SendBatch(ctx, &b).Close()
	}
	if err != nil {
		return err
	}
	s.handled.Add(int64(n))
	return nil
}

// end rolls back what was not committed and returns the connection to the pool. It is deferred, so that a handler's panic
// rolls back as well.
func (s *Store) end(ctx context.Context, t *tx) {
	if t.conn.Conn().PgConn().TxStatus() != 'I' {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
		defer cancel()
		_ = t.Tx.Rollback(ctx) // if it fails it closes the connection, and the server rolls back
	}
	t.Tx = s.closed
	t.conn.Release()
}

// Commit refuses: row and effect must commit together.
func (t *tx) Commit(context.Context) error {
	return postrider.Errorf(postrider.Internal, "the handler must not commit its transaction: return nil")
}

// Rollback refuses, and what was to be rolled back will not be committed.
func (t *tx) Rollback(context.Context) error {
	t.misuse = postrider.Errorf(postrider.Internal,
		"the handler must not roll back its transaction: return an error, or use a savepoint (Begin)")
	return t.misuse
}

// beginError makes the error of a message whose transaction could not be begun. The handler did not run.
func (s *Store) beginError(ctx context.Context, op string, err error) error {
	e := &postrider.Error{Code: postrider.Unavailable, Op: op, Unprocessed: true, Err: err}
	switch sqlState(err) {
	case lockNotAvailable:
		s.busy.Add(1)
		e.Code, e.Unprocessed, e.Msg = postrider.Aborted, false, "another copy is being handled right now"
		return postrider.RetryAfter(busyDelay, e)
	case undefinedTable, invalidSchema:
		e.Code, e.Msg = postrider.Internal, "the tables are missing in schema "+s.cfg.Schema+": call idempotency.Migrate first"
	default:
		if ctx.Err() != nil {
			e.Code = postrider.CodeOf(ctx.Err())
		}
	}
	return e
}

// commitError makes the error of a failed commit. It is retryable whatever the cause: either nothing was committed, or
// the row tells the next copy.
func commitError(ctx context.Context, op string, err error) error {
	e := &postrider.Error{Code: postrider.Unavailable, Op: op + ": commit", Err: err}
	switch {
	case ctx.Err() != nil:
		e.Code = postrider.CodeOf(ctx.Err())
	case errors.Is(err, postrider.Internal):
		e.Code = postrider.Internal
	case sqlState(err) != "":
		e.Code = postrider.Aborted // a deferred constraint, a serialization failure
	}
	return e
}
