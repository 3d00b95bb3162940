package saga_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
	"github.com/postrider/postrider/saga"
)

// What is nil is refused where a plan or an engine is made, by name.
func TestNilIsRefused(t *testing.T) {
	t.Parallel()
	order := func(o *Order) string { return o.ID }
	request := func(*Order) *ShipReq { return &ShipReq{} }
	ship := saga.Send(BookShipment, request)
	var noPlan *saga.Plan[Order]
	for text, parts := range map[string][]saga.Part[Order]{
		"part 1 is nil":                               {nil},
		"pivot \"request\" has no action":             {saga.Pivot("request", saga.Send[Order](BookShipment, nil))},
		"pivot \"method\" has no action":              {saga.Pivot("method", saga.Send[Order, ShipReq, Shipment](nil, request))},
		"pivot \"take\" has no action":                {saga.Pivot("take", saga.Call[Order](BookShipment, request, nil))},
		"then \"value\" has no action":                {saga.Pivot("ship", ship), saga.Then("value", saga.Publish[Order](OrderShipped, nil))},
		"step \"undo\" has no action":                 {saga.Step("undo", ship, saga.Undo(saga.Send[Order](ReleaseStock, nil)))},
		"pivot \"option\" has a nil option, number 1": {saga.Pivot("option", ship, nil)},
	} {
		if _, err := saga.NewPlan("order.wrong", 1, order, parts...); !errors.Is(err, postrider.InvalidArgument) || !strings.Contains(err.Error(), text) {
			t.Errorf("%v, want InvalidArgument that says %s", err, text)
		}
	}
	b := newBed(t)
	e, err := saga.NewEngine(b.pool, b, saga.Config{Name: "orders"}, PlaceOrder)
	if err != nil {
		t.Fatal(err)
	}
	for what, call := range map[string]func() error{
		"pool":       func() error { _, err := saga.NewEngine(nil, b, saga.Config{Name: "orders"}); return err },
		"outbox":     func() error { _, err := saga.NewEngine(b.pool, nil, saga.Config{Name: "orders"}); return err },
		"plan":       func() error { _, err := saga.NewEngine(b.pool, b, saga.Config{Name: "orders"}, nil); return err },
		"typed plan": func() error { _, err := saga.NewEngine(b.pool, b, saga.Config{Name: "orders"}, noPlan); return err },
		"tx":         func() error { _, err := PlaceOrder.Start(t.Context(), e.In(nil), &Order{ID: "o-1"}); return err },
		"engine":     func() error { _, err := PlaceOrder.Start(t.Context(), saga.Tx{}, &Order{ID: "o-1"}); return err },
		"data": func() error {
			return pgx.BeginFunc(t.Context(), b.pool, func(tx pgx.Tx) error {
				_, err := PlaceOrder.Start(t.Context(), e.In(tx), nil)
				return err
			})
		},
	} {
		if err := call(); !errors.Is(err, postrider.InvalidArgument) || !strings.Contains(err.Error(), "nil") {
			t.Errorf("%s: %v, want InvalidArgument that says what is nil", what, err)
		}
	}
	for _, id := range []string{"", "o-1", "0198f3c6-0000-7000-8000-000000000000"} {
		if _, err := e.Get(t.Context(), id); !errors.Is(err, postrider.NotFound) {
			t.Errorf("get %q: %v, want NotFound", id, err)
		}
		if _, err := e.History(t.Context(), id); !errors.Is(err, postrider.NotFound) {
			t.Errorf("history of %q: %v, want NotFound", id, err)
		}
		if _, err := e.Wait(t.Context(), id); !errors.Is(err, postrider.NotFound) {
			t.Errorf("wait for %q: %v, want NotFound", id, err)
		}
	}
}

// Whoever forgets Migrate is told, and not kept waiting.
func TestWithoutTables(t *testing.T) {
	t.Parallel()
	pool := postridertest.Postgres(t)
	e, err := saga.NewEngine(pool, new(bed), saga.Config{Name: "orders"}, PlaceOrder)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for what, call := range map[string]func() error{
		"run": func() error { return e.Run(ctx) },
		"start": func() error {
			return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
				_, err := PlaceOrder.Start(ctx, e.In(tx), &Order{ID: "o-1"})
				return err
			})
		},
		"get":     func() error { _, err := e.Get(ctx, postrider.NewID()); return err },
		"find":    func() error { _, err := e.Find(ctx, "order.place", "o-1"); return err },
		"history": func() error { _, err := e.History(ctx, postrider.NewID()); return err },
	} {
		if err := call(); !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), "call saga.Migrate first") {
			t.Errorf("%s: %v, want FailedPrecondition that says what to call", what, err)
		}
	}
}

// stuckOutbox takes the first attempt of every command; the later ones of one saga last as long as they may.
type stuckOutbox struct {
	*bed
	saga string
}

func (o *stuckOutbox) In(tx pgx.Tx) postrider.Publisher { return stuckPublisher{o.bed.In(tx), o.saga} }

type stuckPublisher struct {
	postrider.Publisher
	saga string
}

func (p stuckPublisher) Publish(ctx context.Context, msgs ...*postrider.Message) error {
	for _, m := range msgs {
		if m.Extension(postrider.ExtSagaID) == p.saga && !strings.HasSuffix(m.ID, "/1") {
			<-ctx.Done()
			return ctx.Err()
		}
	}
	return p.Publisher.Publish(ctx, msgs...)
}

// A timer whose transition uses up its time, behind a lock of its key for example, is put off like any that fails: the
// others have their turn.
func TestStuckTimerHoldsUpNoOther(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.shop.does("reserve/do", hang)
	plan := quick(t, 20*time.Millisecond, 1000)
	ob := &stuckOutbox{bed: b}
	e, err := saga.NewEngine(b.pool, ob, saga.Config{
		Name: "orders", PollInterval: 20 * time.Millisecond, Workers: 1, DrainTimeout: 200 * time.Millisecond,
		Logger: postridertest.Logger(t),
	}, plan)
	if err != nil {
		t.Fatal(err)
	}
	ob.saga = b.start(e, plan, &Order{ID: "o-1", SKU: "Gruyère", Qty: 1})
	other := b.start(e, plan, &Order{ID: "o-2", SKU: "Gruyère", Qty: 1})
	b.background(e.Run)
	postridertest.Eventually(t, func() error {
		i, err := e.Get(t.Context(), other)
		if err == nil && i.Steps[0].Attempt < 3 {
			err = errors.New("the other saga does not go on")
		}
		return err
	})
}
