package outbox_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/devstack"
	"github.com/postrider/postrider/outbox"
)

type Order struct {
	ID       string `json:"id"`
	Customer string `json:"customer"`
}

var OrderPlaced = postrider.NewTopic[Order]("orders.placed.v1", postrider.KeyBy(func(o *Order) string { return o.Customer }))

// printer stands for the bus.
type printer struct{ sent chan string }

func (p printer) Publish(_ context.Context, msgs ...*postrider.Message) error {
	for _, m := range msgs {
		e, err := OrderPlaced.Decode(m)
		if err != nil {
			return err
		}
		p.sent <- fmt.Sprintf("%s of %s", e.Value.ID, m.Key())
	}
	return nil
}

func Example() {
	ctx, stop := context.WithCancel(context.Background())
	server, err := devstack.StartPostgres(ctx, devstack.PostgresConfig{})
	if err != nil {
		panic(err)
	}
	defer server.Close()
	pool, err := pgxpool.New(ctx, server.URL)
	if err != nil {
		panic(err)
	}
	defer pool.Close()

	if err := outbox.Migrate(ctx, pool, "shop"); err != nil {
		panic(err)
	}
	ob, err := outbox.New(outbox.Config{Schema: "shop", Source: "//shop/orders"})
	if err != nil {
		panic(err)
	}
	bus := printer{sent: make(chan string)}
	relay, err := outbox.NewRelay(pool, bus, outbox.RelayConfig{Outbox: ob})
	if err != nil {
		panic(err)
	}
	done := make(chan error)
	go func() { done <- relay.Run(ctx) }()

	place := func(o Order, problem error) error {
		return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			// ... business writes ...
			if err := OrderPlaced.Publish(ctx, ob.In(tx), &o); err != nil {
				return err
			}
			return problem
		})
	}
	fmt.Println(place(Order{"o-1", "Ada"}, nil), <-bus.sent)
	fmt.Println(place(Order{"o-2", "Bob"}, errors.New("no money")))
	fmt.Println(place(Order{"o-3", "Cy"}, nil), <-bus.sent)

	stop()
	fmt.Println(<-done)
	// Output:
	// <nil> o-1 of Ada
	// no money
	// <nil> o-3 of Cy
	// <nil>
}
