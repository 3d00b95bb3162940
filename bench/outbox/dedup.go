package main

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/idempotency"
)

// handlers returns an idempotent handler at work, each time on another message, and the same work without.
func (r *rider) handlers(ctx context.Context, run *cellRun) (with, without func() error, err error) {
	work, err := run.prepare(ctx)
	if err != nil {
		return nil, nil, err
	}
	if err := idempotency.Migrate(ctx, r.pool, ""); err != nil {
		return nil, nil, err
	}
	store, err := idempotency.New(r.pool, idempotency.Config{})
	if err != nil {
		return nil, nil, err
	}
	h := idempotency.Handler(store, "bench", r.topic, func(ctx context.Context, tx pgx.Tx, _ postrider.Event[order]) error {
		return work(ctx, tx)
	})
	message := func() (*postrider.Message, error) {
		m, err := r.topic.Message(ctx, run.orders(1)[0])
		if err != nil {
			return nil, err
		}
		m.Source = source
		return m, nil
	}
	with = func() error {
		m, err := message()
		if err != nil {
			return err
		}
		_, err = h.Handle(ctx, m)
		return err
	}
	plain := r.topic.Handler(func(ctx context.Context, _ postrider.Event[order]) error {
		return pgx.BeginFunc(ctx, r.pool, func(tx pgx.Tx) error { return work(ctx, tx) })
	})
	without = func() error {
		m, err := message()
		if err != nil {
			return err
		}
		_, err = plain.Handle(ctx, m)
		return err
	}
	return with, without, nil
}
