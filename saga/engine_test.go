package saga_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
	"github.com/postrider/postrider/saga"
)

func TestCompletes(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	e, _ := b.engine(PlaceOrder)
	id := b.start(e, PlaceOrder, &Order{ID: "o-1", SKU: "Gruyère", Qty: 2, Card: "c-1", Cents: 1200})

	i := b.wait(e, id)
	if i.Status != saga.Completed || i.Alarm != "" || i.Cause != "" || i.Ended.IsZero() || !i.WakeAt.IsZero() {
		t.Errorf("the saga is %+v", i)
	}
	o, err := PlaceOrder.Data(i)
	if want := (Order{ID: "o-1", SKU: "Gruyère", Qty: 2, Card: "c-1", Cents: 1200, Hold: "h-1", Payment: "p-1", Tracking: "t-1"}); err != nil || *o != want {
		t.Errorf("data are %+v, %v", o, err)
	}
	const want = `started
sent reserve/do 1
ok reserve/do 1
sent charge/do 1
ok charge/do 1
sent ship/do 1
ok ship/do 1
sent announce/do 1
ok announce/do 1
completed
`
	if got := b.story(e, id); got != want {
		t.Errorf("history is\n%swant\n%s", got, want)
	}
	if n := b.inEffect(id); n != 3 {
		t.Errorf("%d steps are in effect, want 3", n)
	}
	postridertest.Eventually(t, func() error {
		b.shop.mu.Lock()
		defer b.shop.mu.Unlock()
		want := []any{&ReserveReq{"Gruyère", 2}, &ChargeReq{"c-1", 1200}, &ShipReq{"o-1"}, &OrderDone{"o-1", "t-1"}}
		if got := fmt.Sprintf("%+v", deref(b.shop.asked)); got != fmt.Sprintf("%+v", deref(want)) {
			return fmt.Errorf("participants were asked %s", got)
		}
		return nil
	})
	found, err := e.Find(t.Context(), "order.place", "o-1")
	if err != nil || found.ID != id {
		t.Errorf("found %+v, %v", found, err)
	}
}

func deref(asked []any) (s []string) {
	for _, a := range asked {
		s = append(s, strings.TrimPrefix(fmt.Sprintf("%T%+v", a, a), "*"))
	}
	return s
}

func TestRefused(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ step, story string }{
		{"reserve", "started\nsent reserve/do 1\nrefused reserve/do 1\ncompensated\n"},
		{"charge", "started\nsent reserve/do 1\nok reserve/do 1\nsent charge/do 1\nrefused charge/do 1\n" +
			"sent reserve/undo 1\nok reserve/undo 1\ncompensated\n"},
		{"ship", "started\nsent reserve/do 1\nok reserve/do 1\nsent charge/do 1\nok charge/do 1\nsent ship/do 1\nrefused ship/do 1\n" +
			"sent charge/undo 1\nok charge/undo 1\nsent reserve/undo 1\nok reserve/undo 1\ncompensated\n"},
	} {
		t.Run(c.step, func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			b.shop.does(c.step+"/do", refusal)
			e, _ := b.engine(PlaceOrder)
			id := b.start(e, PlaceOrder, &Order{ID: "o-1"})
			i := b.wait(e, id)
			if want := c.step + " was refused: sold out (FAILED_PRECONDITION)"; i.Status != saga.Compensated || i.Cause != want {
				t.Errorf("the saga is %s because %q, want %q", i.Status, i.Cause, want)
			}
			if got := b.story(e, id); got != c.story {
				t.Errorf("history is\n%swant\n%s", got, c.story)
			}
			if n := b.inEffect(id); n != 0 {
				t.Errorf("%d steps are in effect", n)
			}
		})
	}
}

// The reply to the first attempt comes when the second one has been answered: it is noted and changes nothing.
func TestLateReply(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	plan := quick(t, 60*time.Millisecond, 3)
	e, _ := b.engine(plan)
	b.set(func() { b.hold = "/charge/do" })
	id := b.start(e, plan, &Order{ID: "o-1"})
	postridertest.Eventually(t, func() error { return b.has(e, id, saga.EntryFailed, "charge") })
	b.set(func() { b.hold = "" })
	i := b.wait(e, id)
	b.set(func() {})
	for _, m := range b.held {
		if _, err := e.Handler().Handle(t.Context(), m); err != nil {
			t.Error(err)
		}
	}
	if err := b.has(e, id, saga.EntryLate, "charge"); err != nil {
		t.Error(err)
	}
	after, err := e.Get(t.Context(), id)
	if err != nil || after.Status != i.Status || !after.Ended.Equal(i.Ended) || string(after.Data) != string(i.Data) {
		t.Errorf("the saga was %+v and is %+v, %v", i, after, err)
	}
	if want := map[saga.Status]int{saga.Completed: 3, saga.Compensated: 0}; b.inEffect(id) != want[i.Status] {
		t.Errorf("%d steps of a %s saga are in effect", b.inEffect(id), i.Status)
	}
}

