package main

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/idempotency"
)

// subscriber is what a service needs to handle events: a bus, or in tests the one in memory.
type subscriber interface {
	Subscribe(h postrider.Handler, opts ...bus.SubscribeOption) error
}

func subscribe(b subscriber, mailed chan<- string) error {
	confirm := func(_ context.Context, e postrider.Event[Order]) error {
		if e.Value.Cents <= 0 {
			return postrider.Permanent(fmt.Errorf("order %s costs nothing", e.Value.ID)) // to the dead letters, at once
		}
		mailed <- e.Value.Customer
		return nil // an error would be retried, then stored in the dead letters with its cause
	}
	return b.Subscribe(OrderPlaced.Handler(confirm), bus.Group("mailer"), bus.Concurrency(32),
		bus.Retry(postrider.RetryPolicy{Attempts: 8, Initial: 100 * time.Millisecond}))
}

func countSales(b subscriber, store *idempotency.Store) error {
	return b.Subscribe(idempotency.Handler(store, "sales", OrderPlaced,
		func(ctx context.Context, tx pgx.Tx, e postrider.Event[Order]) error {
			_, err := tx.Exec(ctx, `insert into sales (order_id, cents) values ($1, $2)`, e.Value.ID, e.Value.Cents)
			return err // nil commits the row together with the note that this event was handled
		}), bus.Group("sales"))
}
