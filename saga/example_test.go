package saga_test

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

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

// A plan can be looked at before it runs.
func ExamplePlan_Mermaid() {
	fmt.Print(PlaceOrder.Mermaid())
	// Output:
	// flowchart TD
	//   start([order.place v1])
	//   s1["reserve: call stock.v1/Reserve"]
	//   start --> s1
	//   s1 -. refused .-> compensated
	//   u1["undo reserve: send stock.v1/Release"]
	//   u1 -.-> compensated
	//   s1 -. given up .-> u1
	//   s2["charge: call pay.v1/Charge"]
	//   s1 --> s2
	//   s2 -. refused .-> u1
	//   u2["undo charge: send pay.v1/Refund"]
	//   u2 -.-> u1
	//   s2 -. given up .-> u2
	//   s3{{"ship: call ship.v1/Book"}}
	//   s2 --> s3
	//   s3 -. refused .-> u2
	//   s4["announce: publish orders.shipped.v1"]
	//   s3 --> s4
	//   s4 --> completed([completed])
	//   compensated([compensated])
}

// A saga starts in the transaction that writes the order, and is waited for after its commit.
func ExamplePlan_Start() {
	placeOrder := func(ctx context.Context, pool *pgxpool.Pool, engine *saga.Engine, o *Order) (string, error) {
		var id string
		err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) (err error) {
			if _, err = tx.Exec(ctx, `insert into orders (id, sku, qty) values ($1, $2, $3)`, o.ID, o.SKU, o.Qty); err != nil {
				return err
			}
			id, err = PlaceOrder.Start(ctx, engine.In(tx), o)
			return err
		})
		if err != nil {
			return "", err
		}
		instance, err := engine.Wait(ctx, id)
		if err != nil {
			return "", err
		}
		if instance.Status == saga.Compensated {
			return "", postrider.Errorf(postrider.FailedPrecondition, "the order failed: %s", instance.Cause)
		}
		done, err := PlaceOrder.Data(instance)
		if err != nil {
			return "", err
		}
		return done.Tracking, nil
	}
	_ = placeOrder
}

func ExampleNewPlan() {
	_, err := saga.NewPlan("order.place", 2, func(o *Order) string { return o.ID },
		saga.Step("reserve", saga.Send(ReserveStock, func(o *Order) *ReserveReq { return &ReserveReq{o.SKU, o.Qty} })))
	fmt.Println(err)
	// Output:
	// saga: plan order.place version 2: step "reserve" has no Undo: give it one, or say with NoUndo why it needs none (INVALID_ARGUMENT)
}
