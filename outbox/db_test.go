package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/faultproxy"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// waysToPublish are all the ways to commit some messages in a transaction.
var waysToPublish = map[string]func(context.Context, *pgxpool.Pool, *outbox.Outbox, []*postrider.Message) error{
	"in the caller's transaction": func(ctx context.Context, pool *pgxpool.Pool, ob *outbox.Outbox, msgs []*postrider.Message) error {
		return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error { return ob.In(tx).Publish(ctx, msgs...) })
	},
	"with the commit": func(ctx context.Context, pool *pgxpool.Pool, ob *outbox.Outbox, msgs []*postrider.Message) error {
		return pgx.BeginFunc(ctx, ob.On(pool), func(tx pgx.Tx) error { return ob.In(tx).Publish(ctx, msgs...) })
	},
	"in a transaction of its own": func(ctx context.Context, pool *pgxpool.Pool, ob *outbox.Outbox, msgs []*postrider.Message) error {
		return ob.On(pool).Publish(ctx, msgs...)
	},
}

func TestEveryWayToPublish(t *testing.T) {
	t.Parallel()
	for name, publish := range waysToPublish {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool, ob := setup(t)
			b := &broker{}
			start(t, pool, b, outbox.RelayConfig{Outbox: ob})
			var want []string
			for _, n := range []int{0, 1, 2, 99, 100, 1500} {
				for _, keys := range []int{0, 1, 7} {
					msgs := make([]*postrider.Message, n)
					for i := range msgs {
						key := ""
						if keys > 0 {
							key = fmt.Sprint("key", i%keys)
						}
						msgs[i] = message(fmt.Sprintf("%d/%d/%d", n, keys, i), key)
						want = append(want, msgs[i].ID)
					}
					if err := publish(t.Context(), pool, ob, msgs); err != nil {
						t.Fatal(err)
					}
				}
			}
			wantIDs(t, b, want...)
		})
	}
}

// Whoever waits for a key draws its number when it has it: else the relay would send the later transaction first.
func TestNumberIsDrawnUnderTheKeysLock(t *testing.T) {
	t.Parallel()
	for name, publish := range waysToPublish {
		for _, n := range []int{1, 5, 150} {
			t.Run(fmt.Sprint(name, " ", n), func(t *testing.T) {
				t.Parallel()
				pool, ob := setup(t)
				ctx := t.Context()
				first, err := pool.Begin(ctx)
				if err != nil {
					t.Fatal(err)
				}
				defer first.Rollback(ctx)
				if err := ob.In(first).Publish(ctx, message("first", "a")); err != nil {
					t.Fatal(err)
				}
				done := make(chan error, 1)
				go func() {
					msgs := messages(n)
					msgs[n-1] = message("waits", "a")
					done <- publish(ctx, pool, ob, msgs)
				}()
				postridertest.Eventually(t, func() error {
					var waiting bool
					err := pool.QueryRow(ctx, `select exists (select from pg_locks where locktype = 'advisory' and not granted
						and database = (select oid from pg_database where datname = current_database()))`).Scan(&waiting)
					if err == nil && !waiting {
						err = errors.New("nobody waits for the key")
					}
					return err
				})
				if err := ob.On(pool).Publish(ctx, message("free", "")); err != nil {
					t.Fatal(err)
				}
				if err := first.Commit(ctx); err != nil {
					t.Fatal(err)
				}
				if err := <-done; err != nil {
					t.Fatal(err)
				}
				var lower int
				err = pool.QueryRow(ctx, `select count(*) from postrider.postrider_outbox
					where id < (select id from postrider.postrider_outbox where convert_from(data, 'utf8') like '%free%')`).Scan(&lower)
				if err != nil || lower != 1 {
					t.Errorf("%d rows have lower numbers than the one that did not wait, want 1 (%v)", lower, err)
				}
			})
		}
	}
}

