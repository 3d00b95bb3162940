package idempotency

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	sweepEvery = time.Hour
	sweepAgain = time.Minute // after a failure
	sweepBatch = 10_000      // rows of one DELETE

	// barrierSlack keeps answers a little longer than messages are accepted, for the clocks of senders that are behind.
	barrierSlack = 24 * time.Hour
)

// Run keeps the tables small until ctx ends and then returns nil: once an hour it creates the partitions of today and
// tomorrow, drops those older than [Config.Window], and deletes barrier rows older than [Config.Retention] and
// outcomes older than [Config.KeyRetention]. Of all
// instances that run, one does it. A failure is logged as a warning and tried again; handlers do not depend on it, since they
// create a missing partition themselves. The database role needs the right to create tables in the schema.
func (s *Store) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		next := sweepEvery
		if err := s.maintain(ctx); err != nil && ctx.Err() == nil {
			s.cfg.Logger.WarnContext(ctx, "idempotency: maintenance failed, handlers go on", "schema", s.cfg.Schema, "error", err)
			next = sweepAgain
		}
		timer.Reset(next)
	}
}

func (s *Store) maintain(ctx context.Context) error {
	const op = "idempotency: maintain"
	var now time.Time
	if err := s.pool.QueryRow(ctx, s.sql.now).Scan(&now); err != nil {
		return err
	}
	for _, day := range []time.Time{now, dayOf(now).AddDate(0, 0, 1)} {
		if err := s.createPartition(ctx, op, day); err != nil {
			return err
		}
	}
	tag, err := s.pool.Exec(ctx, s.sql.lease, (sweepEvery - sweepAgain).Microseconds())
	if err != nil || tag.RowsAffected() == 0 {
		return err
	}
	return s.sweep(ctx, now)
}

// sweep drops and deletes what is too old.
func (s *Store) sweep(ctx context.Context, now time.Time) error {
	var errs []error
	if s.cfg.Window > 0 {
		errs = append(errs,
			s.dropBefore(ctx, now.Add(-s.cfg.Window)),
			s.deleteOld(ctx, s.sql.sweepUntimed, s.cfg.Window))
	}
	if s.cfg.Retention > 0 {
		errs = append(errs, s.deleteOld(ctx, s.sql.sweepBarrier, s.cfg.Retention+barrierSlack))
	}
	if s.cfg.KeyRetention > 0 {
		errs = append(errs, s.deleteOld(ctx, s.sql.sweepRequest, s.cfg.KeyRetention))
	}
	return errors.Join(errs...)
}

// partition is the table of one day. A sweep that died may have left it pending or detached.
type partition struct {
	name              string
	day               time.Time
	attached, pending bool
}

// dropBefore drops the partitions that end before a time.
func (s *Store) dropBefore(ctx context.Context, limit time.Time) error {
	rows, err := s.pool.Query(ctx, s.sql.list, s.cfg.Schema)
	if err != nil {
		return fmt.Errorf("list partitions: %w", err)
	}
	all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (p partition, err error) {
		if err := row.Scan(&p.name, &p.attached, &p.pending); err != nil {
			return p, err
		}
		p.day, err = time.Parse(partitionName, p.name)
		return p, err
	})
	if err != nil {
		return fmt.Errorf("list partitions: %w", err)
	}
	for _, p := range all {
		if !p.day.AddDate(0, 0, 1).Before(limit) {
			continue
		}
		if err := s.drop(ctx, p); err != nil {
			return fmt.Errorf("drop partition %s: %w", p.name, err)
		}
	}
	return nil
}

// drop raises the floor first: from then on nobody brings the day back. Detaching concurrently waits for open
// handlers but locks nobody out; a plain DROP would lock the whole inbox.
func (s *Store) drop(ctx context.Context, p partition) error {
	if _, err := s.pool.Exec(ctx, s.sql.raise, p.day); err != nil {
		return err
	}
	if p.attached {
		how := "concurrently"
		if p.pending {
			how = "finalize"
		}
		_, err := s.pool.Exec(ctx, fmt.Sprintf("alter table %[1]s.postrider_inbox detach partition %[1]s.%[2]s %[3]s",
			s.sql.schema, p.name, how))
		// It is no partition any more when a sweep that was broken off has ended on the server all the same.
		if err != nil && sqlState(err) != undefinedTable {
			return err
		}
	}
	_, err := s.pool.Exec(ctx, fmt.Sprintf("drop table if exists %s.%s", s.sql.schema, p.name))
	return err
}

// deleteOld runs a DELETE until it finds less than a batch.
func (s *Store) deleteOld(ctx context.Context, sql string, age time.Duration) error {
	for {
		tag, err := s.pool.Exec(ctx, sql, age.Microseconds(), sweepBatch)
		if err != nil {
			return fmt.Errorf("delete old rows: %w", err)
		}
		if tag.RowsAffected() < sweepBatch {
			return nil
		}
	}
}
