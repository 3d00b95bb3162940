package outbox

import (
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

// The relay is told before a commit that it should look soon, and after a commit that it should look now.
func TestWake(t *testing.T) {
	t.Parallel()
	pool, ctx := postridertest.Postgres(t), t.Context()
	if err := Migrate(ctx, pool, ""); err != nil {
		t.Fatal(err)
	}
	ob, err := New(Config{Source: "//shop/orders"})
	if err != nil {
		t.Fatal(err)
	}
	told := func(when string, soon, now int) {
		t.Helper()
		if len(ob.wake) != soon || len(ob.committed) != now {
			t.Errorf("%s: %d times soon, %d times now, want %d and %d", when, len(ob.wake), len(ob.committed), soon, now)
		}
		for len(ob.wake) > 0 {
			<-ob.wake
		}
		for len(ob.committed) > 0 {
			<-ob.committed
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	m := &postrider.Message{ID: "1", Type: "orders.placed.v1"}
	must(pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error { return ob.In(tx).Publish(ctx, m) }))
	told("after a transaction of the pool", 1, 0)
	must(ob.On(pool).Publish(ctx, m))
	told("after a transaction of its own", 0, 1)
	must(pgx.BeginFunc(ctx, ob.On(pool), func(tx pgx.Tx) error {
		err := ob.In(tx).Publish(ctx, m)
		told("before COMMIT", 0, 0)
		return err
	}))
	told("after COMMIT", 0, 1)
}
