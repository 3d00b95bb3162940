package outbox

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider/postridertest"
)

// However many rows wait, and whatever the statistics say, a page is a walk along the index with a plan that is made once.
func TestPageWalksTheIndex(t *testing.T) {
	t.Parallel()
	pool, ctx, q := postridertest.Postgres(t), t.Context(), newQueries(`"postrider"`)
	if err := Migrate(ctx, pool, ""); err != nil {
		t.Fatal(err)
	}
	fill := `insert into postrider.postrider_outbox (topic) select 't' from generate_series(1, $1::int)`
	explain := func() string {
		t.Helper()
		var plan string
		err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, "set local jit_above_cost = 0"); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, q.plan); err != nil {
				return err
			}
			if _, err := tx.Prepare(ctx, "page", q.page); err != nil {
				return err
			}
			rows, err := tx.Query(ctx, `explain execute page (0, '1', '{}', '1:1:', 1000)`)
			if err != nil {
				return err
			}
			lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
			plan = strings.Join(lines, "\n")
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return plan
	}
	check := func(when string) {
		t.Helper()
		plan := explain()
		for _, bad := range []string{"Seq Scan", "->  Sort", "Bitmap", "JIT"} {
			if strings.Contains(plan, bad) {
				t.Errorf("%s there is a %s:\n%s", when, bad, plan)
			}
		}
		if !strings.Contains(plan, "(id > $1)") {
			t.Errorf("%s the plan is made anew for its parameters:\n%s", when, plan)
		}
	}
	check("in an empty outbox")
	if _, err := pool.Exec(ctx, fill, 1000); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(ctx, "analyze postrider.postrider_outbox"); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(ctx, fill, 50_000); err != nil {
		t.Fatal(err)
	}
	check("with statistics that lag behind")
}
