package main

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/postrider/postrider"
)

func ExampleLine_Cents() {
	l := Line{UnitCents: 1999, Qty: 3, DiscountBP: 1250} // 12.5 % off 59.97
	fmt.Println(money(l.Cents()))
	// Output: 52.47
}

func TestCentsAreRoundedHalfUp(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		line Line
		want int64
	}{
		{Line{UnitCents: 1, Qty: 1, DiscountBP: 5000}, 1},
		{Line{UnitCents: 1, Qty: 1, DiscountBP: 5001}, 0},
		{Line{UnitCents: 333, Qty: 3, DiscountBP: 0}, 999},
		{Line{UnitCents: 100, Qty: 1, DiscountBP: 10_000}, 0},
		{Line{UnitCents: maxCents, Qty: maxQty}, maxCents * maxQty}, // no overflow at the limits
	} {
		if got := c.line.Cents(); got != c.want {
			t.Errorf("%+v: %d cents, want %d", c.line, got, c.want)
		}
	}
}

func TestOrderChecks(t *testing.T) {
	t.Parallel()
	good := func() *Order {
		return &Order{ID: 1, Customer: "Ørsted", Lines: []Line{{SKU: 1, UnitCents: 100, Qty: 1}}}
	}
	if err := good().check(); err != nil {
		t.Fatal(err)
	}
	for field, spoil := range map[string]func(*Order){
		"order":                func(o *Order) { o.ID = 0 },
		"customer":             func(o *Order) { o.Customer = " " },
		"freight_cents":        func(o *Order) { o.FreightCents = -1 },
		"lines":                func(o *Order) { o.Lines = nil },
		"lines[0].qty":         func(o *Order) { o.Lines[0].Qty = maxQty + 1 },
		"lines[0].unit_cents":  func(o *Order) { o.Lines[0].UnitCents = -1 },
		"lines[0].discount_bp": func(o *Order) { o.Lines[0].DiscountBP = 10_001 },
	} {
		o := good()
		spoil(o)
		if err := o.check(); !errors.Is(err, postrider.InvalidArgument) || !strings.HasPrefix(err.Error(), field+" ") {
			t.Errorf("%v, want InvalidArgument that names %s", err, field)
		}
	}
}

// balancedSample is the books of a shop that sold one order and undid another.
func balancedSample() *books {
	return &books{
		Orders:   OrdersFigures{Placed: 2, Units: 5, Completed: 1, Cents: 700, Compensated: 1, Why: map[string]int{"no stock": 1}},
		Stock:    StockFigures{Taken: map[int64]int64{1: 2, 2: 1}, OrdersSeen: 2, UnitsOrdered: 5},
		Payments: PaymentsFigures{Charged: 900, Refunded: 200, Sales: 1, SalesCents: 700},
		Shipping: ShippingFigures{Shipments: 1, Shipped: map[int64]int64{1: 2, 2: 1}},
	}
}

func TestEveryImbalanceIsSeen(t *testing.T) {
	t.Parallel()
	accepted := map[int64]Receipt{1: {}, 2: {}}
	result := func(b *books) (good bool, out string) {
		var w strings.Builder
		good = report(&w, &tally{lines: 2, completed: 1, compensated: 1}, b, b.checks(accepted), time.Second)
		return good, w.String()
	}
	if good, out := result(balancedSample()); !good || !strings.Contains(out, balancedBooks) {
		t.Fatalf("balanced books are reported as %v:\n%s", good, out)
	}
	for what, spoil := range map[string]func(*books){
		"an order is lost":         func(b *books) { b.Orders.Placed, b.Stock.OrdersSeen = 1, 1 },
		"an order has no end":      func(b *books) { b.Orders.Unfinished = 1 },
		"stock is lost":            func(b *books) { b.Stock.Taken[1]++ },
		"another product shipped":  func(b *books) { b.Shipping.Shipped = map[int64]int64{1: 2, 3: 1} },
		"product never taken":      func(b *books) { b.Shipping.Shipped[9] = 1 },
		"a cent is lost":           func(b *books) { b.Payments.Charged-- },
		"a refund is lost":         func(b *books) { b.Payments.Refunded = 0 },
		"a shipment is lost":       func(b *books) { b.Shipping.Shipments = 0 },
		"a shipment is doubled":    func(b *books) { b.Shipping.OrdersTwice = 1 },
		"a sale is lost":           func(b *books) { b.Payments.Sales = 0 },
		"a sale is doubled":        func(b *books) { b.Payments.SalesTwice = 1 },
		"a sale has another value": func(b *books) { b.Payments.SalesCents = 701 },
		"an event is lost":         func(b *books) { b.Stock.OrdersSeen = 1 },
		"an event is doubled":      func(b *books) { b.Stock.OrdersTwice = 1 },
		"an event is another":      func(b *books) { b.Stock.UnitsOrdered = 4 },
	} {
		b := balancedSample()
		spoil(b)
		if good, out := result(b); good || !strings.Contains(out, "WRONG") {
			t.Errorf("%s: reported as %v:\n%s", what, good, out)
		}
	}
}

func TestReportOfLines(t *testing.T) {
	t.Parallel()
	b := balancedSample()
	for name, spoilt := range map[string]*tally{
		"rejected: line 7: broken":   {bad: []complaint{{7, errors.New("broken")}}},
		"unfinished: line 8: vanish": {lost: []complaint{{8, errors.New("vanished")}}},
	} {
		var w strings.Builder
		if report(&w, spoilt, b, b.checks(nil), time.Second) || !strings.Contains(w.String(), name) {
			t.Errorf("want a bad report that says %q, got:\n%s", name, w.String())
		}
	}
}

func FuzzLines(f *testing.F) {
	f.Add("{\"order\": 1}\n\n{\"order\": 2}")
	f.Add("\n\r\n \t\n{")
	f.Add("\"" + strings.Repeat("ä", 1000) + "\"\n")
	f.Fuzz(func(t *testing.T, text string) {
		last, total := 0, int64(0)
		err := lines(strings.NewReader(text), func(number int, line []byte, length int64) error {
			if number <= last || strings.Contains(string(line), "\n") || length < int64(len(line)) {
				t.Errorf("line %d after %d: %q of %d bytes", number, last, line, length)
			}
			last, total = number, total+length
			if o, err := parse[Order](line); err == nil {
				_ = o.check() // must not panic
			}
			return nil
		})
		if err != nil || total > int64(len(text)) || last > strings.Count(text, "\n")+1 {
			t.Errorf("%d lines of %d bytes in a text of %d: %v", last, total, len(text), err)
		}
	})
}
