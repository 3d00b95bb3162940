package main

import (
	"context"
	"errors"
	"strconv"
	"sync/atomic"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/idempotency"
)

// handlers returns what a cell compares.
func (r *rider) handlers(ctx context.Context, run *cellRun) (with, without func() error, err error) {
	if err := idempotency.Migrate(ctx, r.pool, ""); err != nil {
		return nil, nil, err
	}
	store, err := idempotency.New(r.pool, idempotency.Config{})
	if err != nil {
		return nil, nil, err
	}
	if run.cell.kind == remembered {
		return r.remembered(ctx, run, store)
	}
	return r.handling(ctx, run, store)
}

// handling returns an idempotent handler at work, each time on another message, and the same work without.
func (r *rider) handling(ctx context.Context, run *cellRun, store *idempotency.Store) (with, without func() error, err error) {
	work, err := run.prepare(ctx)
	if err != nil {
		return nil, nil, err
	}
	once := idempotency.Handler(store, "bench", r.topic, func(ctx context.Context, tx pgx.Tx, _ postrider.Event[order]) error {
		return work(ctx, tx)
	})
	plain := r.topic.Handler(func(ctx context.Context, _ postrider.Event[order]) error {
		return pgx.BeginFunc(ctx, r.pool, func(tx pgx.Tx) error { return work(ctx, tx) })
	})
	message := func() (*postrider.Message, error) {
		m, err := r.topic.Message(ctx, run.orders(1)[0])
		if err == nil {
			m.Source = source
		}
		return m, err
	}
	handle := func(h postrider.Handler) func() error {
		return func() error {
			m, err := message()
			if err == nil {
				_, err = h.Handle(ctx, m)
			}
			return err
		}
	}
	if run.cell.n == 0 {
		return handle(once), handle(plain), nil
	}
	batched := idempotency.BatchHandler(store, "bench", r.topic, func(ctx context.Context, tx pgx.Tx, events []postrider.Event[order]) error {
		b := &pgx.Batch{}
		for sql, args := range run.statements(len(events)) {
			b.Queue(sql, args...)
		}
		return tx.SendBatch(ctx, b).Close()
	})
	return func() error {
		msgs := make([]*postrider.Message, run.cell.n)
		for i := range msgs {
			var err error
			if msgs[i], err = message(); err != nil {
				return err
			}
		}
		return errors.Join(batched.HandleBatch(ctx, msgs)...)
	}, handle(plain), nil
}

// remembered returns a Do whose key was used before, one of many, and a SELECT by a primary key.
func (r *rider) remembered(ctx context.Context, run *cellRun, store *idempotency.Store) (with, without func() error, err error) {
	method := postrider.NewMethod[order, order]("orders.v1/Place")
	var next atomic.Int64
	do := func() error {
		n := next.Add(1) % keys
		_, err := idempotency.Do(ctx, store, method, "key-"+strconv.FormatInt(n, 10), &order{Number: n}, func(context.Context, *order) (*order, error) {
			return &order{Number: n, Pad: run.pad}, nil
		})
		return err
	}
	for range keys {
		if err := do(); err != nil {
			return nil, nil, err
		}
	}
	_, err = r.pool.Exec(ctx, `create table answer (key text primary key, data text);
		insert into answer select 'key-' || g, repeat('x', 256) from generate_series(0, 999) as g; analyze`)
	return do, func() error {
		var data string
		key := "key-" + strconv.FormatInt(next.Add(1)%keys, 10)
		return r.pool.QueryRow(ctx, `select data from answer where key = $1`, key).Scan(&data)
	}, err
}