func TestMessagesGoWithTheCommit(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	b := &broker{}
	start(t, pool, b, outbox.RelayConfig{Outbox: ob})
	ctx, no := t.Context(), errors.New("no")
	rows := func(tx pgx.Tx) (n int) {
		if err := tx.QueryRow(ctx, `select count(*) from postrider.postrider_outbox`).Scan(&n); err != nil {
			t.Error(err)
		}
		return n
	}
	err := pgx.BeginFunc(ctx, ob.On(pool), func(tx pgx.Tx) error {
		if err := ob.In(tx).Publish(ctx, message("rolled back", "a")); err != nil {
			return err
		}
		return no
	})
	if !errors.Is(err, no) {
		t.Fatal(err)
	}

	nested := func(tx pgx.Tx, id string, result error) error {
		return pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
			return errors.Join(ob.In(tx).Publish(ctx, message(id, "a")), result)
		})
	}
	var ended pgx.Tx
	err = pgx.BeginTxFunc(ctx, ob.On(pool), pgx.TxOptions{IsoLevel: pgx.Serializable}, func(tx pgx.Tx) error {
		ended = tx
		data := message("1", "a")
		if err := ob.In(tx).Publish(ctx, data); err != nil {
			return err
		}
		clear(data.Data) // a Publisher keeps nothing
		wantCode(t, ob.In(tx).Publish(ctx, message("", "")), postrider.InvalidArgument)
		err := pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
			if err := errors.Join(nested(tx, "kept inside", nil), ob.In(tx).Publish(ctx, message("dropped", ""))); err != nil {
				return err
			}
			return no
		})
		if !errors.Is(err, no) || !errors.Is(nested(tx, "dropped", no), no) {
			return fmt.Errorf("savepoint: %w", err)
		}
		if err := nested(tx, "2", nil); err != nil {
			return err
		}
		open, err := tx.Begin(ctx) // the commit of the whole releases it
		if err != nil {
			return err
		}
		if n := rows(open); n != 0 {
			t.Errorf("%d rows are there before the commit", n)
		}
		return errors.Join(ob.In(open).Publish(ctx, message("3", "b")), ob.In(tx).Publish(ctx, message("4", "")))
	})
	if err != nil {
		t.Fatal(err)
	}
	wantIDs(t, b, "1", "2", "3", "4")
	if got := string(b.copy()[0].Data); got != `{"id":"1"}` {
		t.Errorf("data %q", got)
	}
	if err := ob.In(ended).Publish(ctx, message("5", "")); !errors.Is(err, pgx.ErrTxClosed) {
		t.Errorf("publish in an ended transaction: %v", err)
	}
	if _, err := ended.Exec(ctx, `select 1`); !errors.Is(err, pgx.ErrTxClosed) {
		t.Errorf("statement in an ended transaction: %v", err)
	}
	if err := errors.Join(ended.Commit(ctx), ended.Rollback(ctx)); !errors.Is(err, pgx.ErrTxClosed) {
		t.Errorf("end of an ended transaction: %v", err)
	}
	if n := pool.Stat().AcquiredConns(); n > 1 { // the relay has one
		t.Errorf("%d connections are not back in the pool", n)
	}
}

