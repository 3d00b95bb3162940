package saga_test

import (
	"context"
	"fmt"
	"runtime"
	"strconv"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
	"github.com/postrider/postrider/saga"
)

// nowhere is an outbox that drops everything, to measure the journal alone.
type nowhere struct{}

func (nowhere) In(pgx.Tx) postrider.Publisher                        { return nowhere{} }
func (nowhere) Publish(context.Context, ...*postrider.Message) error { return nil }

// BenchmarkJournal is a saga of three steps, four transitions, without transport and with PostgreSQL's fsync off.
func BenchmarkJournal(b *testing.B) {
	pool := postridertest.Postgres(b)
	if err := saga.Migrate(b.Context(), pool, "postrider"); err != nil {
		b.Fatal(err)
	}
	plan := saga.Define("order.bench", 1, func(o *Order) string { return o.ID },
		saga.Step("reserve", saga.Call(ReserveStock,
			func(o *Order) *ReserveReq { return &ReserveReq{o.SKU, o.Qty} },
			func(o *Order, h *Held) { o.Hold = h.ID }), on.NoUndo("a benchmark")),
		saga.Step("charge", saga.Call(ChargeCard,
			func(o *Order) *ChargeReq { return &ChargeReq{o.Card, o.Cents} },
			func(o *Order, p *Paid) { o.Payment = p.ID }), on.NoUndo("a benchmark")),
		saga.Pivot("ship", saga.Call(BookShipment,
			func(o *Order) *ShipReq { return &ShipReq{o.ID} },
			func(o *Order, s *Shipment) { o.Tracking = s.Tracking })))
	e, err := saga.NewEngine(pool, nowhere{}, saga.Config{Name: "bench"}, plan)
	if err != nil {
		b.Fatal(err)
	}
	handler := e.Handler()
	var orders atomic.Int64
	for _, callers := range []int{1, 32} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			b.ReportAllocs()
			b.SetParallelism(max(1, callers/runtime.GOMAXPROCS(0)))
			work := func() {
				o := &Order{ID: strconv.FormatInt(orders.Add(1), 10), SKU: "s-1", Qty: 1, Card: "c-1", Cents: 100}
				var id string
				err := pgx.BeginFunc(b.Context(), pool, func(tx pgx.Tx) (err error) {
					id, err = plan.Start(b.Context(), e.In(tx), o)
					return err
				})
				for _, step := range []string{"reserve", "charge", "ship"} {
					key := id + "/" + step + "/do"
					m := &postrider.Message{ID: key + "/1.reply", Data: []byte(`{"ID":"x"}`), Extensions: postrider.Extensions{
						{Name: postrider.ExtCausationID, Value: key + "/1"}, {Name: postrider.ExtIdempotencyKey, Value: key},
					}}
					if err == nil {
						_, err = handler.Handle(b.Context(), m)
					}
				}
				if err != nil {
					b.Error(err)
				}
			}
			if callers == 1 {
				for b.Loop() {
					work()
				}
				return
			}
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					work()
				}
			})
		})
	}
}
