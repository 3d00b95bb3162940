package saga_test

import (
	"fmt"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/saga"
)

type (
	ReserveReq struct {
		SKU string
		Qty int
	}
	Held      struct{ ID string }
	ChargeReq struct {
		Card  string
		Cents int64
	}
	Paid      struct{ ID string }
	UndoReq   struct{}
	Undone    struct{}
	ShipReq   struct{ Order string }
	Shipment  struct{ Tracking string }
	OrderDone struct{ ID, Tracking string }
)

// The contracts, shared with the services that serve them.
var (
	ReserveStock = postrider.NewMethod[ReserveReq, Held]("stock.v1/Reserve")
	ReleaseStock = postrider.NewMethod[UndoReq, Undone]("stock.v1/Release")
	ChargeCard   = postrider.NewMethod[ChargeReq, Paid]("pay.v1/Charge")
	RefundCard   = postrider.NewMethod[UndoReq, Undone]("pay.v1/Refund")
	BookShipment = postrider.NewMethod[ShipReq, Shipment]("ship.v1/Book")
	OrderShipped = postrider.NewTopic[OrderDone]("orders.shipped.v1")
)

type Order struct {
	ID, SKU, Card, Hold, Payment, Tracking string
	Qty                                    int
	Cents                                  int64
}

var on saga.On[Order]

var PlaceOrder = saga.Define("order.place", 1, func(o *Order) string { return o.ID },
	on.Deadline(15*time.Minute),
	saga.Step("reserve", saga.Call(ReserveStock,
		func(o *Order) *ReserveReq { return &ReserveReq{o.SKU, o.Qty} },
		func(o *Order, h *Held) { o.Hold = h.ID }),
		saga.Undo(saga.Send(ReleaseStock, func(*Order) *UndoReq { return &UndoReq{} }))),
	saga.Step("charge", saga.Call(ChargeCard,
		func(o *Order) *ChargeReq { return &ChargeReq{o.Card, o.Cents} },
		func(o *Order, p *Paid) { o.Payment = p.ID }),
		saga.Undo(saga.Send(RefundCard, func(*Order) *UndoReq { return &UndoReq{} })),
		on.Timeout(10*time.Second), on.Retry(5)),
	saga.Pivot("ship", saga.Call(BookShipment,
		func(o *Order) *ShipReq { return &ShipReq{o.ID} },
		func(o *Order, s *Shipment) { o.Tracking = s.Tracking })),
	saga.Then("announce", saga.Publish(OrderShipped, func(o *Order) *OrderDone { return &OrderDone{o.ID, o.Tracking} })))

func ExampleDefine_nonsense() {
	_, err := saga.NewPlan("order.place", 2, func(o *Order) string { return o.ID },
		saga.Step("reserve", saga.Send(ReserveStock, func(o *Order) *ReserveReq { return &ReserveReq{o.SKU, o.Qty} })))
	fmt.Println(err)
	// Output:
	// saga: plan order.place version 2: step "reserve" has no Undo: give it one, or say with NoUndo why it needs none (INVALID_ARGUMENT)
}
