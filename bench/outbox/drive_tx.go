package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider/bench/internal/harness"
)

// together has n goroutines do something again and again until the time is up, and returns how often it was done and how long
// it took.
func together(n int, d time.Duration, do func() error) (int64, time.Duration, error) {
	var wg sync.WaitGroup
	var count atomic.Int64
	errs := make([]error, n)
	began := time.Now()
	for i := range n {
		wg.Go(func() {
			for errs[i] == nil && time.Since(began) < d {
				if errs[i] = do(); errs[i] == nil {
					count.Add(1)
				}
			}
		})
	}
	wg.Wait()
	return count.Load(), time.Since(began), errors.Join(errs...)
}

// turns has two kinds of work take turns with all writers, so that a slow moment meets both.
func (r *cellRun) turns(with, without func() error) (result, error) {
	var n, others int64
	var took, tookOthers time.Duration
	m, err := harness.StartMeter(r.job)
	if err != nil {
		return result{}, err
	}
	pairs := max(2, int(2*r.job.Duration()/slice)+1)
	for i := range 2 * pairs {
		d := slice
		if i < 2 {
			d = slice / 4 // warms up
		}
		work := with
		isWith := i%4 == 0 || i%4 == 3
		if !isWith {
			work = without
		}
		done, t, err := together(writers, d, work)
		switch {
		case err != nil:
			return result{}, err
		case i < 2:
		case isWith:
			n, took = n+done, took+t
		default:
			others, tookOthers = others+done, tookOthers+t
		}
	}
	_, err = m.Stop(1) // what it cost is that of both
	return result{Messages: n, Rate: float64(n) / took.Seconds(), Base: float64(others) / tookOthers.Seconds()}, err
}

// prepare makes the tables of the business and returns a transaction's part in them.
func (r *cellRun) prepare(ctx context.Context) (work func(context.Context, pgx.Tx) error, err error) {
	_, err = r.pool.Exec(ctx, fmt.Sprintf(`
		create table account (id int primary key, due int) with (fillfactor = 70);
		insert into account select g, 0 from generate_series(0, %d) g;
		create table purchase (id bigint primary key, account int, note text);
		analyze`, accounts-1))
	return func(ctx context.Context, tx pgx.Tx) error {
		for sql, args := range r.statements(1) {
			if _, err := tx.Exec(ctx, sql, args...); err != nil {
				return err
			}
		}
		return nil
	}, err
}

// statements are those of n pieces of work, the same ones for each: all UPDATEs first, in the order of their keys lest
// transactions should run into a deadlock.
func (r *cellRun) statements(n int) iter.Seq2[string, []any] {
	ids, owners := make([]int64, n), make([]int64, n)
	for i := range ids {
		ids[i] = r.works.Add(1)
		owners[i] = ids[i] * 7919 % accounts
	}
	slices.Sort(owners)
	return func(yield func(string, []any) bool) {
		for _, owner := range owners {
			if !yield(`update account set due = due + 1 where id = $1`, []any{owner}) {
				return
			}
		}
		for i, id := range ids {
			if !yield(`insert into purchase (id, account, note) values ($1, $2, $3)`, []any{id, owners[i], r.pad}) {
				return
			}
		}
	}
}

// business compares a transaction with messages with the same without.
func (r *cellRun) business(ctx context.Context) (result, error) {
	work, err := r.prepare(ctx)
	if err != nil {
		return result{}, err
	}
	res, err := r.turns(func() error {
		orders := r.orders(r.cell.n)
		return pgx.BeginFunc(ctx, r.begins(), func(tx pgx.Tx) error {
			if err := work(ctx, tx); err != nil {
				return err
			}
			return r.session.publish(ctx, tx, orders)
		})
	}, func() error {
		return pgx.BeginFunc(ctx, r.pool, func(tx pgx.Tx) error { return work(ctx, tx) })
	})
	if err != nil {
		return res, err
	}
	return r.checkTable(ctx, res)
}

// insert has writers publish in transactions of their own.
func (r *cellRun) insert(ctx context.Context) (result, error) {
	callers, size := r.cell.n, 1
	if r.cell.kind == bulk {
		callers, size = 1, r.cell.n
	}
	do := func() error { return r.commit(ctx, size) }
	if _, _, err := together(callers, slice, do); err != nil { // warms up
		return result{}, err
	}
	m, err := harness.StartMeter(r.job)
	if err != nil {
		return result{}, err
	}
	before, err := r.position(ctx)
	if err != nil {
		return result{}, err
	}
	n, took, err := together(callers, r.job.Duration(), do)
	n *= int64(size)
	res, stopErr := m.Stop(n)
	res.Rate = float64(n) / took.Seconds()
	if err := errors.Join(err, stopErr); err != nil {
		return res, err
	}
	after, err := r.position(ctx)
	if err != nil {
		return res, err
	}
	res.WAL = float64(after-before) / float64(n)
	return r.checkTable(ctx, res)
}

