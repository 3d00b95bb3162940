package outbox

import (
	"context"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
)

// DB is the pool of a database with an outbox. It is a [postrider.Publisher] with transactions of its own, and begins
// transactions whose messages go to the server with their COMMIT. It is safe for concurrent use. If the relay that leads runs in
// this process on the same pool, messages go to it directly; then whoever publishes must be allowed to read the tables, as the
// relay is.
type DB struct {
	outbox *Outbox
	pool   *pgxpool.Pool
}

// On returns the DB of a pool. It is not for the transactions of a program that has its own: those publish through
// [Outbox.In], and need a DB only if it shall begin them.
func (o *Outbox) On(pool *pgxpool.Pool) *DB { return &DB{o, pool} }

// Publish implements [postrider.Publisher]: the messages are committed when it returns nil. It takes one round trip, for a
// hundred and more messages with keys four. Errors are those of [Outbox.In], and Unavailable, DeadlineExceeded and Canceled
// without Unprocessed mean that the messages may have been accepted: publish them again with the same ids. Then both rows may
// be sent, and NATS drops the second by its id within the stream's duplicate window, package idempotency after that.
func (d *DB) Publish(ctx context.Context, msgs ...*postrider.Message) error {
	if len(msgs) == 0 {
		return nil
	}
	if d.pool == nil {
		return nothingToInsertBy("On", "pool")
	}
	rows, err := d.outbox.encode(msgs)
	if err != nil {
		return err
	}
	look, err := d.outbox.admit(func(sql string, depth *int64) error { return d.pool.QueryRow(ctx, sql).Scan(depth) })
	to, direct := d.outbox.directTo(d.pool), false
	switch {
	case err != nil:
	case to != nil && !look && len(msgs) < copyFrom:
		var ids []int64
		if ids, err = d.insert(ctx, rows); err == nil {
			rows.own()
			direct = to.hand(rows, ids)
		}
	case len(msgs) >= copyFrom && len(rows.keys) > 0:
		err = pgx.BeginTxFunc(ctx, d.pool, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error { return d.outbox.insert(ctx, tx, rows, look) })
	default:
		err = d.outbox.insert(ctx, d.pool, rows, look)
	}
	if err != nil {
		return d.outbox.failed(ctx, "publish "+name(msgs), err)
	}
	d.outbox.now(direct)
	return nil
}

// insert returns the numbers of the rows.
func (d *DB) insert(ctx context.Context, r rows) ([]int64, error) {
	sql, args := r.statement(&d.outbox.q)
	return numbered(d.pool.Query(ctx, sql+d.outbox.q.returning, args...))
}

// Begin begins a transaction in which [Outbox.In] does not insert at once: all messages go with the COMMIT, in one flight,
// and BEGIN goes with the first statement. That saves a round trip for each Publish and one more, and they are most of what an
// outbox costs; it holds the locks of keys for the time of the commit only, and makes deadlocks by keys impossible. Begin
// itself asks nothing of the server: a connection that is lost is noticed by the first statement.
//
// Pass DB to [pgx.BeginFunc] in the place of the pool:
//
//	err := pgx.BeginFunc(ctx, ob.On(pool), func(tx pgx.Tx) error {
//		...
//		return OrderPlaced.Publish(ctx, ob.In(tx), &o)
//	})
//
// What the database says about the messages comes from Commit then. Roll back to a savepoint by the transaction's Begin, which drops what
// was published since; it cannot know about a "rollback to" in SQL. An error of Commit that is Unavailable,
// DeadlineExceeded or Canceled and not Unprocessed means that the transaction may have committed. Whoever gets the tx
// but does not know it was begun so, calls Commit or Rollback as ever.
func (d *DB) Begin(ctx context.Context) (pgx.Tx, error) { return d.BeginTx(ctx, pgx.TxOptions{}) }

// BeginTx is [DB.Begin] with options, for [pgx.BeginTxFunc].
func (d *DB) BeginTx(ctx context.Context, opts pgx.TxOptions) (pgx.Tx, error) {
	if d.pool == nil {
		return nil, nothingToInsertBy("On", "pool")
	}
	conn, err := d.pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	commit := opts.CommitQuery
	if commit == "" {
		commit = "commit"
	}
	return &deferred{pool: d.pool, conn: conn, opts: opts, commit: commit}, nil
}

// deferred is a transaction of DB.Begin.
type deferred struct {
	pool    *pgxpool.Pool
	conn    *pgxpool.Conn
	opts    pgx.TxOptions
	tx      pgx.Tx // nil: it has not begun
	commit  string
	waiting []waiting // in the order of Publish
}

// waiting are rows that go with the commit.
type waiting struct {
	outbox *Outbox
	rows   rows
	look   bool // at the depth

	direct *direct // nil: the numbers are not asked for
	ids    []int64
}

// queue publishes in a deferred transaction.
type queue struct {
	outbox *Outbox
	tx     *deferred
}

// Publish implements [postrider.Publisher]; see [Outbox.In].
func (q queue) Publish(ctx context.Context, msgs ...*postrider.Message) error {
	if len(msgs) == 0 {
		return nil
	}
	if q.tx.tx == closedTx {
		return postrider.Errorf(postrider.FailedPrecondition, "outbox: publish %s: %w", name(msgs), pgx.ErrTxClosed)
	}
	rows, err := q.outbox.encode(msgs)
	if err != nil {
		return err
	}
	look, err := q.outbox.admit(func(sql string, depth *int64) error { return q.tx.QueryRow(ctx, sql).Scan(depth) })
	if err != nil {
		return q.outbox.failed(ctx, "publish "+name(msgs), err)
	}
	rows.own() // a Publisher keeps nothing of its caller
	q.tx.waiting = append(q.tx.waiting, waiting{outbox: q.outbox, rows: rows, look: look})
	return nil
}

