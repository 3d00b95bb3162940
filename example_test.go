package postrider_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/postrider/postrider"
)

// Order is the value of an event.
type Order struct {
	ID       string
	Customer string
}

// Reservation is the request of a call.
type Reservation struct{ SKU, Quantity int }

// Held is the response of a call.
type Held struct{ ID string }

// A contract is written once, with its name and its key, and shared by both sides.
func ExampleNewTopic() {
	placed := postrider.NewTopic[Order]("orders.placed.v1", postrider.KeyBy(func(o *Order) string { return o.Customer }))

	m, err := placed.Message(context.Background(), &Order{ID: "o-17", Customer: "Åsa"})
	fmt.Println(m.Type, m.Key(), string(m.Data), err)

	h := placed.Handler(func(_ context.Context, e postrider.Event[Order]) error {
		fmt.Println("confirm", e.Value.ID, "to", e.Value.Customer)
		return nil
	})
	_, err = h.Handle(context.Background(), m)
	fmt.Println(err)
	// Output:
	// orders.placed.v1 Åsa {"ID":"o-17","Customer":"Åsa"} <nil>
	// confirm o-17 to Åsa
	// <nil>
}

// An error keeps its code and details on its way to the caller.
func ExampleMethod_Handler() {
	reserve := postrider.NewMethod[Reservation, Held]("stock.v1/Reserve")
	h := reserve.Handler(func(_ context.Context, r *Reservation) (*Held, error) {
		if r.Quantity > 10 {
			return nil, postrider.Errorf(postrider.FailedPrecondition, "only 10 of %d left", r.SKU)
		}
		return &Held{ID: "h-1"}, nil
	})

	for _, quantity := range []int{2, 99} {
		req, err := reserve.Request(context.Background(), &Reservation{SKU: 11, Quantity: quantity})
		if err != nil {
			fmt.Println(err)
			return
		}
		reply, err := h.Handle(context.Background(), req)
		if err != nil { // a transport does this
			reply = postrider.ErrorReply(req, err)
		}
		res, err := reserve.Response(reply)
		fmt.Println(res, err, errors.Is(err, postrider.FailedPrecondition))
	}
	// Output:
	// &{h-1} <nil> false
	// <nil> only 10 of 11 left (FAILED_PRECONDITION) true
}
