package membus_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest/membus"
)

// Subscriber is what a service registers with, in production a *bus.Bus.
type Subscriber interface {
	Subscribe(h postrider.Handler, opts ...bus.SubscribeOption) error
}

// register is the code under test: it ships what was placed.
func register(b Subscriber, p postrider.Publisher) error {
	return b.Subscribe(placed.Handler(func(ctx context.Context, e postrider.Event[order]) error {
		if e.Value.ID == "" {
			return postrider.Permanent(errors.New("an order without an id"))
		}
		return shipped.Publish(ctx, p, e.Value)
	}), bus.Concurrency(4))
}

func Example() {
	ctx, cancel := context.WithCancel(context.Background())
	b, err := new(membus.Broker).New(bus.Config{
		Source: "//shop/shipping", Group: "shipping",
		Streams: []bus.Stream{{Name: "ORDERS", Topics: []string{"orders.>"}}},
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := register(b, b); err != nil {
		log.Fatal(err)
	}
	arrived := make(chan postrider.Event[order])
	err = b.Subscribe(shipped.Handler(func(_ context.Context, e postrider.Event[order]) error { arrived <- e; return nil }))
	if err != nil {
		log.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- postrider.Run(ctx, b) }()
	<-b.Started()

	if err := placed.PublishAll(ctx, b, []*order{{}, {ID: "o-17"}}); err != nil {
		log.Fatal(err)
	}
	fmt.Println("shipped", (<-arrived).Value.ID)
	cancel()
	if err := <-done; err != nil {
		log.Fatal(err)
	}
	letters, _, err := b.DeadLetters().List(context.Background(), bus.LetterFilter{}, 0, 0)
	for _, l := range letters {
		fmt.Println("dead letter of", l.Group+":", l.Cause)
	}
	fmt.Println(err)
	// Output:
	// shipped o-17
	// dead letter of shipping: an order without an id
	// <nil>
}
