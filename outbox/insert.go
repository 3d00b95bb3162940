package outbox

import (
	"context"
	"fmt"
	"strconv"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/envelope"
)

// copyFrom is how many messages are worth the extra round trips of COPY.
const copyFrom = 100

type publisher struct {
	outbox *Outbox
	tx     pgx.Tx
}

// Publish implements [postrider.Publisher]; see [Outbox.In].
func (p publisher) Publish(ctx context.Context, msgs ...*postrider.Message) error {
	if len(msgs) == 0 {
		return nil
	}
	rows, keys, err := p.outbox.encode(msgs)
	if err != nil {
		return err
	}
	if err := p.insert(ctx, rows, keys); err != nil {
		return fmt.Errorf("outbox: insert %d messages, the first %s: %w", len(msgs), msgs[0].ID, err)
	}
	p.outbox.poke()
	return nil
}

// insert sends lock and rows in one flight; COPY cannot share one, so there the lock goes ahead. The lock comes first,
// so that the ids are drawn under it.
func (p publisher) insert(ctx context.Context, rows rows, keys []string) error {
	q, batch := &p.outbox.q, &pgx.Batch{}
	if len(keys) > 0 {
		batch.Queue(q.lockKeys, keys)
	}
	switch n := len(rows.topics); {
	case n == 1:
		batch.Queue(q.insertOne, rows.topics[0], rows.attributes[0], rows.data[0])
	case n < copyFrom:
		batch.Queue(q.insertMany, rows.topics, rows.attributes, rows.data)
	default:
		if batch.Len() > 0 {
			if err := p.tx.SendBatch(ctx, batch).Close(); err != nil {
				return err
			}
		}
		_, err := p.tx.CopyFrom(ctx, pgx.Identifier{p.outbox.cfg.Schema, "postrider_outbox"},
			[]string{"topic", "attributes", "data"},
			pgx.CopyFromSlice(n, func(i int) ([]any, error) {
				return []any{rows.topics[i], rows.attributes[i], rows.data[i]}, nil
			}))
		return err
	}
	return p.tx.SendBatch(ctx, batch).Close()
}

// rows are the columns of what is inserted.
type rows struct {
	topics     []string
	attributes [][]byte
	data       [][]byte
}

// encode checks the messages, fills in their source and returns their rows and the keys to lock.
func (o *Outbox) encode(msgs []*postrider.Message) (rows, []string, error) {
	n := len(msgs)
	out := rows{make([]string, n), make([][]byte, n), make([][]byte, n)}
	var keys []string
	for i, m := range msgs {
		if m.Source == "" {
			m.Source = o.cfg.Source
		}
		if err := m.Validate(); err != nil {
			return rows{}, nil, fmt.Errorf("outbox: %w", err)
		}
		head := *m
		head.Data = nil
		out.topics[i], out.attributes[i], out.data[i] = m.Address(), envelope.AppendProto(nil, &head), m.Data
		if size := len(out.attributes[i]) + len(m.Data); o.cfg.MaxBytes >= 0 && size > o.cfg.MaxBytes {
			return rows{}, nil, postrider.Permanent(&postrider.Error{
				Code: postrider.ResourceExhausted, Op: "outbox: publish " + m.Type + " " + strconv.Quote(m.ID),
				Msg: fmt.Sprintf("the message has %d bytes, Config.MaxBytes is %d: store the data elsewhere and send a claim check", size, o.cfg.MaxBytes),
			})
		}
		if key := m.Key(); key != "" && !o.cfg.NoKeyLock {
			keys = append(keys, o.cfg.Schema+"."+key)
		}
	}
	return out, keys, nil
}
