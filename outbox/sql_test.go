package outbox_test

import (
	"bytes"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/lib/pq"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
)

func TestDatabaseSQL(t *testing.T) {
	t.Parallel()
	open := map[string]func(t *testing.T, address string) *sql.DB{
		"lib/pq": func(t *testing.T, address string) *sql.DB {
			t.Helper()
			c, err := pq.NewConnector(address)
			if err != nil {
				t.Fatal(err)
			}
			return sql.OpenDB(c)
		},
	}
	for name, mode := range map[string]pgx.QueryExecMode{
		"pgx": pgx.QueryExecModeCacheStatement, "pgx describe": pgx.QueryExecModeCacheDescribe,
		"pgx exec": pgx.QueryExecModeExec, "pgx simple": pgx.QueryExecModeSimpleProtocol,
	} {
		open[name] = func(t *testing.T, address string) *sql.DB {
			t.Helper()
			cfg, err := pgx.ParseConfig(address)
			if err != nil {
				t.Fatal(err)
			}
			cfg.DefaultQueryExecMode = mode
			return stdlib.OpenDB(*cfg)
		}
	}
	for name, open := range open {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool, ob := setup(t)
			db := open(t, pool.Config().ConnString())
			t.Cleanup(func() { _ = db.Close() })
			var want []*postrider.Message
			for _, n := range []int{0, 1, 3, 250} {
				for _, key := range []string{"", `k"e\y 'ü`} {
					msgs := make([]*postrider.Message, n)
					for i := range msgs {
						msgs[i] = message(fmt.Sprint(n, key, i), key)
						msgs[i].Topic = `orders."\ü'.v1`
						switch i % 3 {
						case 1:
							msgs[i].Data = nil
						case 2:
							msgs[i].Data = []byte("\x00\xff'\"\\{},NULL")
						}
					}
					err := inSQL(t.Context(), db, func(tx *sql.Tx) error { return ob.InSQL(tx).Publish(t.Context(), msgs...) })
					if err != nil {
						t.Fatal(err)
					}
					want = append(want, msgs...)
				}
			}
			no := errors.New("no")
			err := inSQL(t.Context(), db, func(tx *sql.Tx) error {
				return errors.Join(ob.InSQL(tx).Publish(t.Context(), message("rolled back", "k")), no)
			})
			if !errors.Is(err, no) {
				t.Fatal(err)
			}
			b := &broker{}
			start(t, pool, b, outbox.RelayConfig{Outbox: ob})
			wantIDs(t, b, ids(want)...)
			for i, got := range b.copy() {
				if got.Topic != want[i].Topic || got.Key() != want[i].Key() || !bytes.Equal(got.Data, want[i].Data) {
					t.Fatalf("message %d is %+v, want %+v", i, got, want[i])
				}
			}
			other, err := outbox.New(outbox.Config{Source: "//s", Schema: "elsewhere"})
			if err != nil {
				t.Fatal(err)
			}
			err = inSQL(t.Context(), db, func(tx *sql.Tx) error { return other.InSQL(tx).Publish(t.Context(), message("1", "")) })
			var e *postrider.Error
			if !errors.As(err, &e) || e.Code != postrider.FailedPrecondition || !e.Unprocessed || !strings.Contains(err.Error(), "elsewhere") {
				t.Errorf("error %v", err)
			}
		})
	}
}
