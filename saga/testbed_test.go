package saga_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
	"github.com/postrider/postrider/saga"
)

func TestMain(m *testing.M) { os.Exit(postridertest.Main(m)) }

// bed is a shop on a real PostgreSQL with a bus of its own: the outbox is a table, the relay a loop over it.
type bed struct {
	t    testing.TB
	pool *pgxpool.Pool
	shop *shop

	mu       sync.Mutex
	handlers map[string][]postrider.Handler // all of a topic's, as instances of a group: each message goes to one
	copies   func(*postrider.Message) int   // how often a message arrives; nil: once
	refuse   error                          // what the outbox says, nil for its normal work
	held     []*postrider.Message           // replies kept back by hold
	hold     string                         // idempotency key, after the saga's id, of replies to keep back
}

func newBed(t testing.TB) *bed {
	t.Helper()
	b := &bed{t: t, pool: postridertest.Postgres(t), shop: newShop(), handlers: make(map[string][]postrider.Handler)}
	if err := saga.Migrate(t.Context(), b.pool, "postrider"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.pool.Exec(t.Context(), `create table bed_outbox (id bigint generated always as identity primary key, msg json)`); err != nil {
		t.Fatal(err)
	}
	for _, h := range b.shop.handlers() {
		b.handlers[h.Topic()] = append(b.handlers[h.Topic()], h)
	}
	b.background(b.relay)
	return b
}

// background runs a part until the test's end, and returns a function that ends it before.
func (b *bed) background(run func(ctx context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(b.t.Context()))
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := run(ctx); err != nil {
			b.t.Error(err)
		}
	}()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	b.t.Cleanup(stop)
	return stop
}

// engine starts an instance; stop ends it as a crash would, without a word to anybody.
func (b *bed) engine(plans ...saga.AnyPlan) (e *saga.Engine, stop func()) {
	b.t.Helper()
	e, err := saga.NewEngine(b.pool, b, saga.Config{
		Name: "orders", PollInterval: 20 * time.Millisecond, MaxData: 1000, Logger: postridertest.Logger(b.t),
	}, plans...)
	if err != nil {
		b.t.Fatal(err)
	}
	h := e.Handler()
	b.mu.Lock()
	defer b.mu.Unlock()
	at := len(b.handlers[h.Topic()])
	b.handlers[h.Topic()] = append(b.handlers[h.Topic()], h)
	stopTimers := b.background(e.Run)
	return e, func() {
		b.mu.Lock()
		b.handlers[h.Topic()][at] = postrider.Handler{}
		b.mu.Unlock()
		stopTimers()
	}
}

type bedPublisher struct {
	b  *bed
	tx pgx.Tx
}

func (b *bed) In(tx pgx.Tx) postrider.Publisher { return bedPublisher{b, tx} }

func (p bedPublisher) Publish(ctx context.Context, msgs ...*postrider.Message) error {
	p.b.mu.Lock()
	err := p.b.refuse
	p.b.mu.Unlock()
	if err != nil {
		return err
	}
	for _, m := range msgs {
		m = m.Clone()
		m.Source = "//shop/orders"
		if err := m.Validate(); err != nil {
			return err
		}
		encoded, err := json.Marshal(m)
		if err != nil {
			return err
		}
		if _, err := p.tx.Exec(ctx, `insert into bed_outbox (msg) values ($1)`, encoded); err != nil {
			return err
		}
	}
	return nil
}

