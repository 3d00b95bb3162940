package outbox

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/envelope"
)

// copyFrom is how many messages are worth the extra round trip of COPY.
const copyFrom = 100

// In returns a publisher whose messages leave if, and only if, tx commits. Like tx it is for one goroutine.
//
// Publish inserts at once, or with the COMMIT if tx was begun by [DB.Begin]. It checks the messages before it touches the
// database, so that the transaction remains usable after a refusal: InvalidArgument for a bad attribute or address,
// ResourceExhausted (and permanent) for one that is too large, and what [Config.Check] says. All of several messages are
// taken or none.
//
// A message with a key waits for other open transactions that published the same key, since the order of a key is the order
// of their commits. So a transaction that publishes several keys one call after the other may deadlock with another one, which
// PostgreSQL ends with an error in one of them (Aborted, as any failure of a statement that a new transaction may not have). One call
// sorts its keys and cannot, nor can transactions of [DB.Begin]. Other errors: FailedPrecondition without tables, Unavailable when
// the connection broke, of which nothing was committed.
func (o *Outbox) In(tx pgx.Tx) postrider.Publisher {
	switch t := tx.(type) {
	case *deferred:
		return queue{o, t}
	case *savepoint:
		return queue{o, t.root}
	default:
		return publisher{o, tx}
	}
}

type publisher struct {
	outbox *Outbox
	tx     pgx.Tx
}

// Publish implements [postrider.Publisher]; see [Outbox.In].
func (p publisher) Publish(ctx context.Context, msgs ...*postrider.Message) error {
	if len(msgs) == 0 {
		return nil
	}
	if p.tx == nil {
		return nothingToInsertBy("In", "transaction")
	}
	rows, err := p.outbox.encode(msgs)
	if err != nil {
		return err
	}
	look, err := p.outbox.admit(func(sql string, depth *int64) error { return p.tx.QueryRow(ctx, sql).Scan(depth) })
	if err == nil {
		err = p.outbox.insert(ctx, p.tx, rows, look)
	}
	if err != nil {
		e := p.outbox.failed(ctx, "insert "+name(msgs), err)
		e.Unprocessed = true // whatever became of the statement, it cannot commit any more
		return e
	}
	p.outbox.soon()
	return nil
}

// execer is a transaction, or a pool with one for each statement.
type execer interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults
	CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, rows pgx.CopyFromSource) (int64, error)
}

// insert takes the locks of the keys and inserts in one flight, and looks at the depth if so wished. The locks come first, so
// that the numbers are drawn under them. COPY cannot take locks, so there they go ahead, in the same transaction.
func (o *Outbox) insert(ctx context.Context, db execer, r rows, look bool) error {
	batch := &pgx.Batch{}
	if look {
		o.queueLook(batch)
	}
	if len(r.topics) < copyFrom {
		query, args := r.statement(&o.q)
		if !look {
			_, err := db.Exec(ctx, query, args...)
			return err
		}
		batch.Queue(query, args...)
		return db.SendBatch(ctx, batch).Close()
	}
	if len(r.keys) > 0 {
		batch.Queue(o.q.lockKeys, r.keys)
	}
	if batch.Len() > 0 {
		if err := db.SendBatch(ctx, batch).Close(); err != nil {
			return err
		}
	}
	_, err := db.CopyFrom(ctx, pgx.Identifier{o.cfg.Schema, "postrider_outbox"}, []string{"topic", "attributes", "data"},
		pgx.CopyFromSlice(len(r.topics), func(i int) ([]any, error) {
			return []any{r.topics[i], r.attributes[i], r.data[i]}, nil
		}))
	return err
}

// rows are the columns of what is inserted, and the keys to lock before.
type rows struct {
	topics     []string
	attributes [][]byte
	data       [][]byte
	keys       []string // prefixed by the schema
}

// statement returns the statement that locks the keys and inserts the rows in their order.
func (r *rows) statement(q *queries) (string, []any) {
	if len(r.topics) == 1 {
		if len(r.keys) == 0 {
			return q.insertOne, []any{r.topics[0], r.attributes[0], r.data[0]}
		}
		return q.insertKeyed, []any{r.topics[0], r.attributes[0], r.data[0], r.keys[0]}
	}
	if len(r.keys) == 0 {
		return q.insertMany, []any{r.topics, r.attributes, r.data}
	}
	return q.insertManyKeyed, []any{r.topics, r.attributes, r.data, r.keys}
}

// append adds the rows of more, which come later.
func (r *rows) append(more rows) {
	r.topics, r.attributes = append(r.topics, more.topics...), append(r.attributes, more.attributes...)
	r.data, r.keys = append(r.data, more.data...), append(r.keys, more.keys...)
}

