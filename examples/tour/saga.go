package main

import (
	"time"

	"github.com/postrider/postrider/saga"
)

var on saga.On[Order]

// PlaceOrder reserves, charges and ships, or takes back what was done.
var PlaceOrder = saga.Define("order.place", 1, func(o *Order) string { return o.ID },
	saga.Step("reserve", saga.Call(Reserve, func(o *Order) *Order { return o }, func(o *Order, h *Hold) { o.Hold = h.ID }),
		saga.Undo(saga.Send(Release, func(o *Order) *Hold { return &Hold{o.Hold} }))),
	saga.Step("charge", saga.Call(Charge, func(o *Order) *Order { return o }, func(o *Order, p *Payment) { o.Receipt = p.ID }),
		saga.Undo(saga.Send(Refund, func(o *Order) *Payment { return &Payment{o.Receipt} })),
		on.Timeout(10*time.Second), on.Retry(5)),
	saga.Pivot("ship", saga.Send(Ship, func(o *Order) *Order { return o })),
	saga.Then("announce", saga.Publish(OrderPlaced, func(o *Order) *Order { return o })),
	on.Deadline(15*time.Minute))
