package outbox

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// A transaction of DB begins when it is used: BEGIN goes with the first statement, in one flight. A statement with options of
// pgx or without arguments, which may be several, and all that is no statement, has BEGIN go ahead.

// startTimeout bounds a BEGIN that has no context of its own.
const startTimeout = 5 * time.Second

// start begins the transaction if it has not begun.
func (t *deferred) start(ctx context.Context) error {
	if t.tx != nil {
		return nil
	}
	tx, err := t.conn.BeginTx(ctx, t.opts)
	if err != nil {
		t.release()
		return err
	}
	t.tx = tx
	return nil
}

// first has BEGIN and a statement go in one flight, and returns what follows BEGIN's result. It returns nil if they cannot.
func (t *deferred) first(ctx context.Context, sql string, args []any) pgx.BatchResults {
	if t.tx != nil || len(args) == 0 {
		return nil
	}
	switch args[0].(type) {
	case pgx.QueryExecMode, pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
		return nil
	}
	batch := &pgx.Batch{}
	batch.BeginTx(t.opts)
	batch.Queue(sql, args...)
	results := t.conn.SendBatch(ctx, batch)
	t.tx = results.Tx()
	_, _ = results.Exec() // an error comes again with the statement
	return results
}

// Exec implements [pgx.Tx].
func (t *deferred) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	if results := t.first(ctx, sql, args); results != nil {
		tag, err := results.Exec()
		if closeErr := results.Close(); err == nil {
			err = closeErr
		}
		return tag, err
	}
	if err := t.start(ctx); err != nil {
		return pgconn.CommandTag{}, err
	}
	return t.tx.Exec(ctx, sql, args...)
}

// Query implements [pgx.Tx].
func (t *deferred) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if results := t.first(ctx, sql, args); results != nil {
		rows, err := results.Query()
		if err != nil {
			_ = results.Close() // says the same
			return rows, err
		}
		return &firstRows{rows, results, nil}, nil
	}
	if err := t.start(ctx); err != nil {
		return pgx.FailedBatchResults(&pgx.Batch{}, err).Query()
	}
	return t.tx.Query(ctx, sql, args...)
}

// QueryRow implements [pgx.Tx].
func (t *deferred) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if results := t.first(ctx, sql, args); results != nil {
		return firstRow{results}
	}
	if err := t.start(ctx); err != nil {
		return pgx.FailedBatchResults(&pgx.Batch{}, err).QueryRow()
	}
	return t.tx.QueryRow(ctx, sql, args...)
}

// SendBatch implements [pgx.Tx].
func (t *deferred) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	if err := t.start(ctx); err != nil {
		return pgx.FailedBatchResults(b, err)
	}
	return t.tx.SendBatch(ctx, b)
}

// CopyFrom implements [pgx.Tx].
func (t *deferred) CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, src pgx.CopyFromSource) (int64, error) {
	if err := t.start(ctx); err != nil {
		return 0, err
	}
	return t.tx.CopyFrom(ctx, table, columns, src)
}

// Prepare implements [pgx.Tx].
func (t *deferred) Prepare(ctx context.Context, name, sql string) (*pgconn.StatementDescription, error) {
	if err := t.start(ctx); err != nil {
		return nil, err
	}
	return t.tx.Prepare(ctx, name, sql)
}

// LargeObjects implements [pgx.Tx].
func (t *deferred) LargeObjects() pgx.LargeObjects {
	t.startNow()
	return t.tx.LargeObjects()
}

// Conn implements [pgx.Tx]. What is sent through it is in the transaction.
func (t *deferred) Conn() *pgx.Conn {
	if t.tx == nil {
		conn := t.conn.Conn()
		t.startNow() // if that fails, pgx has closed it
		return conn
	}
	return t.tx.Conn()
}

// startNow begins for who has no context. If that fails the transaction is closed, as if the connection had been lost.
func (t *deferred) startNow() {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	_ = t.start(ctx)
}

// firstRows are the rows of the first statement; its flight ends with them.
type firstRows struct {
	pgx.Rows
	results pgx.BatchResults
	err     error
}

// Next implements [pgx.Rows].
func (r *firstRows) Next() bool {
	if r.Rows.Next() {
		return true
	}
	r.Close()
	return false
}

// Close implements [pgx.Rows].
func (r *firstRows) Close() {
	r.Rows.Close()
	if err := r.results.Close(); r.err == nil {
		r.err = err
	}
}

// Err implements [pgx.Rows].
func (r *firstRows) Err() error {
	if err := r.Rows.Err(); err != nil {
		return err
	}
	return r.err
}

// firstRow is the row of the first statement.
type firstRow struct{ results pgx.BatchResults }

// Scan implements [pgx.Row].
func (r firstRow) Scan(dest ...any) error {
	err := r.results.QueryRow().Scan(dest...)
	if closeErr := r.results.Close(); err == nil {
		err = closeErr
	}
	return err
}
