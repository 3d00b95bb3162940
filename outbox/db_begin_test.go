package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider/outbox"
)

// firstUses are all the ways to use a transaction first. Each inserts one row into the table things.
var firstUses = map[string]func(ctx context.Context, tx pgx.Tx) error{
	"statement": func(ctx context.Context, tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `insert into things values ($1)`, "a")
		if err == nil && tag.RowsAffected() != 1 {
			err = fmt.Errorf("the tag is %q", tag)
		}
		return err
	},
	"statements without arguments": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `select 1; insert into things values ('a')`)
		return err
	},
	"statement with an option": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `insert into things values ($1)`, pgx.QueryExecModeExec, "a")
		return err
	},
	"rows": func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `insert into things select $1 returning name`, "a")
		if err != nil {
			return err
		}
		names, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err == nil && (len(names) != 1 || names[0] != "a") {
			err = fmt.Errorf("rows %v", names)
		}
		return err
	},
	"rows that are not read": func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `with i as (insert into things values ($1)) select generate_series(1, 100)`, "a")
		if err != nil {
			return err
		}
		rows.Close()
		rows.Close()
		return rows.Err()
	},
	"row": func(ctx context.Context, tx pgx.Tx) error {
		var name string
		return tx.QueryRow(ctx, `insert into things values ($1) returning name`, "a").Scan(&name)
	},
	"no row": func(ctx context.Context, tx pgx.Tx) error {
		var one int
		err := tx.QueryRow(ctx, `with i as (insert into things values ($1)) select 1 where false`, "a").Scan(&one)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		return fmt.Errorf("want no rows, got %w", err)
	},
	"batch": func(ctx context.Context, tx pgx.Tx) error {
		b := &pgx.Batch{}
		b.Queue(`select 1`)
		b.Queue(`insert into things values ($1)`, "a")
		return tx.SendBatch(ctx, b).Close()
	},
	"copy": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.CopyFrom(ctx, pgx.Identifier{"things"}, []string{"name"}, pgx.CopyFromRows([][]any{{"a"}}))
		return err
	},
	"prepare": func(ctx context.Context, tx pgx.Tx) error {
		if _, err := tx.Prepare(ctx, "", `insert into things values ($1)`); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `insert into things values ($1)`, "a")
		return err
	},
	"savepoint": func(ctx context.Context, tx pgx.Tx) error {
		return pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, `insert into things values ($1)`, "a")
			return err
		})
	},
	"connection": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Conn().Exec(ctx, `insert into things values ($1)`, "a")
		return err
	},
	"large objects": func(ctx context.Context, tx pgx.Tx) error {
		objects := tx.LargeObjects()
		if _, err := objects.Create(ctx, 0); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `insert into things values ($1)`, "a")
		return err
	},
}

// A transaction begins with its first use, whatever that is, and is one from there.
func TestTransactionBeginsWithItsFirstUse(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	b := &broker{}
	start(t, pool, b, outbox.RelayConfig{Outbox: ob})
	ctx, no := t.Context(), errors.New("no")
	if _, err := pool.Exec(ctx, `create table things (name text not null)`); err != nil {
		t.Fatal(err)
	}
	committed, ids := 0, []string{}
	for name, use := range firstUses {
		for _, result := range []error{no, nil} {
			err := pgx.BeginTxFunc(ctx, ob.On(pool), pgx.TxOptions{IsoLevel: pgx.RepeatableRead}, func(tx pgx.Tx) error {
				if err := use(ctx, tx); err != nil {
					return err
				}
				var level string
				if err := tx.QueryRow(ctx, `select current_setting($1)`, "transaction_isolation").Scan(&level); err != nil {
					return err
				}
				if level != "repeatable read" {
					return fmt.Errorf("the isolation level is %s", level)
				}
				return errors.Join(ob.In(tx).Publish(ctx, message(name, "")), result)
			})
			if !errors.Is(err, result) {
				t.Errorf("%s: %v", name, err)
			}
		}
		committed++
		ids = append(ids, name)
		var n int
		if err := pool.QueryRow(ctx, `select count(*) from things`).Scan(&n); err != nil || n != committed {
			t.Fatalf("%s: %d things, want %d (%v)", name, n, committed, err)
		}
	}
	wantIDs(t, b, ids...)

	for name, end := range map[string]func(pgx.Tx) error{
		"commit":   func(tx pgx.Tx) error { return tx.Commit(ctx) },
		"rollback": func(tx pgx.Tx) error { return tx.Rollback(ctx) },
	} {
		tx, err := ob.On(pool).Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := end(tx); err != nil {
			t.Errorf("%s of an unused transaction: %v", name, err)
		}
		if err := end(tx); !errors.Is(err, pgx.ErrTxClosed) {
			t.Errorf("second %s of an unused transaction: %v", name, err)
		}
	}
	if n := pool.Stat().AcquiredConns(); n > 1 { // the relay has one
		t.Errorf("%d connections are not back in the pool", n)
	}
}