func TestNeverAnswers(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	plan := quick(t, 500*time.Millisecond, 3)
	e, _ := b.engine(plan)
	b.shop.does("charge/do", hang)
	id := b.start(e, plan, &Order{ID: "o-1"})
	i := b.wait(e, id)
	if i.Status != saga.Compensated || !strings.HasPrefix(i.Cause, "charge was given up after 3 attempts: no reply within 500ms") {
		t.Errorf("the saga is %s because %q", i.Status, i.Cause)
	}
	if got := b.story(e, id); !strings.Contains(got, "gave_up charge/do 3\nsent charge/undo 1\n") {
		t.Errorf("the step whose outcome is unknown was not undone first:\n%s", got)
	}
	if n := b.inEffect(id); n != 0 {
		t.Errorf("%d steps are in effect", n)
	}
}

// Nobody knows if a pivot that does not answer was done: it is neither given up nor undone, but calls for an operator.
func TestPivotNeverGivesUp(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	plan := quick(t, 30*time.Second, 3)
	e, _ := b.engine(plan)
	b.shop.does("ship/do", func(int) error { return postrider.Errorf(postrider.Unavailable, "the courier is asleep") })
	id := b.start(e, plan, &Order{ID: "o-1"})
	postridertest.Eventually(t, func() error {
		i, err := e.Get(t.Context(), id)
		if err != nil || i.Alarm == "" || i.Steps[2].Attempt < 5 {
			return fmt.Errorf("no alarm yet: %+v, %v", i, err)
		}
		if i.Status != saga.Running || !strings.Contains(i.Alarm, "do of ship failed 3 times") {
			t.Errorf("the saga is %+v", i)
		}
		return nil
	})
	b.shop.does("ship/do", nil)
	if i := b.wait(e, id); i.Status != saga.Completed || i.Alarm != "" {
		t.Errorf("the saga is %+v", i)
	}
}

// An undo that fails or is refused is an alarm and goes on.
func TestUndoGoesOn(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	plan := quick(t, 30*time.Second, 3)
	e, _ := b.engine(plan)
	b.shop.does("ship/do", refusal)
	b.shop.does("charge/undo", func(n int) error {
		if n < 6 {
			return postrider.Errorf(postrider.Unavailable, "bank closed")
		}
		return nil
	})
	b.shop.does("reserve/undo", func(n int) error {
		if n < 3 {
			return refusal(n)
		}
		return nil
	})
	id := b.start(e, plan, &Order{ID: "o-1"})
	if i := b.wait(e, id); i.Status != saga.Compensated || i.Alarm != "" {
		t.Errorf("the saga is %+v", i)
	}
	for _, step := range []string{"charge", "reserve"} {
		if err := b.has(e, id, saga.EntryAlarm, step); err != nil {
			t.Error(err)
		}
	}
	if n := b.inEffect(id); n != 0 {
		t.Errorf("%d steps are in effect", n)
	}
}

func TestDeadline(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	plan := quick(t, 30*time.Second, 3, on.Deadline(150*time.Millisecond))
	e, _ := b.engine(plan)
	b.shop.does("charge/do", func(int) error { return postrider.RetryAfter(time.Hour, errors.New("come back later")) })
	id := b.start(e, plan, &Order{ID: "o-1"})
	if i := b.wait(e, id); i.Status != saga.Compensated || !strings.Contains(i.Cause, "deadline of 150ms") {
		t.Errorf("the saga is %s because %q", i.Status, i.Cause)
	}
	if n := b.inEffect(id); n != 0 {
		t.Errorf("%d steps are in effect", n)
	}
}

