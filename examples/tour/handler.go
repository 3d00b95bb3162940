package main

import (
	"context"
	"fmt"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
)

func subscribe(b *bus.Bus, mailed chan<- string) error {
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