// A first statement that fails leaves a transaction that cannot be committed, and a pool that is whole.
func TestFirstStatementFails(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx := t.Context()
	ended, cancel := context.WithCancel(ctx)
	cancel()
	var n int
	for name, fail := range map[string]func(pgx.Tx) error{
		"when it runs":    func(tx pgx.Tx) error { return tx.QueryRow(ctx, `select 1 / $1::int`, 0).Scan(&n) },
		"when it is read": func(tx pgx.Tx) error { return tx.QueryRow(ctx, `select $1::text`, "no number").Scan(&n) },
		"in its text":     func(tx pgx.Tx) error { _, err := tx.Exec(ctx, `slect $1`, 1); return err },
		"in its rows": func(tx pgx.Tx) error {
			rows, err := tx.Query(ctx, `select 1 / (3 - g) from generate_series(1, $1::int) as g`, 5)
			for err == nil && rows.Next() { //nolint:revive // all of them
			}
			return errors.Join(err, rows.Err())
		},
		"out of time": func(tx pgx.Tx) error { _, err := tx.Exec(ended, `select $1::int`, 1); return err },
		"before BEGIN": func(tx pgx.Tx) error {
			_, err := tx.Exec(ended, `select 1`)
			return err
		},
		"before BEGIN of rows": func(tx pgx.Tx) error {
			rows, err := tx.Query(ended, `select 1`)
			if !errors.Is(err, context.Canceled) || rows.Next() || !errors.Is(rows.Err(), context.Canceled) {
				t.Errorf("rows of a transaction that did not begin: %v, %v", err, rows.Err())
			}
			return err
		},
		"before BEGIN of a row": func(tx pgx.Tx) error {
			err := tx.QueryRow(ended, `select 1`).Scan(&n)
			if !errors.Is(err, context.Canceled) {
				t.Errorf("row of a transaction that did not begin: %v", err)
			}
			return err
		},
		"with its connection": func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, `select pg_terminate_backend(pg_backend_pid()), $1::int`, 1)
			return err
		},
	} {
		tx, err := ob.On(pool).Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := fail(tx); err == nil {
			t.Errorf("%s: no error", name)
		}
		readable := name == "when it is read" // for the server all was well
		_ = ob.In(tx).Publish(ctx, message(name, ""))
		if err := tx.Commit(ctx); (err == nil) != readable {
			t.Errorf("%s: commit: %v", name, err)
		}
	}
	if err := pool.QueryRow(ctx, `select count(*) from postrider.postrider_outbox`).Scan(&n); err != nil || n != 1 {
		t.Errorf("%d rows, want 1 (%v)", n, err)
	}
	if n := pool.Stat().AcquiredConns(); n > 0 {
		t.Errorf("%d connections are not back in the pool", n)
	}
}
