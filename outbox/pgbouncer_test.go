package outbox_test

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// Everything goes through a PgBouncer in transaction mode: migration, writers of all kinds, the relay and its lease.
func TestPgBouncer(t *testing.T) {
	t.Parallel()
	for name, mode := range map[string]pgx.QueryExecMode{
		"cache_describe": pgx.QueryExecModeCacheDescribe, "exec": pgx.QueryExecModeExec, "simple": pgx.QueryExecModeSimpleProtocol,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool := postridertest.PgBouncer(t, postridertest.Postgres(t), mode)
			if err := outbox.Migrate(t.Context(), pool, ""); err != nil {
				t.Fatal(err)
			}
			ob, err := outbox.New(outbox.Config{Source: "//shop/orders", MaxDepth: 1_000_000})
			if err != nil {
				t.Fatal(err)
			}
			b := &broker{}
			_, stop := start(t, pool, b, outbox.RelayConfig{Outbox: ob})
			db := stdlib.OpenDBFromPool(pool)
			t.Cleanup(func() { _ = db.Close() })
			ways := map[string]func(context.Context, *pgxpool.Pool, *outbox.Outbox, []*postrider.Message) error{
				"sql": func(ctx context.Context, _ *pgxpool.Pool, ob *outbox.Outbox, msgs []*postrider.Message) error {
					return inSQL(ctx, db, func(tx *sql.Tx) error { return ob.InSQL(tx).Publish(ctx, msgs...) })
				},
			}
			for name, way := range waysToPublish {
				ways[strings.ReplaceAll(name, " ", "-")] = way
			}
			const rounds = 10
			var writers sync.WaitGroup
			want := 0
			for name, publish := range ways {
				for _, n := range []int{1, 7, 120} {
					want += rounds * n
					writers.Go(func() {
						for round := range rounds {
							msgs := make([]*postrider.Message, n)
							for i := range msgs {
								msgs[i] = message(fmt.Sprintf("%s-%d %06d", name, n, round*n+i), fmt.Sprintf("%s-%d", name, n))
							}
							if err := publish(t.Context(), pool, ob, msgs); err != nil {
								t.Errorf("%s: %v", name, err)
								return
							}
						}
					})
				}
			}
			writers.Wait()
			postridertest.Eventually(t, func() error {
				if n := len(b.copy()); n != want {
					return fmt.Errorf("%d messages arrived of %d", n, want)
				}
				return nil
			})
			byKey := map[string][]string{}
			for _, m := range b.copy() {
				byKey[m.Key()] = append(byKey[m.Key()], m.ID)
			}
			for key, ids := range byKey {
				if !slices.IsSorted(ids) {
					t.Errorf("%s out of order: %q", key, clip(ids))
				}
			}
			if _, err := ob.Status(t.Context(), pool); err != nil {
				t.Error(err)
			}
			stop()
			start(t, pool, b, outbox.RelayConfig{Outbox: ob}) // the lease was given back, and is taken again
			if err := ob.On(pool).Publish(t.Context(), message("last", "")); err != nil {
				t.Fatal(err)
			}
			postridertest.Eventually(t, func() error {
				if ids := b.ids(); ids[len(ids)-1] != "last" {
					return fmt.Errorf("the last is %s", ids[len(ids)-1])
				}
				return nil
			})
		})
	}
}
