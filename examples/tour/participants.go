package main

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/idempotency"
)

// participate serves the saga's commands. The barrier runs each action and each compensation once, in one transaction
// with its effect; these effects are trivial, the shop's are not.
func participate(b *bus.Bus, store *idempotency.Store) error {
	return errors.Join(
		b.Subscribe(idempotency.Action(store, Reserve, func(_ context.Context, _ pgx.Tx, o *Order) (*Hold, error) {
			return &Hold{ID: "hold-" + o.ID}, nil
		})),
		b.Subscribe(idempotency.Compensation(store, Release, func(context.Context, pgx.Tx, *Hold, *Hold) error {
			return nil
		})),
		b.Subscribe(idempotency.Action(store, Charge, func(_ context.Context, _ pgx.Tx, o *Order) (*Payment, error) {
			if o.Cents > 100_000 {
				return nil, postrider.Errorf(postrider.FailedPrecondition, "the card of %s is refused", o.Customer)
			}
			return &Payment{ID: "pay-" + o.ID}, nil
		})),
		b.Subscribe(idempotency.Compensation(store, Refund, func(context.Context, pgx.Tx, *Payment, *Payment) error {
			return nil
		})),
		b.Subscribe(idempotency.Action(store, Ship, func(_ context.Context, _ pgx.Tx, o *Order) (*Parcel, error) {
			return &Parcel{ID: "parcel-" + o.ID}, nil
		})),
	)
}