// savepoint is a transaction in a deferred one. What is published in it goes with the commit of that, whether the savepoint is
// released or left open.
type savepoint struct {
	pgx.Tx
	root *deferred
	mark int // what was waiting when it began
}

// Begin implements [pgx.Tx]: a savepoint.
func (t *deferred) Begin(ctx context.Context) (pgx.Tx, error) {
	if err := t.start(ctx); err != nil {
		return nil, err
	}
	return t.savepoint(ctx, t.tx)
}

// Begin implements [pgx.Tx]: a savepoint.
func (s *savepoint) Begin(ctx context.Context) (pgx.Tx, error) { return s.root.savepoint(ctx, s.Tx) }

func (t *deferred) savepoint(ctx context.Context, in pgx.Tx) (pgx.Tx, error) {
	tx, err := in.Begin(ctx)
	if err != nil {
		return nil, err
	}
	return &savepoint{tx, t, len(t.waiting)}, nil
}

// Rollback implements [pgx.Tx]. What was published since the savepoint is dropped.
func (s *savepoint) Rollback(ctx context.Context) error {
	err := s.Tx.Rollback(ctx)
	if err == nil {
		s.root.waiting = s.root.waiting[:min(s.mark, len(s.root.waiting))]
	}
	return err
}

// Commit implements [pgx.Tx]: it sends what was published and COMMIT in one flight.
func (t *deferred) Commit(ctx context.Context) error {
	if t.tx == closedTx {
		return pgx.ErrTxClosed
	}
	defer t.release()
	switch {
	case t.tx == nil && len(t.waiting) == 0:
		return nil
	case t.tx != nil && (len(t.waiting) == 0 || t.conn.Conn().PgConn().TxStatus() != 'T'): // a failed one tells so itself
		return t.tx.Commit(ctx)
	}
	if err := t.send(ctx); err != nil {
		if t.conn.Conn().PgConn().TxStatus() != 'I' {
			rollback, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
			defer cancel()
			_ = t.tx.Rollback(rollback) // if it fails it closes the connection, and the server rolls back
		}
		return err
	}
	return nil
}

// rollbackTimeout bounds the roll-back after a commit that failed; then the connection is closed instead.
const rollbackTimeout = 5 * time.Second

// send inserts what waits and commits. What is too much for one flight goes ahead.
func (t *deferred) send(ctx context.Context) error {
	var all []waiting // one for each outbox, nearly always there is but one
	for _, w := range t.waiting {
		i := slices.IndexFunc(all, func(o waiting) bool { return o.outbox == w.outbox })
		if i < 0 {
			all = append(all, w)
		} else {
			all[i].rows.append(w.rows)
			all[i].look = all[i].look || w.look
		}
	}
	for _, w := range all {
		if len(w.rows.topics) < copyFrom {
			continue
		}
		err := t.start(ctx)
		if err == nil {
			err = w.outbox.insert(ctx, t.tx, w.rows, w.look)
		}
		if err != nil {
			e := w.outbox.failed(ctx, "insert with the commit", err)
			e.Unprocessed = true
			return e
		}
	}
	batch := &pgx.Batch{}
	if t.tx == nil {
		batch.BeginTx(t.opts)
	}
	for i := range all {
		w := &all[i]
		if len(w.rows.topics) >= copyFrom {
			continue
		}
		if w.look {
			w.outbox.queueLook(batch)
		}
		sql, args := w.rows.statement(&w.outbox.q)
		if t.opts.IsoLevel != pgx.Serializable { // there what is read beside may make it fail
			w.direct = w.outbox.directTo(t.pool)
		}
		if w.direct == nil {
			batch.Queue(sql, args...)
			continue
		}
		batch.Queue(sql+w.outbox.q.returning, args...).Query(func(answer pgx.Rows) (err error) {
			w.ids, err = numbered(answer, nil)
			return err
		})
	}
	done := ""
	batch.Queue(t.commit).Exec(func(tag pgconn.CommandTag) error {
		done = tag.String()
		return nil
	})
	results := t.conn.SendBatch(ctx, batch)
	if t.tx == nil {
		t.tx = results.Tx()
	}
	if err := results.Close(); err != nil {
		return all[0].outbox.failed(ctx, "commit", err)
	}
	if done == "ROLLBACK" {
		return pgx.ErrTxCommitRollback
	}
	for _, w := range all {
		w.outbox.now(done == "COMMIT" && w.direct.hand(w.rows, w.ids)) // or else it was prepared
	}
	return nil
}

// Rollback implements [pgx.Tx]. What was published is dropped.
func (t *deferred) Rollback(ctx context.Context) error {
	defer t.release()
	if t.tx == nil {
		return nil
	}
	return t.tx.Rollback(ctx)
}

// release gives the connection back, once.
func (t *deferred) release() {
	if t.tx != closedTx {
		t.tx = closedTx
		t.conn.Release()
	}
}

// closedTx is what a transaction that has ended becomes: all its methods fail with [pgx.ErrTxClosed].
var closedTx = pgx.FailedBatchResults(begun(), pgx.ErrTxClosed).Tx() //nolint:gochecknoglobals // a constant in all but syntax

func begun() *pgx.Batch {
	b := &pgx.Batch{}
	b.BeginTx(pgx.TxOptions{})
	return b
}
