package outbox

import (
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// The ring: three tables, the slots, are filled in turn, each for one period of Retain. When a slot's turn comes next it
// has not been written for a period. If the cursor, as it is written, sees all its rows, they are sent, and it is
// truncated: no dead rows, nothing for vacuum. Neither its lock nor that of the parent is ever waited for, so a transaction
// left open delays a truncation and no writer.

// keepRing looks after the ring some times in a period. What PostgreSQL refuses is logged once and tried again: without
// it the relay works all the same.
func (t *term) keepRing() error {
	retain := t.r.cfg.Retain
	if retain < 0 || time.Since(t.ringSeen) < min(retain/8, 10*time.Second) {
		return nil
	}
	t.ringSeen = time.Now()
	err := t.setPeriod(retain.Seconds())
	if err == nil {
		err = t.truncateNext()
	}
	var refused *pgconn.PgError
	switch {
	case err == nil || hasState(err, lockUnavailable):
		t.ringError = ""
		return nil
	case !errors.As(err, &refused) || t.conn.Conn().IsClosed():
		return fmt.Errorf("outbox: keep ring: %w", err)
	case refused.Code != t.ringError:
		t.ringError = refused.Code
		t.r.log.WarnContext(t.ctx, "sent messages cannot be removed, the tables grow", "error", err)
	}
	return nil
}

// setPeriod makes the tables' period that of Retain.
func (t *term) setPeriod(seconds float64) error {
	if t.period == seconds {
		return nil
	}
	q := &t.r.outbox.q
	err := pgx.BeginTxFunc(t.ctx, t.conn, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(t.ctx, q.ringPeriodLock, pgx.QueryExecModeSimpleProtocol); err != nil {
			return err
		}
		if _, err := tx.Exec(t.ctx, fmt.Sprintf(q.ringPeriod, seconds)); err != nil {
			return err
		}
		tag, err := tx.Exec(t.ctx, q.ringPeriodNote, t.fence, t.owner, seconds)
		if err == nil && tag.RowsAffected() == 0 {
			err = errLeaseLost
		}
		return err
	})
	if err == nil {
		t.period = seconds
	}
	return err
}

// truncateNext empties the slot that is to be filled next, if all that is in it is sent.
func (t *term) truncateNext() error {
	q := &t.r.outbox.q
	var slot int
	var full bool
	if err := t.conn.QueryRow(t.ctx, q.ringState, t.period).Scan(&slot, &full); err != nil || !full {
		return err
	}
	return pgx.BeginTxFunc(t.ctx, t.conn, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(t.ctx, fmt.Sprintf(q.ringLock, slot)); err != nil {
			return err
		}
		var covered bool
		err := tx.QueryRow(t.ctx, fmt.Sprintf(q.ringCovered, slot), t.fence, t.owner).Scan(&covered)
		if errors.Is(err, pgx.ErrNoRows) {
			return errLeaseLost
		}
		if err != nil || !covered {
			return err
		}
		_, err = tx.Exec(t.ctx, fmt.Sprintf(q.ringTruncate, slot))
		return err
	})
}
