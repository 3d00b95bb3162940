package outbox

import (
	"context"
	"database/sql"
	"encoding/hex"
	"strings"

	"github.com/postrider/postrider"
)

// InSQL is [Outbox.In] for a transaction of database/sql, with any driver for PostgreSQL that takes $1. Each Publish is one
// round trip and inserts at once.
func (o *Outbox) InSQL(tx *sql.Tx) postrider.Publisher { return sqlPublisher{o, tx} }

type sqlPublisher struct {
	outbox *Outbox
	tx     *sql.Tx
}

// Publish implements [postrider.Publisher]; see [Outbox.InSQL].
func (p sqlPublisher) Publish(ctx context.Context, msgs ...*postrider.Message) error {
	if len(msgs) == 0 {
		return nil
	}
	if p.tx == nil {
		return nothingToInsertBy("InSQL", "transaction")
	}
	rows, err := p.outbox.encode(msgs)
	if err != nil {
		return err
	}
	look, err := p.outbox.admit(func(sql string, depth *int64) error { return p.tx.QueryRowContext(ctx, sql).Scan(depth) })
	if err == nil {
		err = p.insert(ctx, rows, look)
	}
	if err != nil {
		e := p.outbox.failed(ctx, "insert "+name(msgs), err)
		e.Unprocessed = true
		return e
	}
	p.outbox.soon()
	return nil
}

// insert knows no flights of several statements, nor COPY: the look goes ahead, and arrays are literals, which all drivers pass.
func (p sqlPublisher) insert(ctx context.Context, r rows, look bool) error {
	if look {
		var depth int64
		if err := p.tx.QueryRowContext(ctx, p.outbox.q.depth).Scan(&depth); err != nil {
			return err
		}
		p.outbox.waiting.Store(depth)
	}
	query, args := r.statement(&p.outbox.q)
	for i, a := range args {
		switch a := a.(type) {
		case []string:
			args[i] = textArray(a)
		case [][]byte:
			args[i] = byteaArray(a)
		}
	}
	_, err := p.tx.ExecContext(ctx, query, args...)
	return err
}

// textArray writes an array as PostgreSQL reads it (manual, section 8.15.6).
func textArray(values []string) string {
	escape := strings.NewReplacer(`\`, `\\`, `"`, `\"`)
	var b strings.Builder
	for i, v := range values {
		b.WriteString(separator(i) + `"` + escape.Replace(v) + `"`)
	}
	return b.String() + "}"
}

// byteaArray is textArray for bytes, in hexadecimal digits.
func byteaArray(values [][]byte) string {
	n := 2
	for _, v := range values {
		n += 2*len(v) + len(`,"\\x"`)
	}
	b := make([]byte, 0, n)
	for i, v := range values {
		b = append(b, separator(i)...)
		if v == nil {
			b = append(b, "NULL"...)
			continue
		}
		b = append(b, `"\\x`...)
		b = append(hex.AppendEncode(b, v), '"')
	}
	return string(append(b, '}'))
}

func separator(i int) string {
	if i == 0 {
		return "{"
	}
	return ","
}