// relay takes messages out of the table and delivers them, 16 at a time.
func (b *bed) relay(ctx context.Context) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, 16)
	for {
		rows, _ := b.pool.Query(ctx, `delete from bed_outbox where id in (select id from bed_outbox order by id limit 100) returning msg`)
		batch, err := pgx.CollectRows(rows, pgx.RowTo[*postrider.Message])
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			for _, m := range batch {
				slots <- struct{}{}
				wg.Go(func() {
					b.deliver(ctx, m)
					<-slots
				})
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// deliver brings a message to its handler as often as the test wants, and the reply back.
func (b *bed) deliver(ctx context.Context, m *postrider.Message) {
	b.mu.Lock()
	n := 1
	if b.copies != nil {
		n = b.copies(m)
	}
	if b.hold != "" && strings.HasSuffix(m.Type, ".reply") && strings.HasSuffix(m.Extension(postrider.ExtIdempotencyKey), b.hold) {
		b.held, n = append(b.held, m), 0
	}
	b.mu.Unlock()
	for range n {
		b.handle(ctx, m)
	}
}

// handle delivers again until the handler takes the message, as a bus does.
func (b *bed) handle(ctx context.Context, m *postrider.Message) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for ctx.Err() == nil {
		reply, err := b.handler(m.Address()).Handle(ctx, m)
		switch {
		case errors.Is(err, errHang):
			return
		case err != nil && m.Extension(postrider.ExtReplyTo) != "":
			reply = postrider.ErrorReply(m, err)
		case err != nil && !postrider.Retryable(err):
			b.t.Errorf("dead letter: %v", err)
			return
		case err != nil:
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
			continue
		}
		if reply != nil && m.Extension(postrider.ExtReplyTo) != "" {
			b.deliver(ctx, reply)
		}
		return
	}
}

func (b *bed) handler(topic string) postrider.Handler {
	b.mu.Lock()
	defer b.mu.Unlock()
	hs := b.handlers[topic]
	if len(hs) == 0 {
		return postrider.RawHandler(topic, func(context.Context, *postrider.Message) error { return errHang })
	}
	return hs[rand.IntN(len(hs))]
}

// set changes how the bed behaves.
func (b *bed) set(change func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	change()
}

// start starts a saga in a transaction of its own.
func (b *bed) start(e *saga.Engine, plan *saga.Plan[Order], o *Order) string {
	b.t.Helper()
	var id string
	err := pgx.BeginFunc(b.t.Context(), b.pool, func(tx pgx.Tx) (err error) {
		id, err = plan.Start(b.t.Context(), e.In(tx), o)
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return id
}

// wait waits for a saga's end.
func (b *bed) wait(e *saga.Engine, id string) *saga.Instance {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 30*time.Second)
	defer cancel()
	i, err := e.Wait(ctx, id)
	if err != nil {
		b.t.Fatalf("wait: %v; the saga is %+v; history:\n%s", err, i, b.story(e, id))
	}
	return i
}

// story is a saga's history, one line an entry.
func (b *bed) story(e *saga.Engine, id string) string {
	b.t.Helper()
	entries, err := e.History(b.t.Context(), id)
	if err != nil {
		b.t.Fatal(err)
	}
	var s strings.Builder
	for n, h := range entries {
		if h.Seq != n+1 {
			b.t.Errorf("history has entry %d at place %d", h.Seq, n+1)
		}
		line := string(h.Kind)
		if h.Step != "" {
			line += fmt.Sprintf(" %s/%s %d", h.Step, h.Op, h.Attempt)
		}
		s.WriteString(line + "\n")
	}
	return s.String()
}

// has returns an error until the saga's history holds an entry of that kind.
func (b *bed) has(e *saga.Engine, id string, kind saga.EntryKind, step string) error {
	entries, err := e.History(b.t.Context(), id)
	for _, h := range entries {
		if h.Kind == kind && h.Step == step {
			return nil
		}
	}
	return fmt.Errorf("no %s of %s in the history: %v", kind, step, err)
}

// errHang is what a participant returns that never answers.
var errHang = errors.New("no answer")

// shop is the participants, with the barrier that the package idempotency has: one row a step, the answer stored.
type shop struct {
	mu     sync.Mutex
	rows   map[string]*effect                 // by saga id and step
	script map[string]func(attempt int) error // by step and op, nil: it goes well
	asked  []any                              // requests, as they came
}

type effect struct {
	state    string // done, refused, nulled, undone
	refusal  error
	did, un  int
	attempts map[string]int
}

func newShop() *shop {
	return &shop{rows: make(map[string]*effect), script: make(map[string]func(int) error)}
}

// does scripts a step's op ("charge/do").
func (s *shop) does(op string, script func(attempt int) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.script[op] = script
}

func (s *shop) handlers() []postrider.Handler {
	return []postrider.Handler{
		ReserveStock.Handler(func(ctx context.Context, r *ReserveReq) (*Held, error) { return do(ctx, s, r, &Held{"h-1"}) }),
		ReleaseStock.Handler(func(ctx context.Context, r *UndoReq) (*Undone, error) { return undo(ctx, s, r) }),
		ChargeCard.Handler(func(ctx context.Context, r *ChargeReq) (*Paid, error) { return do(ctx, s, r, &Paid{"p-1"}) }),
		RefundCard.Handler(func(ctx context.Context, r *UndoReq) (*Undone, error) { return undo(ctx, s, r) }),
		BookShipment.Handler(func(ctx context.Context, r *ShipReq) (*Shipment, error) { return do(ctx, s, r, &Shipment{"t-1"}) }),
		OrderShipped.Handler(func(_ context.Context, e postrider.Event[OrderDone]) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.asked = append(s.asked, e.Value)
			return nil
		}),
	}
}

func do[Req, Res any](ctx context.Context, s *shop, req *Req, res *Res) (*Res, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, req)
	row, err := s.enter(ctx)
	switch {
	case err != nil && postrider.Retryable(err):
		return nil, err
	case row.state == "" && err != nil:
		row.state, row.refusal = "refused", err
		return nil, err
	case row.state == "":
		row.state = "done"
		row.did++
		return res, nil
	case row.state == "done":
		return res, nil
	case row.state == "refused":
		return nil, row.refusal
	default:
		return nil, postrider.Errorf(postrider.FailedPrecondition, "cancelled")
	}
}

