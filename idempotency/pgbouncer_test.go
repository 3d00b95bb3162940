package idempotency

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

// Handlers work through a PgBouncer in transaction mode.
func TestHandlerThroughPgBouncer(t *testing.T) {
	t.Parallel()
	for name, mode := range map[string]pgx.QueryExecMode{
		"cache_describe": pgx.QueryExecModeCacheDescribe, "exec": pgx.QueryExecModeExec,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			s := b.storeOn(postridertest.PgBouncer(t, b.pool, mode), Config{})
			effects := 0
			h := Handler(s, "billing", b.placed, func(ctx context.Context, tx pgx.Tx, _ postrider.Event[order]) error {
				effects++
				return write(ctx, tx, "billed")
			})
			for range 20 {
				for _, id := range []string{"m-1", "m-2", "m-3"} {
					if err := handle(t, h, b.event(id, time.Now().Truncate(24*time.Hour))); err != nil {
						t.Fatal(err)
					}
				}
			}
			if effects != 3 {
				t.Errorf("%d effects of 3 messages", effects)
			}
		})
	}
}
