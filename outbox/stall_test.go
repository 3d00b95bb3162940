package outbox_test

import (
	"bytes"
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider/internal/devstack"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// privatePostgres is a PostgreSQL of the test's own, with settings.
func privatePostgres(t testing.TB, settings map[string]string) *devstack.Postgres {
	t.Helper()
	server, err := devstack.StartPostgres(t.Context(), devstack.PostgresConfig{Private: true, InMemory: true, Settings: settings})
	if err != nil {
		t.Skip(err) // the tests that need no settings fail where a server must be there
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	return server
}

func connect(t testing.TB, address string) *pgxpool.Pool {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

func execute(t testing.TB, pool *pgxpool.Pool, sql string) {
	t.Helper()
	if _, err := pool.Exec(t.Context(), sql); err != nil {
		t.Fatal(err)
	}
}

// What others leave open delays no message, and no truncation unless it has a lock of the slot.
func TestNothingOpenStallsTheRelay(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	server := privatePostgres(t, map[string]string{"max_prepared_transactions": "5"})
	pool := connect(t, server.URL)
	execute(t, pool, `create database elsewhere`)
	execute(t, pool, `create table business (n int)`)
	elsewhere := connect(t, withDatabase(pool, "elsewhere"))
	if err := outbox.Migrate(ctx, pool, ""); err != nil {
		t.Fatal(err)
	}
	ob, err := outbox.New(outbox.Config{Source: "//shop/orders"})
	if err != nil {
		t.Fatal(err)
	}
	b := &broker{}
	cfg := quick(ob)
	cfg.Retain = 100 * time.Millisecond
	start(t, pool, b, cfg)

	var want []string
	statement := func(sql string) func(pgx.Tx) error {
		return func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, sql)
			return err
		}
	}
	for i, c := range []struct {
		name  string
		in    *pgxpool.Pool
		level pgx.TxIsoLevel
		do    func(pgx.Tx) error
		then  string // executed instead of the transaction's end
		end   string // on another connection
		sends bool   // "held", once it is committed
		keeps bool   // the lock of a slot
	}{
		{name: "a transaction that has written", in: pool, do: statement(`insert into business values (1)`)},
		{name: "one in another database", in: elsewhere, do: statement(`create table business (n int)`)},
		{name: "one that has published", in: pool, sends: true, keeps: true, do: func(tx pgx.Tx) error {
			return ob.In(tx).Publish(ctx, message("held", ""))
		}},
		{
			name: "a prepared one", in: pool, sends: true, keeps: true, do: func(tx pgx.Tx) error {
				return ob.In(tx).Publish(ctx, message("held", ""))
			},
			then: `prepare transaction 'forgotten'`, end: `commit prepared 'forgotten'`,
		},
		{name: "a long read of something", in: pool, level: pgx.RepeatableRead, do: statement(`select count(*) from business`)},
		{
			name: "a long read of the outbox", in: pool, level: pgx.RepeatableRead, keeps: true,
			do: statement(`select count(*) from postrider.postrider_outbox`),
		},
		{name: "a query that is not read to its end", in: pool, keeps: true, do: statement(
			`declare half cursor for select * from postrider.postrider_outbox; fetch 1 from half`)},
	} {
		t.Run(c.name, func(t *testing.T) {
			held, err := c.in.BeginTx(ctx, pgx.TxOptions{IsoLevel: c.level})
			if err != nil {
				t.Fatal(err)
			}
			defer held.Rollback(context.WithoutCancel(ctx))
			if err := c.do(held); err != nil {
				t.Fatal(err)
			}
			if c.then != "" {
				if _, err := held.Exec(ctx, c.then); err != nil {
					t.Fatal(err)
				}
			}
			for k := range 20 {
				m := message(fmt.Sprint(i, "-", k), fmt.Sprint("key", k%3))
				publish(t, pool, ob, m)
				want = append(want, m.ID)
			}
			wantIDs(t, b, want...)
			if !c.keeps {
				wantRows(t, pool, "postrider.postrider_outbox", 0)
			}
			if c.end != "" {
				execute(t, pool, c.end)
			} else if err := held.Commit(ctx); err != nil {
				t.Fatal(err)
			}
			if c.sends {
				b.set(func(b *broker) { b.seen["//shop/orders held"] = false }) // of the case before
				want = append(want, "held")
				wantIDs(t, b, want...)
			}
			wantRows(t, pool, "postrider.postrider_outbox", 0)
		})
	}
}

// withDatabase returns the address of another database on the server of a pool.
func withDatabase(pool *pgxpool.Pool, name string) string {
	u, err := url.Parse(pool.Config().ConnString())
	if err != nil {
		panic(err)
	}
	u.Path = "/" + name
	return u.String()
}

// postgresTool finds one of PostgreSQL's programs.
func postgresTool(t testing.TB, name string) string {
	t.Helper()
	if file, err := exec.LookPath(name); err == nil {
		return file
	}
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/" + name)
	if err != nil || len(found) == 0 {
		t.Skipf("there is no %s on this machine", name)
	}
	return slices.Max(found)
}

func dump(t testing.TB, address string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), postgresTool(t, "pg_dump"), "--dbname="+address, "--no-owner")
	var problem bytes.Buffer
	cmd.Stderr = &problem
	out, err := cmd.Output()
	if err != nil {
		t.Skipf("pg_dump: %v\n%s", err, problem.Bytes()) // it may be older than the server
	}
	return out
}

