package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/rpc"
)

// books are the figures of all services.
type books struct {
	Orders   OrdersFigures
	Stock    StockFigures
	Payments PaymentsFigures
	Shipping ShippingFigures
}

// check is one thing that must hold over the books of several services.
type check struct {
	what string
	ok   bool
	seen string
}

// collect asks each service for its books, orders last: it sends what the others count.
func (l *loader) collect(ctx context.Context) (*books, error) {
	b := &books{}
	if err := ask(ctx, l, StockBooks, &b.Stock); err != nil {
		return nil, err
	}
	if err := ask(ctx, l, PaymentsBooks, &b.Payments); err != nil {
		return nil, err
	}
	if err := ask(ctx, l, ShippingBooks, &b.Shipping); err != nil {
		return nil, err
	}
	return b, ask(ctx, l, OrdersBooks, &b.Orders)
}

func ask[Res any](ctx context.Context, l *loader, m *postrider.Method[Done, Res], into *Res) error {
	res, err := persist(ctx, l, m, &Done{}, rpc.Timeout(time.Minute))
	if err == nil {
		*into = *res
	}
	return err
}

// settle collects the books until they balance. The last events may still be on their way when the last order has ended;
// books that have not balanced when patience ends do not balance.
func (l *loader) settle(ctx context.Context, patience time.Duration) (*books, []check, error) {
	ctx, cancel := context.WithTimeout(ctx, patience+l.patience)
	defer cancel()
	for end := time.Now().Add(patience); ; {
		b, err := l.collect(ctx)
		if err != nil {
			return nil, nil, fmt.Errorf("collect the books: %w", err)
		}
		checks := b.checks(l.tally.accepted)
		if balanced(checks) || time.Now().After(end) {
			return b, checks, nil
		}
		pause(ctx, 50*time.Millisecond)
	}
}

func balanced(checks []check) bool {
	return !slices.ContainsFunc(checks, func(c check) bool { return !c.ok })
}

// checks holds the books of the services against each other.
func (b *books) checks(accepted map[int64]Receipt) []check {
	equal := func(what string, left, right int64, unit string) check {
		return check{what, left == right, fmt.Sprintf("%d and %d %s", left, right, unit)}
	}
	none := func(what string, n int) check { return check{what, n == 0, fmt.Sprintf("%d", n)} }
	o, s, p, h := &b.Orders, &b.Stock, &b.Payments, &b.Shipping
	return []check{
		{"accepted orders are there", o.Placed >= len(accepted), fmt.Sprintf("%d of %d", o.Placed, len(accepted))},
		none("orders without an end", o.Unfinished),
		samePieces(s.Taken, h.Shipped),
		{
			"money charged - refunded = value of completed orders", p.Charged-p.Refunded == o.Cents,
			fmt.Sprintf("%s - %s = %s", money(p.Charged), money(p.Refunded), money(o.Cents)),
		},
		equal("one shipment for each completed order", int64(h.Shipments), int64(o.Completed), "orders"),
		none("orders shipped twice", h.OrdersTwice),
		equal("each completed order announced and handled once", int64(p.Sales), int64(o.Completed), "orders"),
		none("sales handled twice", p.SalesTwice),
		equal("value of the sales handled", p.SalesCents, o.Cents, "cents"),
		equal("each placed order announced and handled once", int64(s.OrdersSeen), int64(o.Placed), "orders"),
		none("placed orders handled twice", s.OrdersTwice),
		equal("pieces in the orders handled", s.UnitsOrdered, o.Units, "pieces"),
	}
}

// samePieces compares stock and shipping product by product.
func samePieces(taken, shipped map[int64]int64) check {
	c := check{what: "stock taken = sum of the lines shipped, for each product", ok: true}
	var pieces int64
	for _, sku := range slices.Sorted(maps.Keys(taken)) {
		pieces += taken[sku]
	}
	c.seen = fmt.Sprintf("%d pieces of %d products", pieces, len(taken))
	all := maps.Clone(taken)
	maps.Copy(all, shipped)
	for _, sku := range slices.Sorted(maps.Keys(all)) {
		if taken[sku] != shipped[sku] {
			c.ok = false
			c.seen += fmt.Sprintf("; of %d taken %d, shipped %d", sku, taken[sku], shipped[sku])
		}
	}
	return c
}

func money(cents int64) string { return fmt.Sprintf("%d.%02d", cents/100, cents%100) }