// checkTable counts what was committed.
func (r *cellRun) checkTable(ctx context.Context, res result) (result, error) {
	var n int64
	err := r.pool.QueryRow(ctx, "select count(*) from "+r.session.table()).Scan(&n)
	published := r.numbers.Load()
	res.Lost, res.Twice = max(published-n, 0), max(n-published, 0)
	return res, err
}

// position returns how much WAL was written so far.
func (r *cellRun) position(ctx context.Context) (n int64, err error) {
	err = r.admin.QueryRow(ctx, "select (pg_current_wal_insert_lsn() - '0/0')::bigint").Scan(&n)
	return n, err
}

// sustained has writers publish as fast as they can while the relay runs, and measures what the two of them do and leave
// behind.
func (r *cellRun) sustained(ctx context.Context) (result, error) {
	stop, err := r.session.relay(ctx)
	if err != nil {
		return result{}, err
	}
	do := func() error { return r.commit(ctx, 1) }
	if _, _, err := together(r.cell.n, slice, do); err != nil { // warms up
		return result{}, errors.Join(err, stop())
	}
	m, err := harness.StartMeter(r.job)
	if err != nil {
		return result{}, errors.Join(err, stop())
	}
	before, err := r.position(ctx)
	if err != nil {
		return result{}, errors.Join(err, stop())
	}
	n, took, err := together(r.cell.n, 3*r.job.Duration(), do)
	sent, countErr := r.count(ctx)
	backlog := r.numbers.Load() - sent
	_, last, awaitErr := r.await(ctx, r.numbers.Load(), drainTime)
	after, lsnErr := r.position(ctx)
	res, stopErr := m.Stop(n)
	res.Rate, res.Backlog, res.WAL = float64(n)/took.Seconds(), backlog, float64(after-before)/float64(n)
	if err := errors.Join(err, countErr, awaitErr, lsnErr, stopErr, stop()); err != nil {
		return res, err
	}
	if last.n < r.numbers.Load() {
		return res, fmt.Errorf("%d of %d messages have not arrived", r.numbers.Load()-last.n, r.numbers.Load())
	}
	if res.Dead, err = r.dead(ctx); err != nil {
		return res, err
	}
	return r.check(ctx, res, r.numbers.Load())
}

// dead returns how many row versions a message has left behind: each update and each deletion leaves one. A session counts
// when it ends.
func (r *cellRun) dead(ctx context.Context) (float64, error) {
	r.pool.Reset()
	for r.pool.Stat().TotalConns() > 0 && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	var n float64
	err := r.pool.QueryRow(ctx, "select coalesce(sum(n_tup_upd + n_tup_del), 0)::float8 from pg_stat_user_tables").Scan(&n)
	return n / float64(r.numbers.Load()), err
}

// idle counts the transactions of a relay that has nothing to do; its queries are transactions of their own.
func (r *cellRun) idle(ctx context.Context) (result, error) {
	if err := r.commit(ctx, 1); err != nil {
		return result{}, err
	}
	stop, err := r.session.relay(ctx)
	if err != nil {
		return result{}, err
	}
	_, _, err = r.await(ctx, 1, drainTime)
	time.Sleep(2 * time.Second) // for it to come to rest
	before, beforeErr := r.transactions(ctx)
	began := time.Now()
	time.Sleep(idleTime)
	after, afterErr := r.transactions(ctx)
	took := time.Since(began)
	if err := errors.Join(err, beforeErr, afterErr, stop()); err != nil {
		return result{}, err
	}
	res := result{Messages: after - before, Rate: float64(after-before) / took.Seconds()}
	return r.check(ctx, res, 1)
}

func (r *cellRun) transactions(ctx context.Context) (n int64, err error) {
	err = r.admin.QueryRow(ctx, "select xact_commit + xact_rollback from pg_stat_database where datname = $1",
		strings.ToLower(r.database)).Scan(&n)
	return n, err
}

// dedup compares handlers: see the session.
func (r *cellRun) dedup(ctx context.Context) (result, error) {
	h, ok := r.session.(interface {
		handlers(ctx context.Context, r *cellRun) (with, without func() error, err error)
	})
	if !ok {
		return result{}, errors.New("it has no handlers")
	}
	with, without, err := h.handlers(ctx, r)
	if err != nil {
		return result{}, err
	}
	res, err := r.turns(with, without)
	if n := r.cell.n; n > 0 {
		res.Messages, res.Rate = res.Messages*int64(n), res.Rate*float64(n)
	}
	return res, err
}
