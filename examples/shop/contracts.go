package main

import (
	"strconv"

	"github.com/postrider/postrider"
)

// The contracts of the shop: what its services say to each other, and the only thing they share. Each is written once;
// the side that sends and the side that handles use the same value.

// Events. An order's events are keyed by the order, so that they keep their order.
var (
	OrderPlaced = postrider.NewTopic[Order]("orders.placed.v1",
		postrider.KeyBy(func(o *Order) string { return o.key() }))
	OrderCompleted = postrider.NewTopic[Sale]("orders.completed.v1",
		postrider.KeyBy(func(s *Sale) string { return strconv.FormatInt(s.Order, 10) }))
)

// Calls, answered at once or not at all.
var (
	PlaceOrder  = postrider.NewMethod[Order, Receipt]("orders.v1/Place")
	AwaitOrder  = postrider.NewMethod[Receipt, Outcome]("orders.v1/Await")
	AddProducts = postrider.NewMethod[Catalogue, Done]("stock.v1/AddProducts")
	FindUnknown = postrider.NewMethod[SKUs, SKUs]("stock.v1/FindUnknown")
	AddAccounts = postrider.NewMethod[Customers, Done]("payments.v1/AddAccounts")
)

// Commands, sent by the saga in placing.go and kept until their service has handled them.
var (
	ReserveStock   = postrider.NewMethod[Reservation, Done]("stock.v1/Reserve")
	ReleaseStock   = postrider.NewMethod[OrderRef, Done]("stock.v1/Release")
	ChargeCustomer = postrider.NewMethod[Charge, Payment]("payments.v1/Charge")
	RefundCustomer = postrider.NewMethod[OrderRef, Done]("payments.v1/Refund")
	BookShipment   = postrider.NewMethod[Order, Shipment]("shipping.v1/Book")
)

// The books of each service, for the check at the end.
var (
	OrdersBooks   = postrider.NewMethod[Done, OrdersFigures]("orders.v1/Books")
	StockBooks    = postrider.NewMethod[Done, StockFigures]("stock.v1/Books")
	PaymentsBooks = postrider.NewMethod[Done, PaymentsFigures]("payments.v1/Books")
	ShippingBooks = postrider.NewMethod[Done, ShippingFigures]("shipping.v1/Books")
)

type (
	// Order is one order, as it stands on a line of the input. Money is in cents.
	Order struct {
		ID           int64  `json:"order"`
		Customer     string `json:"customer"`
		ShipVia      int    `json:"ship_via"` // the carrier, 1 to 3
		ShipName     string `json:"ship_name"`
		City         string `json:"city"`
		Country      string `json:"country"`
		FreightCents int64  `json:"freight_cents"`
		Lines        []Line `json:"lines"`
	}

	// Line is one product of an order.
	Line struct {
		SKU        int64 `json:"sku"`
		UnitCents  int64 `json:"unit_cents"`
		Qty        int64 `json:"qty"`
		DiscountBP int64 `json:"discount_bp"` // basis points: 500 is 5 %
	}

	// OrderRef names an order.
	OrderRef struct {
		Order int64 `json:"order"`
	}

	// Receipt is the answer to an order. The same order gets the same receipt, however often it is placed.
	Receipt struct {
		Order int64  `json:"order"`
		Cents int64  `json:"cents"`
		Saga  string `json:"saga"` // that carries it
	}

	// Outcome says how an order ended. Ended is false for one that is still under way.
	Outcome struct {
		Ended     bool `json:"ended"`
		Completed bool `json:"completed"`
	}

	// Sale is a completed order.
	Sale struct {
		Order    int64  `json:"order"`
		Customer string `json:"customer"`
		Cents    int64  `json:"cents"`
		Payment  int64  `json:"payment"`
		Shipment int64  `json:"shipment"`
	}

	// Product is one line of the file of products.
	Product struct {
		SKU     int64  `json:"sku"`
		Name    string `json:"name"`
		InStock int64  `json:"in_stock"`
	}

	// Catalogue is products to be stocked. One that is there already stays as it is.
	Catalogue struct {
		Products []Product `json:"products"`
	}

	// SKUs are product numbers.
	SKUs struct {
		SKUs []int64 `json:"skus"`
	}

	// Customer is one line of the file of customers.
	Customer struct {
		ID          string `json:"customer"`
		Name        string `json:"name"`
		CreditCents *int64 `json:"credit_cents,omitempty"` // the most that one charge may be; none: no limit
	}

	// Customers are customers to have an account. One that is there already stays as it is.
	Customers struct {
		Customers []Customer `json:"customers"`
	}

	// Reservation asks for the products of an order.
	Reservation struct {
		Order int64  `json:"order"`
		Lines []Line `json:"lines"`
	}

	// Charge asks for the money of an order.
	Charge struct {
		Order    int64  `json:"order"`
		Customer string `json:"customer"`
		Cents    int64  `json:"cents"`
	}

	// Payment is money that was charged.
	Payment struct {
		ID    int64 `json:"id"`
		Cents int64 `json:"cents"`
	}

	// Shipment is a parcel that a carrier has taken on.
	Shipment struct {
		ID int64 `json:"id"`
	}

	// Done says no more than that.
	Done struct{}
)

