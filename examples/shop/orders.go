package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/codec"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/rpc"
	"github.com/postrider/postrider/saga"
)

// orders takes orders and carries each of them through the other services with a saga.
type orders struct {
	*service
	outbox *outbox.Outbox
	engine *saga.Engine
}

func newOrders(ctx context.Context, s *service) error {
	o := &orders{service: s}
	if err := errors.Join(outbox.Migrate(ctx, s.db, s.schema), saga.Migrate(ctx, s.db, s.schema)); err != nil {
		return err
	}
	var err error
	if o.outbox, err = outbox.New(outbox.Config{Schema: s.schema, Source: "//shop/orders"}); err != nil {
		return err
	}
	relay, err := outbox.NewRelay(s.db, s.bus, outbox.RelayConfig{Outbox: o.outbox, LeaseTTL: 2 * time.Second, Logger: s.log})
	if err != nil {
		return err
	}
	if o.engine, err = saga.NewEngine(s.db, o.outbox, saga.Config{Name: "orders", Schema: s.schema, Logger: s.log}, Placement); err != nil {
		return err
	}
	if s.calls, err = rpc.NewClient(s.nc, rpc.ClientConfig{Source: "//shop/orders", Prefix: prefix}); err != nil {
		return err
	}
	s.relay = &restartable{part: relay}
	s.parts = append(s.parts, o.engine, s.relay) // the relay last: it sends what the others commit
	return errors.Join(
		s.server.Register(PlaceOrder.Handler(o.place), AwaitOrder.Handler(o.await), OrdersBooks.Handler(o.books)),
		s.handle(o.engine.Handler()))
}

// place takes an order. The row, the event and the saga are one transaction: all of it happens or none. The same order
// may be placed again, which a caller does that got no answer; it gets the same receipt, and nothing happens twice.
func (o *orders) place(ctx context.Context, order *Order) (*Receipt, error) {
	if err := order.check(); err != nil {
		return nil, err
	}
	if err := o.checkProducts(ctx, order); err != nil {
		return nil, err
	}
	content, err := codec.JSON.Append(nil, order)
	if err != nil {
		return nil, err
	}
	receipt := &Receipt{Order: order.ID, Cents: order.Cents()}
	err = pgx.BeginFunc(ctx, o.db, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `insert into placed_order (id, content, cents, units) values ($1, $2, $3, $4) on conflict do nothing`,
			order.ID, string(content), receipt.Cents, order.Units())
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return compare(ctx, tx, order.ID, string(content))
		}
		if err := OrderPlaced.Publish(ctx, o.outbox.In(tx), order); err != nil {
			return err
		}
		receipt.Saga, err = Placement.Start(ctx, o.engine.In(tx), &Placing{Order: *order})
		return err
	})
	if err == nil && receipt.Saga == "" { // a repetition
		var running *saga.Instance
		if running, err = o.engine.Find(ctx, Placement.Name(), order.key()); err == nil {
			receipt.Saga = running.ID
		}
	}
	return receipt, err
}

// compare tells the repetition of an order from another order of the same number.
func compare(ctx context.Context, tx pgx.Tx, id int64, content string) error {
	var before string
	if err := tx.QueryRow(ctx, `select content from placed_order where id = $1`, id).Scan(&before); err != nil {
		return err
	}
	if before != content {
		return postrider.Errorf(postrider.AlreadyExists, "order %d was placed before with other contents", id)
	}
	return nil
}

// Limits that keep an order's value within 63 bits.
const (
	maxLines = 1000
	maxQty   = 1_000_000
	maxCents = 100_000_000
)

// check finds what is wrong with an order whatever the state of the shop. The error names the field.
func (o *Order) check() error {
	bad := func(field, format string, args ...any) error {
		return postrider.Errorf(postrider.InvalidArgument, "%s %s", field, fmt.Sprintf(format, args...))
	}
	switch {
	case o.ID < 1:
		return bad("order", "is %d: want a positive number", o.ID)
	case strings.TrimSpace(o.Customer) == "":
		return bad("customer", "is empty")
	case o.FreightCents < 0 || o.FreightCents > maxCents:
		return bad("freight_cents", "is %d: want 0 to %d", o.FreightCents, maxCents)
	case len(o.Lines) == 0 || len(o.Lines) > maxLines:
		return bad("lines", "are %d: want 1 to %d", len(o.Lines), maxLines)
	}
	for i, l := range o.Lines {
		field := func(name string) string { return fmt.Sprintf("lines[%d].%s", i, name) }
		switch {
		case l.Qty < 1 || l.Qty > maxQty:
			return bad(field("qty"), "is %d: want 1 to %d", l.Qty, maxQty)
		case l.UnitCents < 0 || l.UnitCents > maxCents:
			return bad(field("unit_cents"), "is %d: want 0 to %d", l.UnitCents, maxCents)
		case l.DiscountBP < 0 || l.DiscountBP > 10_000:
			return bad(field("discount_bp"), "is %d: want 0 to 10000", l.DiscountBP)
		}
	}
	return nil
}

// checkProducts asks stock whether it has heard of the products.
func (o *orders) checkProducts(ctx context.Context, order *Order) error {
	skus := make([]int64, len(order.Lines))
	for i, l := range order.Lines {
		skus[i] = l.SKU
	}
	unknown, err := rpc.Call(ctx, o.calls, FindUnknown, &SKUs{skus})
	if err != nil {
		return err
	}
	if len(unknown.SKUs) > 0 {
		return postrider.Errorf(postrider.InvalidArgument, "lines: the product with sku %d is unknown", unknown.SKUs[0])
	}
	return nil
}

// await answers when an order has ended, or after a second, so that no call waits for long.
func (o *orders) await(ctx context.Context, receipt *Receipt) (*Outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	now, err := o.engine.Wait(ctx, receipt.Saga)
	if errors.Is(err, context.DeadlineExceeded) {
		return &Outcome{}, nil
	}
	if err != nil {
		return nil, err
	}
	return &Outcome{Ended: true, Completed: now.Status == saga.Completed}, nil
}

// books asks the engine how each order stands.
func (o *orders) books(ctx context.Context, _ *Done) (*OrdersFigures, error) {
	rows, err := o.db.Query(ctx, `select id, cents, units from placed_order`)
	if err != nil {
		return nil, err
	}
	type placed struct{ ID, Cents, Units int64 }
	all, err := pgx.CollectRows(rows, pgx.RowToStructByPos[placed])
	if err != nil {
		return nil, err
	}
	f := &OrdersFigures{Traffic: o.traffic(), Placed: len(all), Why: map[string]int{}}
	for _, p := range all {
		s, err := o.engine.Find(ctx, Placement.Name(), fmt.Sprint(p.ID))
		if err != nil {
			return nil, err
		}
		f.Units += p.Units
		switch s.Status {
		case saga.Completed:
			f.Completed++
			f.Cents += p.Cents
		case saga.Compensated:
			f.Compensated++
			f.Why[s.Cause]++
		case saga.Running, saga.Compensating, saga.Parked:
			f.Unfinished++
		}
	}
	return f, nil
}
