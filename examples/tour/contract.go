package main

import "github.com/postrider/postrider"

// Order is what the event and the saga carry.
type Order struct {
	ID       string `json:"id"`
	Customer string `json:"customer"`
	Cents    int64  `json:"cents"`
	Hold     string `json:"hold,omitempty"`
	Receipt  string `json:"receipt,omitempty"`
}

type (
	// PriceRequest asks what something costs.
	PriceRequest struct{ SKU string }
	// Price is the answer.
	Price struct{ Cents int64 }
)

// The contracts: written once, imported by both sides.
var (
	OrderPlaced = postrider.NewTopic[Order]("orders.placed.v1",
		postrider.KeyBy(func(o *Order) string { return o.Customer }))
	GetPrice = postrider.NewMethod[PriceRequest, Price]("catalog.v1/GetPrice")
)

type (
	// Hold is the stock's answer.
	Hold struct{ ID string }
	// Payment is the cashier's.
	Payment struct{ ID string }
	// Parcel is the carrier's.
	Parcel struct{ ID string }
	// Nothing is the answer of those who only confirm.
	Nothing struct{}
)

// The commands of the saga.
var (
	Reserve = postrider.NewMethod[Order, Hold]("stock.v1/Reserve")
	Release = postrider.NewMethod[Hold, Nothing]("stock.v1/Release")
	Charge  = postrider.NewMethod[Order, Payment]("payments.v1/Charge")
	Refund  = postrider.NewMethod[Payment, Nothing]("payments.v1/Refund")
	Ship    = postrider.NewMethod[Order, Parcel]("shipping.v1/Book")
)