type (
	// Traffic counts the messages of a service since its process started: events, commands and replies.
	Traffic struct {
		Published    int64 `json:"published"`
		Handled      int64 `json:"handled"`
		Retried      int64 `json:"retried"`
		DeadLettered int64 `json:"dead_lettered"`
		Duplicates   int64 `json:"duplicates"` // met and not handled again
	}

	// OrdersFigures are the books of the service orders.
	OrdersFigures struct {
		Traffic     Traffic        `json:"traffic"`
		Placed      int            `json:"placed"`
		Units       int64          `json:"units"` // pieces in all placed orders
		Completed   int            `json:"completed"`
		Cents       int64          `json:"cents"` // value of the completed ones
		Compensated int            `json:"compensated"`
		Unfinished  int            `json:"unfinished"`
		Why         map[string]int `json:"why"` // the compensated ones by their cause
	}

	// StockFigures are the books of the service stock.
	StockFigures struct {
		Traffic      Traffic         `json:"traffic"`
		Taken        map[int64]int64 `json:"taken"`         // pieces missing from the shelf, by product
		OrdersSeen   int             `json:"orders_seen"`   // events OrderPlaced that were handled
		OrdersTwice  int             `json:"orders_twice"`  // of these, repetitions
		UnitsOrdered int64           `json:"units_ordered"` // pieces in them
	}

	// PaymentsFigures are the books of the service payments.
	PaymentsFigures struct {
		Traffic    Traffic `json:"traffic"`
		Charged    int64   `json:"charged"`  // cents
		Refunded   int64   `json:"refunded"` // cents
		Sales      int     `json:"sales"`    // events OrderCompleted that were handled
		SalesTwice int     `json:"sales_twice"`
		SalesCents int64   `json:"sales_cents"`
	}

	// ShippingFigures are the books of the service shipping.
	ShippingFigures struct {
		Traffic     Traffic         `json:"traffic"`
		Shipments   int             `json:"shipments"`
		OrdersTwice int             `json:"orders_twice"` // shipments of an order that has one already
		Shipped     map[int64]int64 `json:"shipped"`      // pieces, by product
	}
)

func (o *Order) key() string { return strconv.FormatInt(o.ID, 10) }

// Cents is the value of an order: its lines and its freight.
func (o *Order) Cents() int64 {
	cents := o.FreightCents
	for i := range o.Lines {
		cents += o.Lines[i].Cents()
	}
	return cents
}

// Units is the number of pieces in an order.
func (o *Order) Units() int64 {
	var units int64
	for i := range o.Lines {
		units += o.Lines[i].Qty
	}
	return units
}

// Cents is the value of a line, with its discount, rounded to a cent, half a cent up: the one place where money is
// rounded. The limits that Place checks keep the product within 63 bits.
func (l *Line) Cents() int64 { return (l.UnitCents*l.Qty*(10000-l.DiscountBP) + 5000) / 10000 }
