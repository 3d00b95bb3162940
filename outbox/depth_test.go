package outbox_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// Above the high-water mark Publish fails and the transaction goes on; once the relay has caught up, Publish works again.
func TestMaxDepth(t *testing.T) {
	t.Parallel()
	ways := map[string]func(context.Context, *pgxpool.Pool, *outbox.Outbox, []*postrider.Message) error{
		"database/sql": func(ctx context.Context, pool *pgxpool.Pool, ob *outbox.Outbox, msgs []*postrider.Message) error {
			db := stdlib.OpenDBFromPool(pool)
			defer db.Close()
			return inSQL(ctx, db, func(tx *sql.Tx) error { return ob.InSQL(tx).Publish(ctx, msgs...) })
		},
	}
	maps.Copy(ways, waysToPublish)
	for name, publish := range ways {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool, _ := setup(t)
			ob, err := outbox.New(outbox.Config{Source: "//shop/orders", MaxDepth: 100})
			if err != nil {
				t.Fatal(err)
			}
			ctx := t.Context()
			sent := 0
			full := func() error {
				msgs := messages(30)
				for i := range msgs {
					msgs[i].ID = fmt.Sprint(sent + i)
				}
				err := publish(ctx, pool, ob, msgs)
				if err == nil {
					sent += len(msgs)
				}
				return err
			}
			postridertest.Eventually(t, func() error {
				err := full()
				if err == nil {
					return errors.New("it is not full")
				}
				var e *postrider.Error
				if !errors.As(err, &e) || e.Code != postrider.ResourceExhausted || !postrider.Retryable(err) || !e.Unprocessed {
					t.Fatalf("error %v, want ResourceExhausted that may be tried again", err)
				}
				return nil
			})
			if sent <= 100 {
				t.Errorf("full after %d messages", sent)
			}
			err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
				wantCode(t, ob.In(tx).Publish(ctx, message("refused", "")), postrider.ResourceExhausted)
				_, err := tx.Exec(ctx, `select 1`)
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			b := &broker{}
			start(t, pool, b, outbox.RelayConfig{Outbox: ob})
			postridertest.Eventually(t, full)
			postridertest.Eventually(t, func() error {
				if n := len(b.ids()); n != sent {
					return fmt.Errorf("%d messages arrived of %d", n, sent)
				}
				return nil
			})
		})
	}
}

func inSQL(ctx context.Context, db *sql.DB, fn func(*sql.Tx) error) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err := fn(tx); err != nil {
		return errors.Join(err, tx.Rollback())
	}
	return tx.Commit()
}
