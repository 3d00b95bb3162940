package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/devstack"
	"github.com/postrider/postrider/outbox"
)

// limited stands for a bus whose stream refuses an order, until it is mended.
type limited struct {
	printer
	mended atomic.Bool
}

func (l *limited) Publish(ctx context.Context, msgs ...*postrider.Message) error {
	errs := make([]error, len(msgs))
	for i, m := range msgs {
		if string(m.Data) == `{"id":"o-2","customer":"Bob"}` && !l.mended.Load() {
			errs[i] = postrider.Permanent(errors.New("the stream takes no order of Bob"))
		} else {
			errs[i] = l.printer.Publish(ctx, m)
		}
	}
	return &postrider.BatchError{Errs: errs}
}

// What was refused for good, and what was sent, is published again by a filter: of topic, key, cause and time.
func ExampleOutbox_Resend() {
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
	if err := outbox.Migrate(ctx, pool, "redriven"); err != nil {
		panic(err)
	}
	ob, err := outbox.New(outbox.Config{Schema: "redriven", Source: "//shop/orders"})
	if err != nil {
		panic(err)
	}
	bus := &limited{printer: printer{sent: make(chan string)}}
	relay, err := outbox.NewRelay(pool, bus, outbox.RelayConfig{Outbox: ob})
	if err != nil {
		panic(err)
	}
	done := make(chan error)
	go func() { done <- relay.Run(ctx) }()
	for _, o := range []Order{{"o-1", "Ada"}, {"o-2", "Bob"}, {"o-3", "Cy"}} {
		if err := OrderPlaced.Publish(ctx, ob.On(pool), &o); err != nil {
			panic(err)
		}
	}
	fmt.Println(<-bus.sent)
	fmt.Println(<-bus.sent)

	letters := ob.DeadLetters(pool)
	for {
		dead, _, err := letters.List(ctx, outbox.Filter{Topic: "orders.>"}, 0, 0)
		if err != nil {
			panic(err)
		}
		if len(dead) > 0 {
			fmt.Println("dead:", dead[0].Key, "for", dead[0].Cause)
			break
		}
	}
	bus.mended.Store(true)
	ada := outbox.Action{By: "Ada", Why: "the stream is mended"}
	n, err := letters.ReplayAll(ctx, outbox.Filter{Cause: "of Bob"}, ada)
	fmt.Println(n, err, <-bus.sent)

	for n, err = 0, nil; n == 0 && err == nil; { // until the relay has written down that it was sent
		n, err = ob.Resend(ctx, pool, outbox.Filter{Topic: "orders.*.v1", Key: "Cy"}, true, ada)
	}
	fmt.Println(n, err, <-bus.sent)

	stop()
	fmt.Println(<-done)
	// Output:
	// o-1 of Ada
	// o-3 of Cy
	// dead: Bob for the stream takes no order of Bob
	// 1 <nil> o-2 of Bob
	// 1 <nil> o-3 of Cy
	// <nil>
}