// What publishes keys call by call may deadlock, unless the locks are taken together.
func TestKeysInAnyOrderDoNotDeadlock(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			keys := []string{"a", "b", "c"}
			if w%2 == 1 {
				slices.Reverse(keys)
			}
			for i := range 25 {
				err := pgx.BeginFunc(t.Context(), ob.On(pool), func(tx pgx.Tx) error {
					for _, key := range keys {
						if err := ob.In(tx).Publish(t.Context(), message(fmt.Sprint(w, i, key), key)); err != nil {
							return err
						}
						if _, err := tx.Exec(t.Context(), `select pg_sleep(0.0005)`); err != nil {
							return err
						}
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// What fails at the commit leaves nothing behind, and the connection usable.
func TestCommitThatFails(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx := t.Context()
	if _, err := pool.Exec(ctx, `create table account (id int unique deferrable initially deferred); insert into account values (1)`); err != nil {
		t.Fatal(err)
	}
	err := pgx.BeginFunc(ctx, ob.On(pool), func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `insert into account values (1)`); err != nil {
			return err
		}
		return ob.In(tx).Publish(ctx, message("1", "a"))
	})
	var pg *pgconn.PgError
	var e *postrider.Error
	if !errors.As(err, &pg) || pg.Code != "23505" || !errors.As(err, &e) || e.Code != postrider.FailedPrecondition || !e.Unprocessed {
		t.Errorf("error %v, want the broken constraint", err)
	}
	err = pgx.BeginFunc(ctx, ob.On(pool), func(tx pgx.Tx) error {
		_, _ = tx.Exec(ctx, `no sql`)
		return ob.In(tx).Publish(ctx, message("2", "a"))
	})
	if !errors.Is(err, pgx.ErrTxCommitRollback) {
		t.Errorf("commit of a failed transaction: %v", err)
	}
	other, err := outbox.New(outbox.Config{Source: "//s", Schema: "elsewhere"})
	if err != nil {
		t.Fatal(err)
	}
	for name, publish := range waysToPublish {
		err := publish(ctx, pool, other, messages(1))
		if wantCode(t, err, postrider.FailedPrecondition); !strings.Contains(err.Error(), "outbox.Migrate") {
			t.Errorf("%s: %v, want what to do", name, err)
		}
	}
	var n int
	if err := pool.QueryRow(ctx, `select count(*) from postrider.postrider_outbox`).Scan(&n); err != nil || n != 0 {
		t.Errorf("%d rows, %v", n, err)
	}
	if n := pool.Stat().AcquiredConns(); n > 0 {
		t.Errorf("%d connections are not back in the pool", n)
	}
}

// An answer that is lost tells neither that the messages are in nor that they are not, and who publishes them again with the
// same ids publishes them once.
func TestLostAnswerOfAPublish(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	proxy, broken := throughProxy(t, pool)
	if err := ob.On(broken).Publish(t.Context(), message("0", "a")); err != nil { // connect, and prepare
		t.Fatal(err)
	}
	done := make(chan error, 1)
	proxy.Swallow()
	go func() { done <- ob.On(broken).Publish(t.Context(), message("again", "a")) }()
	b := &broker{}
	start(t, pool, b, outbox.RelayConfig{Outbox: ob})
	wantIDs(t, b, "0", "again")
	proxy.Cut()
	var e *postrider.Error
	if err := <-done; !errors.As(err, &e) || e.Code != postrider.Unavailable || e.Unprocessed {
		t.Errorf("error %v, want Unavailable, and that it may have been accepted", err)
	}
	if err := ob.On(broken).Publish(t.Context(), message("again", "a"), message("last", "a")); err != nil {
		t.Fatal(err)
	}
	wantIDs(t, b, "0", "again", "last")
}

// The same where the connection breaks while COMMIT and the messages are on their way.
func TestLostAnswerOfADeferredCommit(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	proxy, broken := throughProxy(t, pool)
	ctx := t.Context()
	if err := pgx.BeginFunc(ctx, ob.On(broken), func(tx pgx.Tx) error { return ob.In(tx).Publish(ctx, message("0", "a")) }); err != nil {
		t.Fatal(err)
	}
	tx, err := ob.On(broken).Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := ob.In(tx).Publish(ctx, message("again", "a")); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	proxy.Swallow()
	go func() { done <- tx.Commit(ctx) }()
	b := &broker{}
	start(t, pool, b, outbox.RelayConfig{Outbox: ob})
	wantIDs(t, b, "0", "again")
	proxy.Cut()
	var e *postrider.Error
	if err := <-done; !errors.As(err, &e) || e.Code != postrider.Unavailable || e.Unprocessed {
		t.Errorf("error %v, want Unavailable, and that it may have been accepted", err)
	}
	if err := ob.On(broken).Publish(ctx, message("again", "a"), message("last", "a")); err != nil {
		t.Fatal(err)
	}
	wantIDs(t, b, "0", "again", "last")
}

// throughProxy returns a pool whose connections go through a proxy.
func throughProxy(t testing.TB, pool *pgxpool.Pool) (*faultproxy.Proxy, *pgxpool.Pool) {
	t.Helper()
	cfg := pool.Config()
	conn := cfg.ConnConfig
	proxy, err := faultproxy.New(net.JoinHostPort(conn.Host, fmt.Sprint(conn.Port)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = proxy.Close() })
	addr, err := net.ResolveTCPAddr("tcp", proxy.Addr())
	if err != nil {
		t.Fatal(err)
	}
	conn.Host, conn.Port, conn.Fallbacks = "127.0.0.1", uint16(addr.Port), nil
	conn.ConnectTimeout = 30 * time.Second
	cfg.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return false } // it would be what hangs
	broken, err := pgxpool.NewWithConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(broken.Close)
	return proxy, broken
}
