package main

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/idempotency"
)

// shipping books parcels with the carriers.
type shipping struct{ *service }

func newShipping(_ context.Context, s *service) error {
	h := &shipping{s}
	return errors.Join(
		s.server.Register(ShippingBooks.Handler(h.books)),
		s.handle(idempotency.Action(s.once, BookShipment, h.book)))
}

// book writes a shipment with its lines, once for an order.
func (h *shipping) book(ctx context.Context, tx pgx.Tx, o *Order) (*Shipment, error) {
	carriers := [...]string{"Speedy", "Vereinigte Päckchen", "Føderal"}
	if o.ShipVia < 1 || o.ShipVia > len(carriers) {
		return nil, postrider.Errorf(postrider.FailedPrecondition, "no carrier has the number %d", o.ShipVia)
	}
	var booked Shipment
	err := tx.QueryRow(ctx, `insert into shipment (order_id, carrier, name, city, country) values ($1, $2, $3, $4, $5) returning id`,
		o.ID, carriers[o.ShipVia-1], o.ShipName, o.City, o.Country).Scan(&booked.ID)
	if err != nil {
		return nil, err
	}
	skus, qtys := make([]int64, len(o.Lines)), make([]int64, len(o.Lines))
	for i, l := range o.Lines {
		skus[i], qtys[i] = l.SKU, l.Qty
	}
	_, err = tx.Exec(ctx, `insert into shipment_line (shipment, sku, qty) select $1, * from unnest($2::bigint[], $3::bigint[])`,
		booked.ID, skus, qtys)
	return &booked, err
}

func (h *shipping) books(ctx context.Context, _ *Done) (*ShippingFigures, error) {
	f := &ShippingFigures{Traffic: h.traffic()}
	err := h.db.QueryRow(ctx, `select count(*), count(*) - count(distinct order_id) from shipment`).Scan(&f.Shipments, &f.OrdersTwice)
	if err != nil {
		return nil, err
	}
	f.Shipped, err = piecesBySKU(ctx, h.db, `select sku, sum(qty)::bigint from shipment_line group by sku`)
	return f, err
}

// piecesBySKU reads rows of a product and a number.
func piecesBySKU(ctx context.Context, db *pgxpool.Pool, query string) (map[int64]int64, error) {
	rows, err := db.Query(ctx, query)
	if err != nil {
		return nil, err
	}
	pieces := map[int64]int64{}
	var sku, qty int64
	_, err = pgx.ForEachRow(rows, []any{&sku, &qty}, func() error { pieces[sku] = qty; return nil })
	return pieces, err
}
