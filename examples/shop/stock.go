package main

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/idempotency"
)

// stock knows how many pieces of each product are on the shelf.
type stock struct{ *service }

func newStock(_ context.Context, s *service) error {
	k := &stock{s}
	return errors.Join(
		s.server.Register(AddProducts.Handler(k.add), FindUnknown.Handler(k.findUnknown), StockBooks.Handler(k.books)),
		s.handle(
			idempotency.Action(s.once, ReserveStock, k.reserve),
			idempotency.Compensation(s.once, ReleaseStock, k.release),
			idempotency.Handler(s.once, "demand", OrderPlaced, k.noteDemand)))
}

// reserve takes an order's products off the shelf, all of them or none. It runs once for an order, however often the
// command comes: the barrier of package idempotency sees to it, in this transaction.
func (k *stock) reserve(ctx context.Context, tx pgx.Tx, r *Reservation) (*Done, error) {
	want := map[int64]int64{} // a product may stand on several lines
	skus := make([]int64, 0, len(r.Lines))
	for _, l := range r.Lines {
		want[l.SKU] += l.Qty
		skus = append(skus, l.SKU)
	}
	have, err := k.lock(ctx, tx, skus)
	if err != nil {
		return nil, err
	}
	if len(have) < len(want) {
		return nil, postrider.Errorf(postrider.NotFound, "order %d has products that are unknown here", r.Order)
	}
	for _, p := range have {
		if p.InStock < want[p.SKU] {
			return nil, postrider.Errorf(postrider.FailedPrecondition, "not enough in stock of %s (sku %d)", p.Name, p.SKU)
		}
	}
	skus, qtys := skus[:0], make([]int64, 0, len(want))
	for sku, qty := range want {
		skus, qtys = append(skus, sku), append(qtys, qty)
	}
	_, err = tx.Exec(ctx, `with want as (
	insert into reservation (order_id, sku, qty) select $1, * from unnest($2::bigint[], $3::bigint[]) returning sku, qty)
update product p set in_stock = p.in_stock - want.qty from want where p.sku = want.sku`, r.Order, skus, qtys)
	return &Done{}, err
}

// release puts back what reserve took.
func (k *stock) release(ctx context.Context, tx pgx.Tx, ref *OrderRef, _ *Done) error {
	rows, err := tx.Query(ctx, `select sku from reservation where order_id = $1`, ref.Order)
	if err != nil {
		return err
	}
	skus, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return err
	}
	if _, err := k.lock(ctx, tx, skus); err != nil {
		return err
	}
	_, err = tx.Exec(ctx, `with back as (delete from reservation where order_id = $1 returning sku, qty)
update product p set in_stock = p.in_stock + back.qty from back where p.sku = back.sku`, ref.Order)
	return err
}

// lock reads products and locks them to the end of the transaction, in the order of their numbers: two orders that want
// the same products in another order would otherwise wait for each other.
func (k *stock) lock(ctx context.Context, tx pgx.Tx, skus []int64) ([]Product, error) {
	rows, err := tx.Query(ctx, `select sku, name, in_stock from product where sku = any($1) order by sku for update`, skus)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[Product])
}

// noteDemand writes down what was asked for. An event may be delivered twice; it is written down once.
func (k *stock) noteDemand(ctx context.Context, tx pgx.Tx, e postrider.Event[Order]) error {
	_, err := tx.Exec(ctx, `insert into demand (order_id, units) values ($1, $2)`, e.Value.ID, e.Value.Units())
	return err
}

// add puts new products on the shelf.
func (k *stock) add(ctx context.Context, c *Catalogue) (*Done, error) {
	var b pgx.Batch
	for _, p := range c.Products {
		if p.InStock < 0 {
			return nil, postrider.Errorf(postrider.InvalidArgument, "in_stock of product %d is %d: want 0 or more", p.SKU, p.InStock)
		}
		b.Queue(`insert into product (sku, name, initial, in_stock) values ($1, $2, $3, $3) on conflict do nothing`, p.SKU, p.Name, p.InStock)
	}
	return &Done{}, k.db.SendBatch(ctx, &b).Close()
}

// findUnknown returns those products of the request that do not exist.
func (k *stock) findUnknown(ctx context.Context, req *SKUs) (*SKUs, error) {
	rows, err := k.db.Query(ctx, `select sku from unnest($1::bigint[]) sku where not exists (select from product p where p.sku = sku.sku)`, req.SKUs)
	if err != nil {
		return nil, err
	}
	unknown, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	return &SKUs{unknown}, err
}

func (k *stock) books(ctx context.Context, _ *Done) (*StockFigures, error) {
	f := &StockFigures{Traffic: k.traffic(), Taken: map[int64]int64{}}
	err := k.db.QueryRow(ctx, `select count(*), count(*) - count(distinct order_id), coalesce(sum(units), 0)::bigint from demand`).
		Scan(&f.OrdersSeen, &f.OrdersTwice, &f.UnitsOrdered)
	if err != nil {
		return nil, err
	}
	f.Taken, err = piecesBySKU(ctx, k.db, `select sku, initial - in_stock from product where initial <> in_stock`)
	return f, err
}