func undo(ctx context.Context, s *shop, req *UndoReq) (*Undone, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, req)
	row, err := s.enter(ctx)
	if err != nil {
		return nil, err
	}
	switch row.state {
	case "done":
		row.state = "undone"
		row.un++
	case "":
		row.state = "nulled"
	}
	return &Undone{}, nil
}

// enter finds the barrier's row and plays the script.
func (s *shop) enter(ctx context.Context) (*effect, error) {
	id, op, _ := strings.Cut(postrider.MessageFromContext(ctx).Extension(postrider.ExtIdempotencyKey), "/")
	step, _, _ := strings.Cut(op, "/")
	row := s.rows[id+"/"+step]
	if row == nil {
		row = &effect{attempts: make(map[string]int)}
		s.rows[id+"/"+step] = row
	}
	row.attempts[op]++
	if f := s.script[op]; f != nil {
		return row, f(row.attempts[op])
	}
	return row, nil
}

// inEffect counts what a saga's steps have done and not undone; more than one of a step is an error of the test.
func (b *bed) inEffect(id string) (n int) {
	b.shop.mu.Lock()
	defer b.shop.mu.Unlock()
	for key, row := range b.shop.rows {
		if strings.HasPrefix(key, id) {
			if row.did > 1 || row.un > row.did {
				b.t.Errorf("%s: done %d times, undone %d times", key, row.did, row.un)
			}
			n += row.did - row.un
		}
	}
	return n
}

func refusal(int) error { return postrider.Errorf(postrider.FailedPrecondition, "sold out") }
func hang(int) error    { return errHang }

// quick is PlaceOrder with quick retries, for tests in which attempts fail or time out.
func quick(t testing.TB, timeout time.Duration, attempts int, parts ...saga.Part[Order]) *saga.Plan[Order] {
	t.Helper()
	opts := []saga.StepOption[Order]{
		on.Timeout(timeout),
		on.Policy(postrider.RetryPolicy{Attempts: attempts, Initial: time.Millisecond, Max: 5 * time.Millisecond}),
	}
	undo := func(m *postrider.Method[UndoReq, Undone]) saga.StepOption[Order] {
		return saga.Undo(saga.Send(m, func(*Order) *UndoReq { return &UndoReq{} }), opts...)
	}
	parts = append(parts,
		saga.Step("reserve", saga.Call(ReserveStock,
			func(o *Order) *ReserveReq { return &ReserveReq{o.SKU, o.Qty} },
			func(o *Order, h *Held) { o.Hold = h.ID }), append(opts, undo(ReleaseStock))...),
		saga.Step("charge", saga.Call(ChargeCard,
			func(o *Order) *ChargeReq { return &ChargeReq{o.Hold, o.Cents} },
			func(o *Order, p *Paid) { o.Payment = p.ID }), append(opts, undo(RefundCard))...),
		saga.Pivot("ship", saga.Call(BookShipment,
			func(o *Order) *ShipReq { return &ShipReq{o.Payment} },
			func(o *Order, s *Shipment) { o.Tracking = s.Tracking }), opts...),
		saga.Then("announce", saga.Publish(OrderShipped, func(o *Order) *OrderDone { return &OrderDone{o.ID, o.Tracking} }), opts...))
	p, err := saga.NewPlan("order.quick", 1, func(o *Order) string { return o.ID }, parts...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