func restore(t testing.TB, address string, script []byte) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), postgresTool(t, "psql"), "--set=ON_ERROR_STOP=1", "--quiet", "--dbname="+address)
	cmd.Stdin = bytes.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("psql: %v\n%s", err, out)
	}
}

// A dump restored: in a new cluster, where the xids of its rows have not come yet, and beside the database that it is of.
func TestDumpAndRestore(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx := t.Context()
	execute(t, pool, `do $$ begin for i in 1..3000 loop perform pg_current_xact_id(); commit; end loop; end $$`)
	b := &broker{}
	msgs := messages(30)
	_, stop := start(t, pool, b, quick(ob))
	publish(t, pool, ob, msgs[:10]...)
	wantIDs(t, b, ids(msgs[:10])...)
	stop()
	for _, m := range msgs[10:20] { // waiting, each with an xid of its own
		publish(t, pool, ob, m)
	}
	held, err := pool.Begin(ctx) // not in the dump
	if err != nil {
		t.Fatal(err)
	}
	defer held.Rollback(ctx)
	if err := ob.In(held).Publish(ctx, message("open", "")); err != nil {
		t.Fatal(err)
	}
	script := dump(t, pool.Config().ConnString())

	beside := postridertest.Postgres(t)
	for name, c := range map[string]struct {
		address string
		repeats int
	}{
		"new cluster":  {privatePostgres(t, nil).URL, 10}, // nobody knows there what was sent
		"same cluster": {beside.Config().ConnString(), 0},
	} {
		t.Run(name, func(t *testing.T) {
			restore(t, c.address, script)
			restored := connect(t, c.address)
			b := &broker{}
			start(t, restored, b, quick(ob))
			first := 10 - c.repeats
			wantIDs(t, b, ids(msgs[first:20])...)
			publish(t, restored, ob, msgs[20:]...)
			wantIDs(t, b, ids(msgs[first:])...)
		})
	}
}

// fakedPostgres is a PostgreSQL whose clock the test sets, by libfaketime.
func fakedPostgres(t *testing.T) (pool *pgxpool.Pool, setClock func(offset time.Duration)) {
	t.Helper()
	libraries, err := filepath.Glob("/usr/lib/*/faketime/libfaketime.so.1")
	if err != nil || len(libraries) == 0 {
		t.Skip("there is no libfaketime on this machine: install Debian's faketime")
	}
	clock := filepath.Join(t.TempDir(), "clock")
	setClock = func(offset time.Duration) {
		t.Helper()
		if err := os.WriteFile(clock+".new", fmt.Appendf(nil, "%+d\n", int(offset.Seconds())), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(clock+".new", clock); err != nil { // whole or not at all
			t.Fatal(err)
		}
	}
	setClock(0)
	for dir := filepath.Dir(clock); len(dir) > len(os.TempDir()); dir = filepath.Dir(dir) { // the server has its own account
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, value := range map[string]string{
		"LD_PRELOAD": libraries[0], "FAKETIME_TIMESTAMP_FILE": clock, "FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1",
	} {
		t.Setenv(name, value)
	}
	pool = connect(t, privatePostgres(t, nil).URL)
	for name := range map[string]bool{"LD_PRELOAD": true, "FAKETIME_TIMESTAMP_FILE": true} {
		if err := os.Unsetenv(name); err != nil {
			t.Fatal(err)
		}
	}
	return pool, setClock
}

// The database's clock jumps, while a relay leads and while none does: messages go on in their order, none is lost at the turns
// of the ring, and a lease that ends in the future of the new time is not waited for.
func TestClockSetBack(t *testing.T) { // not parallel: it sets the environment
	pool, setClock := fakedPostgres(t)
	ctx := t.Context()
	if err := outbox.Migrate(ctx, pool, ""); err != nil {
		t.Fatal(err)
	}
	ob, err := outbox.New(outbox.Config{Source: "//shop/orders"})
	if err != nil {
		t.Fatal(err)
	}
	var network cable
	doomed := clonePool(t, pool, func(cfg *pgxpool.Config) { cfg.ConnConfig.DialFunc = network.dial })
	b, n := &broker{}, 0
	var want []string
	more := func() {
		t.Helper()
		for range 20 {
			m := message(fmt.Sprint(n), fmt.Sprint("key", n%3))
			publish(t, pool, ob, m)
			want = append(want, m.ID)
			n++
		}
		wantIDs(t, b, want...)
	}
	now := func() (at time.Time) {
		t.Helper()
		if err := pool.QueryRow(ctx, `select clock_timestamp()`).Scan(&at); err != nil {
			t.Fatal(err)
		}
		return at
	}
	cfg := quick(ob)
	cfg.Retain = 200 * time.Millisecond
	_, stop := start(t, doomed, b, cfg)
	for _, offset := range []time.Duration{0, -time.Hour, -time.Hour + time.Second, -100 * time.Hour, 100 * time.Hour, 0} {
		setClock(offset)
		if off := time.Since(now().Add(-offset)).Abs(); off > time.Minute {
			t.Fatalf("the clock was set by %v and is %v off", offset, off)
		}
		more()
		wantRows(t, pool, `postrider.postrider_outbox_relay
			where expires between clock_timestamp() and clock_timestamp() + interval '2 seconds'`, 1)
	}
	network.Cut() // dies with its lease
	setClock(-time.Hour)
	start(t, pool, b, cfg)
	more()
	stop()
	wantRows(t, pool, "postrider.postrider_outbox", 0)
	if b.repeated > 20 {
		t.Errorf("%d messages were repeated", b.repeated)
	}
}
