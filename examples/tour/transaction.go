package main

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider/outbox"
)

func placeOrder(ctx context.Context, pool *pgxpool.Pool, ob *outbox.Outbox, o *Order) error {
	return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `insert into orders (id, customer, cents) values ($1, $2, $3)`, o.ID, o.Customer, o.Cents); err != nil {
			return err
		}
		return OrderPlaced.Publish(ctx, ob.In(tx), o) // leaves if, and only if, the transaction commits
	})
}
