package saga_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
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

// An instance commits a transition and dies, and what it committed never leaves: another one takes over by the timer.
func TestTakeover(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	plan := quick(t, 200*time.Millisecond, -1)
	first, crash := b.engine(plan)
	lost := make(chan struct{}, 100)
	b.set(func() {
		b.copies = func(m *postrider.Message) int {
			if strings.HasSuffix(m.Extension(postrider.ExtIdempotencyKey), "/charge/do") {
				lost <- struct{}{}
				return 0
			}
			return 1
		}
	})
	id := b.start(first, plan, &Order{ID: "o-1"})
	<-lost
	crash()
	b.set(func() { b.copies = nil })
	second, _ := b.engine(plan)
	if i := b.wait(second, id); i.Status != saga.Completed {
		t.Errorf("the saga is %+v:\n%s", i, b.story(second, id))
	}
	if n := b.inEffect(id); n != 3 {
		t.Errorf("%d steps are in effect, want 3", n)
	}
}

// An instance dies while replies are under way and nobody else is there; they wait in the stream.
func TestReplyWithoutEngine(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	first, crash := b.engine(PlaceOrder)
	b.set(func() { b.hold = "/reserve/do" })
	id := b.start(first, PlaceOrder, &Order{ID: "o-1"})
	postridertest.Eventually(t, func() (err error) {
		b.set(func() {
			if len(b.held) == 0 {
				err = errors.New("no reply yet")
			}
		})
		return err
	})
	crash()
	second, _ := b.engine(PlaceOrder)
	b.set(func() { b.hold = "" })
	if _, err := second.Handler().Handle(t.Context(), b.held[0]); err != nil {
		t.Error(err)
	}
	if i := b.wait(second, id); i.Status != saga.Completed || i.Steps[0].Attempt != 0 {
		t.Errorf("the saga is %+v", i)
	}
}

// While the database or the outbox is in trouble no transition happens in part, and no reply is lost.
func TestOutboxInTrouble(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	e, _ := b.engine(PlaceOrder)
	b.set(func() { b.hold = "/reserve/do" })
	id := b.start(e, PlaceOrder, &Order{ID: "o-1"})
	postridertest.Eventually(t, func() (err error) {
		b.set(func() {
			if len(b.held) == 0 {
				err = errors.New("no reply yet")
			}
		})
		return err
	})
	b.set(func() { b.hold, b.refuse = "", postrider.Errorf(postrider.Unavailable, "the disk is full") })
	before := b.story(e, id)
	_, err := e.Handler().Handle(t.Context(), b.held[0])
	if !postrider.Retryable(err) || !strings.Contains(err.Error(), "the disk is full") {
		t.Errorf("the bus was told %v", err)
	}
	if after := b.story(e, id); after != before {
		t.Errorf("half a transition:\n%s", after)
	}
	b.set(func() { b.refuse = nil })
	b.handle(t.Context(), b.held[0])
	if i := b.wait(e, id); i.Status != saga.Completed {
		t.Errorf("the saga is %+v", i)
	}
}

// A command that the outbox refuses for good, being too large, say, is a failed attempt.
func TestOutboxRefuses(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	plan := quick(t, 60*time.Millisecond, 3)
	e, _ := b.engine(plan)
	b.set(func() { b.hold = "/reserve/do" })
	id := b.start(e, plan, &Order{ID: "o-1"})
	b.set(func() { b.refuse = postrider.Errorf(postrider.InvalidArgument, "too large") })
	postridertest.Eventually(t, func() error {
		i, err := e.Get(t.Context(), id)
		if err != nil || !strings.HasPrefix(i.Alarm, "undo of reserve failed 3 times and goes on: too large") {
			return fmt.Errorf("the saga is %+v, %v", i, err)
		}
		return nil
	})
	b.set(func() { b.refuse, b.hold = nil, "" })
	if i := b.wait(e, id); i.Status != saga.Compensated || b.inEffect(id) != 0 {
		t.Errorf("the saga is %+v", i)
	}
}

