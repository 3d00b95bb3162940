package migrate_test

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/migrate"
	"github.com/postrider/postrider/postridertest"
)

func file(sql string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(sql)} }

// filesV1 and filesV2 are two releases of one line.
func filesV1() fstest.MapFS {
	return fstest.MapFS{
		"migrations/001_first.up.sql":   file(`create table :"schema".one (n int); create index on :"schema".one (n);`),
		"migrations/001_first.down.sql": file(`drop table :"schema".one;`),
	}
}

func filesV2() fstest.MapFS {
	files := filesV1()
	files["migrations/002_second.up.sql"] = file(`alter table :"schema".one add m int; create table :"schema".two (n int);`)
	files["migrations/002_second.down.sql"] = file(`drop table :"schema".two; alter table :"schema".one drop m;`)
	return files
}

func tables(t *testing.T, pool *pgxpool.Pool, schema string) []string {
	t.Helper()
	var names []string
	err := pool.QueryRow(t.Context(),
		`select coalesce(array_agg(tablename::text order by tablename), '{}') from pg_tables where schemaname = $1`, schema).Scan(&names)
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func wantTables(t *testing.T, pool *pgxpool.Pool, schema string, want ...string) {
	t.Helper()
	if got := tables(t, pool, schema); !slices.Equal(got, want) {
		t.Fatalf("tables of %s: %q, want %q", schema, got, want)
	}
}

func TestUpAndDown(t *testing.T) {
	t.Parallel()
	ctx, pool := t.Context(), postridertest.Postgres(t)
	run := func(line string, files fs.FS) {
		t.Helper()
		if err := migrate.Run(ctx, pool, "up_down", line, files); err != nil {
			t.Fatal(err)
		}
	}
	run("numbers", filesV1())
	wantTables(t, pool, "up_down", "one", "postrider_migration")
	run("numbers", filesV2())
	run("numbers", filesV2())
	run("numbers", filesV1()) // an instance of the old release starts beside the new ones
	run("letters", fstest.MapFS{
		"001_a.up.sql": file(`create table :"schema".a ()`), "001_a.down.sql": file(`drop table :"schema".a`),
	})
	wantTables(t, pool, "up_down", "a", "one", "postrider_migration", "two")

	if err := migrate.Down(ctx, pool, "up_down", "numbers", filesV1()); err == nil || !strings.Contains(err.Error(), "version 2") {
		t.Fatalf("the old release takes away what it does not know: %v", err)
	}
	if err := migrate.Down(ctx, pool, "up_down", "numbers", filesV2()); err != nil {
		t.Fatal(err)
	}
	wantTables(t, pool, "up_down", "a", "postrider_migration")
	run("numbers", filesV2())
	wantTables(t, pool, "up_down", "a", "one", "postrider_migration", "two")
}

func TestManyInstancesStartAtOnce(t *testing.T) {
	t.Parallel()
	pool := postridertest.Postgres(t)
	errs := make([]error, 8)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { errs[i] = migrate.Run(t.Context(), pool, "at_once", "numbers", filesV2()) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	wantTables(t, pool, "at_once", "one", "postrider_migration", "two")
}

func TestFailedMigrationLeavesNothing(t *testing.T) {
	t.Parallel()
	pool, files := postridertest.Postgres(t), filesV2()
	files["migrations/002_second.up.sql"] = file(`create table :"schema".two (n int); select 1/0;`)
	err := migrate.Run(t.Context(), pool, "failed", "numbers", files)
	if err == nil || !strings.Contains(err.Error(), "version 2") {
		t.Fatalf("error %v, want one that names version 2", err)
	}
	wantTables(t, pool, "failed")
}

func TestSQLIsWhatRunDoes(t *testing.T) {
	t.Parallel()
	ctx, pool := t.Context(), postridertest.Postgres(t)
	sql, err := migrate.SQL("by_hand", "numbers", filesV2())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(ctx, sql); err != nil {
		t.Fatalf("%v in\n%s", err, sql)
	}
	before := versions(ctx, t, pool)
	if err := migrate.Run(ctx, pool, "by_hand", "numbers", filesV2()); err != nil {
		t.Fatal(err)
	}
	if after := versions(ctx, t, pool); before != 2 || after != 2 {
		t.Fatalf("%d versions noted by the script, %d after Run, want 2 and 2", before, after)
	}
	wantTables(t, pool, "by_hand", "one", "postrider_migration", "two")
	if sql, err = migrate.DownSQL("by_hand", "numbers", filesV2()); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(ctx, sql); err != nil {
		t.Fatalf("%v in\n%s", err, sql)
	}
	wantTables(t, pool, "by_hand", "postrider_migration")
	if n := versions(ctx, t, pool); n != 0 {
		t.Errorf("%d versions are noted after the script down", n)
	}
}

func versions(ctx context.Context, t *testing.T, pool *pgxpool.Pool) (n int) {
	t.Helper()
	if err := pool.QueryRow(ctx, `select count(*) from by_hand.postrider_migration`).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestReaderNeedsNoRightsWhenNothingIsToDo(t *testing.T) {
	t.Parallel()
	ctx, pool := t.Context(), postridertest.Postgres(t)
	if err := migrate.Run(ctx, pool, "no_rights", "numbers", filesV1()); err != nil {
		t.Fatal(err)
	}
	_, err := pool.Exec(ctx, `create role postrider_migrate_reader; grant usage on schema no_rights to postrider_migrate_reader;
		grant select on no_rights.postrider_migration to postrider_migrate_reader`)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, err := pool.Exec(context.WithoutCancel(ctx), `drop owned by postrider_migrate_reader; drop role postrider_migrate_reader`)
		if err != nil {
			t.Error(err)
		}
	})
	cfg := pool.Config()
	cfg.ConnConfig.RuntimeParams["role"] = "postrider_migrate_reader"
	reader, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if err := migrate.Run(ctx, reader, "no_rights", "numbers", filesV1()); err != nil {
		t.Fatal(err)
	}
	if err := migrate.Run(ctx, reader, "no_rights", "numbers", filesV2()); err == nil {
		t.Fatal("a role that may only read has migrated")
	}
}

func TestQuote(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"postrider", "_x1", strings.Repeat("a", 63)} {
		if got, err := migrate.Quote(name); err != nil || got != `"`+name+`"` {
			t.Errorf("Quote(%q) = %s, %v", name, got, err)
		}
	}
	for _, name := range []string{"", "1a", "Shop", "a-b", "a.b", `a"; drop table x; --`, "pg_temp", "ä", strings.Repeat("a", 64)} {
		if got, err := migrate.Quote(name); !errors.Is(err, postrider.InvalidArgument) {
			t.Errorf("Quote(%q) = %s, %v, want InvalidArgument", name, got, err)
		}
	}
}

func TestFilesAreChecked(t *testing.T) {
	t.Parallel()
	gap := filesV1()
	gap["migrations/003_third.up.sql"] = file("")
	noDown := filesV1()
	delete(noDown, "migrations/001_first.down.sql")
	for name, files := range map[string]fs.FS{"gap": gap, "no down": noDown} {
		if _, err := migrate.SQL("x", "numbers", files); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