// encode checks the messages, fills in their source and returns their rows.
func (o *Outbox) encode(msgs []*postrider.Message) (rows, error) {
	n := len(msgs)
	out := rows{topics: make([]string, n), attributes: make([][]byte, n), data: make([][]byte, n)}
	for i, m := range msgs {
		if m != nil && m.Source == "" {
			m.Source = o.cfg.Source
		}
		head, err := o.check(m)
		if err != nil {
			return rows{}, err
		}
		out.topics[i], out.attributes[i], out.data[i] = m.Address(), head, m.Data
		if key := m.Key(); key != "" && !o.cfg.NoKeyLock {
			out.keys = append(out.keys, o.cfg.Schema+"."+key)
		}
	}
	return out, nil
}

// check refuses what the broker would refuse, and returns the encoded attributes.
func (o *Outbox) check(m *postrider.Message) (head []byte, err error) {
	if err := m.Validate(); err != nil {
		return nil, fmt.Errorf("outbox: %w", err)
	}
	if err := m.CheckAddress(); err != nil {
		return nil, fmt.Errorf("outbox: %w", err)
	}
	bare := *m
	bare.Data = nil
	head = envelope.AppendProto(nil, &bare)
	if size := len(head) + len(m.Data); o.cfg.MaxBytes >= 0 && size > o.cfg.MaxBytes {
		return nil, postrider.Permanent(&postrider.Error{
			Code: postrider.ResourceExhausted, Op: "outbox: publish " + m.Type + " " + strconv.Quote(m.ID),
			Msg: fmt.Sprintf("the message has %d bytes, Config.MaxBytes is %d: store the data elsewhere and send a claim check", size, o.cfg.MaxBytes),
		})
	}
	if o.cfg.Check != nil {
		if err := o.cfg.Check(m); err != nil {
			return nil, fmt.Errorf("outbox: %w", err)
		}
	}
	return head, nil
}

// name tells some messages in an error.
func name(msgs []*postrider.Message) string {
	return fmt.Sprintf("%d messages, the first %s %s", len(msgs), msgs[0].Type, msgs[0].ID)
}

// nothingToInsertBy is the error of a publisher that was made of nil.
func nothingToInsertBy(method, what string) error {
	return postrider.Errorf(postrider.InvalidArgument, "outbox: publish: the %s given to Outbox.%s is nil", what, method)
}

// failed gives the error of a statement its class.
func (o *Outbox) failed(ctx context.Context, op string, err error) *postrider.Error {
	if e, ok := errors.AsType[*postrider.Error](err); ok {
		return e
	}
	e := &postrider.Error{Code: postrider.Unavailable, Op: "outbox: " + op, Unprocessed: pgconn.SafeToRetry(err), Err: err}
	var answer interface{ SQLState() string } // of any driver
	switch {
	case errors.Is(err, pgx.ErrTxClosed), errors.Is(err, sql.ErrTxDone):
		e.Code, e.Unprocessed = postrider.FailedPrecondition, true
		e.Msg = "the transaction has ended: publish before its commit"
	case errors.As(err, &answer):
		e.Code = classOf(answer.SQLState())
		pg, ours := errors.AsType[*pgconn.PgError](err)
		e.Unprocessed = ours && pg.SeverityUnlocalized == "ERROR" // else the connection ended, and perhaps while it committed
		switch answer.SQLState() {
		case undefinedTable, undefinedSchema:
			e.Msg = "schema " + o.cfg.Schema + " has no outbox: call outbox.Migrate first"
		case readOnly:
			e.Code, e.Msg = postrider.Unavailable, readOnlyHint
		}
	case ctx.Err() != nil:
		e.Code = postrider.CodeOf(ctx.Err())
	}
	return e
}

// readOnlyHint is for a database that takes no writes. It may become the primary.
const readOnlyHint = "the transaction is read-only: is this a standby? Connect to the primary (target_session_attrs=read-write)"

// classOf maps an SQLSTATE (PostgreSQL, appendix A) by its first two characters, which are its class.
func classOf(state string) postrider.Code {
	switch state[:min(2, len(state))] {
	case "08", "53", "57": // connection, resources, operator
		return postrider.Unavailable
	case "40", "55": // deadlock or serialization, a lock that was not to be had in time
		return postrider.Aborted
	case "23", "3F", "42": // a constraint that was deferred to the commit, no such table, no right to
		return postrider.FailedPrecondition
	default:
		return postrider.Internal
	}
}