func TestDatabaseGone(t *testing.T) {
	t.Parallel()
	pool, err := pgxpool.New(t.Context(), "postgres://nobody@127.0.0.1:1/none?connect_timeout=1")
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	e, err := saga.NewEngine(pool, new(bed), saga.Config{Name: "orders"}, PlaceOrder)
	if err != nil {
		t.Fatal(err)
	}
	m := &postrider.Message{ID: "r-1", Source: "//test", Type: "stock.v1/Reserve.reply"}
	if err := m.SetExtension(postrider.ExtIdempotencyKey, postrider.NewID()+"/reserve/do"); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Handler().Handle(t.Context(), m); !errors.Is(err, postrider.Unavailable) || !postrider.Retryable(err) {
		t.Errorf("the bus was told %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := e.Run(ctx); err != nil {
		t.Errorf("Run returned %v", err)
	}
}

// A saga whose plan nobody has is parked, and goes on when somebody has it again. It never runs on another plan.
func TestUnknownPlan(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	plan := quick(t, 60*time.Millisecond, -1)
	first, crash := b.engine(plan)
	b.set(func() { b.hold = "/reserve/do" })
	id := b.start(first, plan, &Order{ID: "o-1"})
	postridertest.Eventually(t, func() (err error) {
		b.set(func() {
			if len(b.held) == 0 {
				err = errors.New("no reply yet")
			}
		})
		return err
	})
	crash()
	changed, err := saga.NewPlan("order.quick", 1, func(o *Order) string { return o.ID }, // the same name and version
		saga.Pivot("reserve", saga.Send(ReserveStock, func(*Order) *ReserveReq { return &ReserveReq{} })))
	if err != nil {
		t.Fatal(err)
	}
	second, _ := b.engine(changed)
	if _, err := second.Handler().Handle(t.Context(), b.held[0]); !postrider.Retryable(err) || !strings.Contains(err.Error(), "which this engine does not have") {
		t.Errorf("the reply of a saga with an unknown plan: %v", err)
	}
	if i, err := second.Get(t.Context(), id); err != nil || i.Status != saga.Running {
		t.Errorf("not due for long and yet %+v, %v", i, err)
	}
	if _, err := b.pool.Exec(t.Context(), `update postrider.postrider_saga set wake_at = now() - interval '1 minute'`); err != nil {
		t.Fatal(err)
	}
	postridertest.Eventually(t, func() error {
		i, err := second.Get(t.Context(), id)
		if err != nil || i.Status != saga.Parked || i.Alarm == "" || i.Steps[0].Name != "#1" {
			return fmt.Errorf("the saga is %+v, %v", i, err)
		}
		return b.has(second, id, saga.EntryParked, "")
	})
	b.set(func() { b.hold = "" })
	third, _ := b.engine(plan)
	if i := b.wait(third, id); i.Status != saga.Completed {
		t.Errorf("the saga is %+v:\n%s", i, b.story(third, id))
	}
}

// A saga that cannot be read does not keep the others from their timers.
func TestSickSaga(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	plan := quick(t, 200*time.Millisecond, -1)
	idle, err := saga.NewEngine(b.pool, b, saga.Config{Name: "orders"}, plan)
	if err != nil {
		t.Fatal(err)
	}
	b.shop.does("reserve/do", func(n int) error {
		if n == 1 {
			return errHang
		}
		return nil
	})
	for n := range 5 { // more than there are workers
		sick := b.start(idle, plan, &Order{ID: fmt.Sprint("sick-", n)})
		_, err := b.pool.Exec(t.Context(), `update postrider.postrider_saga set state = '[]', wake_at = now() - interval '1 second' where id = $1`, sick)
		if err != nil {
			t.Fatal(err)
		}
	}
	id := b.start(idle, plan, &Order{ID: "o-1"})
	e, _ := b.engine(plan)
	if i := b.wait(e, id); i.Status != saga.Completed {
		t.Errorf("the saga is %+v", i)
	}
}

// Two instances, 64 sagas at once, messages lost and doubled, participants that refuse and fail, connections to the
// database cut: every saga ends, whole or not at all.
func TestChaos(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	plan := quick(t, 250*time.Millisecond, 4)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	var lost, doubled, refused int
	b.set(func() {
		b.copies = func(*postrider.Message) int {
			switch n := rnd.IntN(100); {
			case n < 10:
				lost++
				return 0
			case n < 30:
				doubled++
				return 2
			default:
				return 1
			}
		}
	})
	for _, step := range []string{"reserve", "charge", "ship"} {
		weather := rand.New(rand.NewPCG(seed, uint64(len(step)))) // under the shop's lock
		b.shop.does(step+"/do", func(int) error {
			switch n := weather.IntN(100); {
			case n < 10:
				refused++
				return refusal(0)
			case n < 20:
				return postrider.Errorf(postrider.Unavailable, "weather")
			case n < 30:
				return errHang
			default:
				return nil
			}
		})
	}
	e, crash := b.engine(plan)
	other, _ := b.engine(plan)
	ids := make([]string, 64)
	var wg sync.WaitGroup
	for n := range ids {
		wg.Go(func() { ids[n] = b.start(e, plan, &Order{ID: fmt.Sprint("o-", n)}) })
	}
	wg.Wait()

	status := make(map[saga.Status]int)
	cuts := 0
	postridertest.Eventually(t, func() error {
		clear(status)
		rows, _ := b.pool.Query(t.Context(), `select status, count(*) from postrider.postrider_saga group by 1`)
		var s saga.Status
		var n int
		if _, err := pgx.ForEachRow(rows, []any{&s, &n}, func() error { status[s] = n; return nil }); err != nil {
			return err // a connection that was cut
		}
		if cuts < 5 {
			_, err := b.pool.Exec(t.Context(), `select pg_terminate_backend(pid) from pg_stat_activity
				where datname = current_database() and pid <> pg_backend_pid()`)
			if err != nil {
				return err
			}
			if cuts++; cuts == 3 {
				crash()
			}
			return errors.New("connections were cut")
		}
		if status[saga.Completed]+status[saga.Compensated] != len(ids) {
			return fmt.Errorf("the sagas are %v", status)
		}
		return nil
	})
	for _, id := range ids {
		i, err := other.Get(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		want := 0
		if i.Status == saga.Completed {
			want = 3
		}
		if n := b.inEffect(id); n != want {
			t.Errorf("saga %s is %s and %d steps are in effect:\n%s", id, i.Status, n, b.story(other, id))
		}
	}
	b.set(func() {
		t.Logf("%v; %d lost, %d doubled, %d refused, %d cuts", status, lost, doubled, refused, cuts)
		if lost == 0 || doubled == 0 || refused == 0 || status[saga.Completed] == 0 || status[saga.Compensated] == 0 {
			t.Error("nothing went wrong, so nothing was tested")
		}
	})
}

func TestMigrate(t *testing.T) {
	t.Parallel()
	pool, ctx := postridertest.Postgres(t), t.Context()
	for range 2 {
		for range 2 { // up twice does nothing
			if err := saga.Migrate(ctx, pool, ""); err != nil {
				t.Fatal(err)
			}
		}
		if err := saga.MigrateDown(ctx, pool, ""); err != nil {
			t.Fatal(err)
		}
	}
	script, err := saga.MigrateSQL("other")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(ctx, script); err != nil {
		t.Fatal(err)
	}
	e, err := saga.NewEngine(pool, new(bed), saga.Config{Name: "orders", Schema: "other"}, PlaceOrder)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Find(ctx, "order.place", "o-1"); !errors.Is(err, postrider.NotFound) {
		t.Errorf("found in the tables of a script: %v", err)
	}
}
