package rpc_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/devstack"
	"github.com/postrider/postrider/rpc"
)

type item struct {
	SKU      int `json:"sku"`
	Quantity int `json:"quantity"`
}

type hold struct {
	ID string `json:"id"`
}

// reserve is the contract, which both sides import.
var reserve = postrider.NewMethod[item, hold]("stock.v1/Reserve")

func Example() {
	ctx, stop := context.WithCancel(context.Background())
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

	srv, err := rpc.NewServer(nc, rpc.ServerConfig{})
	if err != nil {
		log.Fatal(err)
	}
	err = srv.Register(reserve.Handler(func(_ context.Context, it *item) (*hold, error) {
		if it.Quantity > 10 {
			return nil, postrider.Errorf(postrider.FailedPrecondition, "only 10 of %d are left", it.SKU)
		}
		return &hold{ID: fmt.Sprintf("h-%d-%d", it.SKU, it.Quantity)}, nil
	}))
	if err != nil {
		log.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Run(ctx) }()

	client, err := rpc.NewClient(nc, rpc.ClientConfig{Source: "//shop/orders"})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	h, err := rpc.Call(ctx, client, reserve, &item{SKU: 11, Quantity: 2}, rpc.WaitForReady())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(h.ID)

	_, err = rpc.Call(ctx, client, reserve, &item{SKU: 11, Quantity: 20})
	fmt.Println(err, errors.Is(err, postrider.FailedPrecondition))

	stop()
	fmt.Println(<-served)
	// Output:
	// h-11-2
	// call stock.v1/Reserve: only 10 of 11 are left (FAILED_PRECONDITION) true
	// <nil>
}