func TestStartTwice(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	e, _ := b.engine(PlaceOrder)
	ctx := t.Context()

	rolledBack := errors.New("no")
	err := pgx.BeginFunc(ctx, b.pool, func(tx pgx.Tx) error {
		if _, err := PlaceOrder.Start(ctx, e.In(tx), &Order{ID: "o-1"}); err != nil {
			t.Error(err)
		}
		return rolledBack
	})
	if !errors.Is(err, rolledBack) {
		t.Fatal(err)
	}
	if i, err := e.Find(ctx, "order.place", "o-1"); !errors.Is(err, postrider.NotFound) {
		t.Fatalf("a rolled back start left %+v, %v", i, err)
	}

	// Two at once: the second one waits for the first one's commit, and its own transaction lives on.
	first, err := b.pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	id, err := PlaceOrder.Start(ctx, e.In(first), &Order{ID: "o-1"})
	if err != nil {
		t.Fatal(err)
	}
	type answer struct {
		id       string
		err, end error
	}
	second := make(chan answer)
	go func() {
		var a answer
		a.end = pgx.BeginFunc(ctx, b.pool, func(tx pgx.Tx) error {
			a.id, a.err = PlaceOrder.Start(ctx, e.In(tx), &Order{ID: "o-1"})
			_, err := tx.Exec(ctx, `select 1`)
			return err
		})
		second <- a
	}()
	postridertest.Eventually(t, func() error {
		var waiting int
		err := b.pool.QueryRow(ctx, `select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`).Scan(&waiting)
		if err != nil || waiting != 1 {
			return fmt.Errorf("%d transactions wait: %w", waiting, err)
		}
		return nil
	})
	if err := first.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	if a := <-second; a.id != id || !errors.Is(a.err, postrider.AlreadyExists) || a.end != nil {
		t.Errorf("the second start answered %+v, want id %s", a, id)
	}
	b.wait(e, id)
	err = pgx.BeginFunc(ctx, b.pool, func(tx pgx.Tx) error { // the key of a saga that has ended stays taken
		again, err := PlaceOrder.Start(ctx, e.In(tx), &Order{ID: "o-1"})
		if again != id || !errors.Is(err, postrider.AlreadyExists) {
			t.Errorf("a third start answered %s, %v", again, err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if n := b.inEffect(id); n != 3 {
		t.Errorf("%d steps are in effect, want 3", n)
	}
}

func TestStartRefuses(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	e, _ := b.engine(PlaceOrder)
	explode := saga.Define("order.explode", 1, func(o *Order) string { return o.ID },
		saga.Then("announce", saga.Publish(OrderShipped, func(*Order) *OrderDone { panic("boom") })))
	withExplode, _ := b.engine(explode)
	for _, c := range []struct {
		name   string
		engine *saga.Engine
		plan   *saga.Plan[Order]
		order  *Order
		code   postrider.Code
		text   string
	}{
		{"large", e, PlaceOrder, &Order{ID: "o-1", SKU: strings.Repeat("x", 1000)}, postrider.ResourceExhausted, "Config.MaxData allows 1000"},
		{"no key", e, PlaceOrder, &Order{}, postrider.InvalidArgument, "business key"},
		{"bad key", e, PlaceOrder, &Order{ID: "a\x00b"}, postrider.InvalidArgument, "business key"},
		{"other engine", e, explode, &Order{ID: "o-1"}, postrider.FailedPrecondition, "give it to NewEngine"},
		{"panic", withExplode, explode, &Order{ID: "o-1"}, postrider.Internal, "boom"},
	} {
		err := pgx.BeginFunc(t.Context(), b.pool, func(tx pgx.Tx) error {
			_, err := c.plan.Start(t.Context(), c.engine.In(tx), c.order)
			if !errors.Is(err, c.code) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%s: %v", c.name, err)
			}
			_, err = tx.Exec(t.Context(), `select 1`)
			return err
		})
		if err != nil {
			t.Errorf("%s: the transaction did not live on: %v", c.name, err)
		}
	}
}

// A reply that makes the data too large is a failed attempt, not a lost one: the step was done, so it is undone.
func TestReplyTooLarge(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	plan := saga.Define("order.large", 1, func(o *Order) string { return o.ID },
		saga.Step("reserve", saga.Call(ReserveStock, func(*Order) *ReserveReq { return &ReserveReq{} },
			func(o *Order, h *Held) { o.Hold = strings.Repeat(h.ID, 1000) }),
			on.Policy(postrider.RetryPolicy{Attempts: 2, Initial: time.Millisecond}),
			saga.Undo(saga.Send(ReleaseStock, func(o *Order) *UndoReq {
				if o.Hold != "" {
					panic("half changed data")
				}
				return &UndoReq{}
			}))))
	e, _ := b.engine(plan)
	id := b.start(e, plan, &Order{ID: "o-1"})
	i := b.wait(e, id)
	if i.Status != saga.Compensated || !strings.Contains(i.Cause, "Config.MaxData allows 1000") {
		t.Errorf("the saga is %+v", i)
	}
	if n := b.inEffect(id); n != 0 {
		t.Errorf("%d steps are in effect", n)
	}
}

func TestReplyOfNobody(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	e, _ := b.engine(PlaceOrder)
	id := b.start(e, PlaceOrder, &Order{ID: "o-1"})
	b.wait(e, id)
	for _, c := range []struct {
		key  string
		code postrider.Code
	}{
		{"", postrider.InvalidArgument},
		{"o-1/reserve/do", postrider.InvalidArgument},
		{id + "/reserve", postrider.InvalidArgument},
		{id + "/reserve/redo", postrider.InvalidArgument},
		{id + "/nowhere/do", postrider.InvalidArgument},
		{id + "/ship/undo", postrider.InvalidArgument},
		{postrider.NewID() + "/reserve/do", postrider.NotFound},
	} {
		m := &postrider.Message{ID: "r-1", Source: "//test", Type: "stock.v1/Reserve.reply", Data: []byte(`{}`)}
		if err := m.SetExtension(postrider.ExtIdempotencyKey, c.key); err != nil {
			t.Fatal(err)
		}
		_, err := e.Handler().Handle(t.Context(), m)
		if !errors.Is(err, c.code) || postrider.Retryable(err) {
			t.Errorf("reply with key %q: %v, want %v for the dead letters", c.key, err, c.code)
		}
	}
}

func TestNewEngineRefuses(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		cfg   saga.Config
		plans []saga.AnyPlan
		text  string
	}{
		{saga.Config{}, nil, "Config.Name"},
		{saga.Config{Name: "a.b"}, nil, "Config.Name"},
		{saga.Config{Name: "a", Schema: "A B"}, nil, "Config.Schema"},
		{saga.Config{Name: "a", PollInterval: -1}, nil, "Config.PollInterval"},
		{saga.Config{Name: "a", Workers: -1}, nil, "Config.Workers"},
		{saga.Config{Name: "a", DrainTimeout: -1}, nil, "Config.DrainTimeout"},
		{saga.Config{Name: "a"}, []saga.AnyPlan{PlaceOrder, PlaceOrder}, "given twice"},
	} {
		_, err := saga.NewEngine(new(pgxpool.Pool), new(bed), c.cfg, c.plans...)
		if !errors.Is(err, postrider.InvalidArgument) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%+v: %v, want %q", c.cfg, err, c.text)
		}
	}
}

func TestMessagesAreLinked(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	e, _ := b.engine(PlaceOrder)
	var msgs []*postrider.Message
	b.set(func() {
		b.copies = func(m *postrider.Message) int {
			msgs = append(msgs, m)
			return 1
		}
	})
	cause := &postrider.Message{ID: "m-1", Source: "//web", Type: "web.clicked.v1"}
	if err := cause.SetExtension(postrider.ExtTraceParent, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"); err != nil {
		t.Fatal(err)
	}
	ctx := postrider.ContextWithMessage(t.Context(), cause)
	var id string
	err := pgx.BeginFunc(ctx, b.pool, func(tx pgx.Tx) (err error) {
		id, err = PlaceOrder.Start(ctx, e.In(tx), &Order{ID: "o-1"})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	b.wait(e, id)
	postridertest.Eventually(t, func() (err error) {
		b.set(func() {
			if len(msgs) != 7 {
				err = fmt.Errorf("%d messages", len(msgs))
			}
		})
		return err
	})
	b.set(func() {
		for _, m := range msgs {
			if m.Extension(postrider.ExtCorrelationID) != "m-1" || m.Extension(postrider.ExtTraceParent) == "" || m.Extension(postrider.ExtSagaID) != id {
				t.Errorf("message %s has %v", m.ID, m.Extensions)
			}
		}
		if i := slices.IndexFunc(msgs, func(m *postrider.Message) bool { return m.ID == id+"/charge/do/1" }); i < 0 {
			t.Error("no command with the attempt as its id")
		}
	})
}

func TestWaitEndsWithItsContext(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.shop.does("reserve/do", hang)
	e, _ := b.engine(PlaceOrder)
	id := b.start(e, PlaceOrder, &Order{ID: "o-1"})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := e.Wait(ctx, id); err == nil {
		t.Error("Wait returned before the end")
	}
	if _, err := e.Wait(t.Context(), postrider.NewID()); !errors.Is(err, postrider.NotFound) {
		t.Errorf("waiting for no saga: %v", err)
	}
}
