package main

import "github.com/postrider/postrider/saga"

// Placing is what the saga of an order knows.
type Placing struct {
	Order    Order    `json:"order"`
	Payment  Payment  `json:"payment"`
	Shipment Shipment `json:"shipment"`
}

// Placement carries an order through the services, to its end or back. Until the shipment is booked every step can be
// undone: when one is refused those before it are, the last one first. After that there is only forward.
var Placement = saga.Define("order.place", 1, func(p *Placing) string { return p.Order.key() },
	saga.Step("reserve", saga.Send(ReserveStock,
		func(p *Placing) *Reservation { return &Reservation{p.Order.ID, p.Order.Lines} }),
		saga.Undo(saga.Send(ReleaseStock, orderRef))),
	saga.Step("charge", saga.Call(ChargeCustomer,
		func(p *Placing) *Charge { return &Charge{p.Order.ID, p.Order.Customer, p.Order.Cents()} },
		func(p *Placing, paid *Payment) { p.Payment = *paid }),
		saga.Undo(saga.Send(RefundCustomer, orderRef))),
	saga.Pivot("ship", saga.Call(BookShipment,
		func(p *Placing) *Order { return &p.Order },
		func(p *Placing, s *Shipment) { p.Shipment = *s })),
	saga.Then("announce", saga.Publish(OrderCompleted, func(p *Placing) *Sale {
		return &Sale{p.Order.ID, p.Order.Customer, p.Order.Cents(), p.Payment.ID, p.Shipment.ID}
	})))

func orderRef(p *Placing) *OrderRef { return &OrderRef{p.Order.ID} }
