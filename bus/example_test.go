package bus_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/internal/devstack"
)

// Order is what the example's event carries.
type Order struct {
	ID       string `json:"id"`
	Customer string `json:"customer"`
}

var OrderPlaced = postrider.NewTopic[Order]("orders.placed.v1",
	postrider.KeyBy(func(o *Order) string { return o.Customer }))

func Example() {
	ctx, cancel := context.WithCancel(context.Background())
	stack, err := devstack.StartNATS(ctx, devstack.NATSConfig{})
	if err != nil {
		log.Fatal(err)
	}
	defer stack.Close()
	nc, err := nats.Connect(stack.URL)
	if err != nil {
		log.Fatal(err)
	}
	defer nc.Close()

	b, err := bus.New(nc, bus.Config{
		Source:  "//shop/orders",
		Streams: []bus.Stream{{Name: "ORDERS", Topics: []string{"orders.>"}}},
	})
	if err != nil {
		log.Fatal(err)
	}
	err = b.Subscribe(OrderPlaced.Handler(func(_ context.Context, e postrider.Event[Order]) error {
		fmt.Println("mail to", e.Value.Customer, "about order", e.Value.ID)
		cancel() // the example is over: drain
		return nil
	}), bus.Group("mailer"), bus.From(bus.DeliverAll))
	if err != nil {
		log.Fatal(err)
	}
	if err := OrderPlaced.Publish(ctx, b, &Order{ID: "o-17", Customer: "Åse"}); err != nil {
		log.Fatal(err)
	}
	if err := postrider.Run(ctx, b); err != nil {
		log.Fatal(err)
	}
	// Output: mail to Åse about order o-17
}

func ExampleBus_Async() {
	ctx := context.Background()
	stack, err := devstack.StartNATS(ctx, devstack.NATSConfig{})
	if err != nil {
		log.Fatal(err)
	}
	defer stack.Close()
	nc, err := nats.Connect(stack.URL)
	if err != nil {
		log.Fatal(err)
	}
	defer nc.Close()
	b, err := bus.New(nc, bus.Config{
		Source:  "//shop/orders",
		Streams: []bus.Stream{{Name: "ORDERS", Topics: []string{"orders.>"}}},
	})
	if err != nil {
		log.Fatal(err)
	}
	a := b.Async(1000, func(m *postrider.Message, err error) {
		if err != nil {
			fmt.Println("lost:", m.ID, err)
		}
	})
	for n := range 5000 { // waits when a thousand have no result yet
		if err := OrderPlaced.Publish(ctx, a, &Order{ID: fmt.Sprintf("o-%d", n)}); err != nil {
			log.Fatal(err)
		}
	}
	if err := a.Flush(ctx); err != nil {
		log.Fatal(err)
	}
	fmt.Println("published", b.Stats().Published)
	// Output: published 5000
}

// Rows cost less when many are written at once. Those that cannot be written fail alone.
func ExampleBatch() {
	ctx, cancel := context.WithCancel(context.Background())
	stack, err := devstack.StartNATS(ctx, devstack.NATSConfig{})
	if err != nil {
		log.Fatal(err)
	}
	defer stack.Close()
	nc, err := nats.Connect(stack.URL)
	if err != nil {
		log.Fatal(err)
	}
	defer nc.Close()

	b, err := bus.New(nc, bus.Config{
		Source:  "//shop/orders",
		Streams: []bus.Stream{{Name: "ORDERS", Topics: []string{"orders.>"}}},
	})
	if err != nil {
		log.Fatal(err)
	}
	err = b.Subscribe(OrderPlaced.BatchHandler(func(_ context.Context, orders []postrider.Event[Order]) error {
		fates := &postrider.BatchError{Errs: make([]error, len(orders))}
		for i, o := range orders {
			if o.Value.Customer == "" {
				fates.Errs[i] = postrider.Permanent(errors.New("an order of nobody"))
			}
		}
		fmt.Println("one insert for", len(orders), "orders:", fates)
		cancel()
		return fates
	}), bus.Group("report"), bus.Batch(3, time.Second), bus.From(bus.DeliverAll))
	if err != nil {
		log.Fatal(err)
	}
	if err := OrderPlaced.PublishAll(ctx, b, []*Order{{"o-17", "Åse"}, {"o-18", ""}, {"o-19", "Bo"}}); err != nil {
		log.Fatal(err)
	}
	if err := postrider.Run(ctx, b); err != nil {
		log.Fatal(err)
	}
	// Output: one insert for 3 orders: 1 of 3 messages failed, the first: an order of nobody
}
