package migrate

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
)

// placeholder stands for the quoted schema in the files.
const placeholder = `:"schema"`

// Statements of the table that holds what is there. It is append-only but for Down.
const (
	createSchema = `create schema if not exists :"schema"`
	createTable  = `create table if not exists :"schema".postrider_migration (
	line    text        not null,
	version integer     not null,
	at      timestamptz not null default now(),
	primary key (line, version)
)`
	insertVersion = `insert into :"schema".postrider_migration (line, version) values ($1, $2)`
	deleteVersion = `delete from :"schema".postrider_migration where line = $1 and version = $2`

	// One row by the primary key's index; no lock beyond that of reading.
	currentVersion = `select coalesce(max(version), 0) from :"schema".postrider_migration where line = $1`

	// What is there is asked of the catalogue's tables: to_regclass and to_regnamespace answer from a cache that a
	// transaction does not refresh after it has waited for an advisory lock.
	haveSchema = `select exists (select from pg_namespace where nspname = $1)`
	haveTable  = `select exists (select from pg_tables where schemaname = $1 and tablename = 'postrider_migration')`

	// The lock of one schema, held to the end of the transaction, so that it is safe behind a pooler.
	lockSchema = `select pg_advisory_xact_lock(pg_catalog.hashtextextended('postrider_migration.' || $1, 0))`
)

// Run brings line up to the newest version in files, creating the schema if it does not exist. A version in the database
// that is newer than files, left by a newer release, is kept: migrations add, so that the older program still runs.
func Run(ctx context.Context, pool *pgxpool.Pool, schema, line string, files fs.FS) error {
	l, err := newLine(schema, line, files)
	if err != nil {
		return err
	}
	if pool == nil {
		return noPool(line)
	}
	if version, err := l.version(ctx, pool); err != nil {
		return l.failed("migrate schema ", err)
	} else if version >= len(l.steps) {
		return nil
	}
	err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		version, err := l.lock(ctx, tx)
		if err != nil {
			return err
		}
		if err := l.prepare(ctx, tx); err != nil {
			return err
		}
		for i := version; i < len(l.steps); i++ {
			if err := l.apply(ctx, tx, i+1, l.steps[i].up, insertVersion); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return l.failed("migrate schema ", err)
	}
	return nil
}

func noPool(line string) error {
	return postrider.Errorf(postrider.InvalidArgument, "%s: migrate: the pool is nil", line)
}

// Down takes all tables of line out of the schema, with what is in them. The schema stays.
func Down(ctx context.Context, pool *pgxpool.Pool, schema, line string, files fs.FS) error {
	l, err := newLine(schema, line, files)
	if err != nil {
		return err
	}
	if pool == nil {
		return noPool(line)
	}
	err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		version, err := l.lock(ctx, tx)
		if err != nil {
			return err
		}
		if version > len(l.steps) {
			return postrider.Errorf(postrider.FailedPrecondition, "the schema is at version %d, this program knows %d: use the newer program", version, len(l.steps))
		}
		for i := version; i > 0; i-- {
			if err := l.apply(ctx, tx, i, l.steps[i-1].down, deleteVersion); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return l.failed("take down schema ", err)
	}
	return nil
}

// SQL returns what Run does to a database without line, as a script for another tool. After it Run finds nothing to do.
func SQL(schema, line string, files fs.FS) (string, error) {
	l, err := newLine(schema, line, files)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "begin;\n\n%s;\n\n%s;\n", l.in(createSchema), l.in(createTable))
	for i, s := range l.steps {
		note := strings.NewReplacer("$1", "'"+line+"'", "$2", fmt.Sprint(i+1)).Replace(l.in(insertVersion))
		fmt.Fprintf(&b, "\n-- %s %03d\n%s\n%s;\n", line, i+1, strings.TrimSpace(s.up), note)
	}
	b.WriteString("\ncommit;\n")
	return b.String(), nil
}

// DownSQL returns what Down does to a database with the newest version of line, as a script for another tool.
func DownSQL(schema, line string, files fs.FS) (string, error) {
	l, err := newLine(schema, line, files)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString("begin;\n")
	for i, s := range slices.Backward(l.steps) {
		note := strings.NewReplacer("$1", "'"+line+"'", "$2", fmt.Sprint(i+1)).Replace(l.in(deleteVersion))
		fmt.Fprintf(&b, "\n-- %s %03d\n%s\n%s;\n", line, i+1, strings.TrimSpace(s.down), note)
	}
	b.WriteString("\ncommit;\n")
	return b.String(), nil
}

// Quote checks the name of a schema and returns it quoted. Allowed are lower-case letters, digits and "_", up to 63
// bytes and not beginning with a digit or "pg_": such a name means the same quoted and not.
func Quote(schema string) (string, error) {
	ok := schema != "" && len(schema) <= 63 && !strings.HasPrefix(schema, "pg_")
	for i := range len(schema) {
		c := schema[i]
		ok = ok && (c >= 'a' && c <= 'z' || c == '_' || i > 0 && c >= '0' && c <= '9')
	}
	if !ok {
		return "", postrider.Errorf(postrider.InvalidArgument, "schema name %q: want lower-case letters, digits and _, "+
			"at most 63, the first not a digit, not beginning with pg_", schema)
	}
	return pgx.Identifier{schema}.Sanitize(), nil
}

// In replaces :"schema" in a statement by a schema that [Quote] returned.
func In(quoted, sql string) string { return strings.ReplaceAll(sql, placeholder, quoted) }

// line is the migrations of one package in one schema. Version n is steps[n-1].
type line struct {
	name, schema, quoted string
	steps                []step
}

type step struct{ up, down string }

// insufficientPrivilege is an SQLSTATE (PostgreSQL, appendix A).
const insufficientPrivilege = "42501"

// failed gives an error its class: that of the database itself if it has one, else the server could not be reached.
func (l *line) failed(op string, err error) error {
	e := &postrider.Error{Code: postrider.Unavailable, Op: l.name + ": " + op + l.schema, Err: err}
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch {
		case pg.Code == insufficientPrivilege:
			e.Code = postrider.PermissionDenied
		case !strings.HasPrefix(pg.Code, "08") && !strings.HasPrefix(pg.Code, "53") && !strings.HasPrefix(pg.Code, "57"):
			e.Code = postrider.FailedPrecondition
		}
	} else if code := postrider.CodeOf(err); code != postrider.Unknown {
		e.Code = code
	}
	return e
}

func newLine(schema, name string, files fs.FS) (*line, error) {
	quoted, err := Quote(schema)
	if err != nil {
		return nil, fmt.Errorf("%s: migrate: %w", name, err)
	}
	l := &line{name: name, schema: schema, quoted: quoted}
	if err := l.read(files); err != nil {
		return nil, fmt.Errorf("%s: read migrations: %w", name, err)
	}
	return l, nil
}

// read takes the files NNN_name.up.sql, wherever they are in files, and their downs. Numbers run from 001 without a gap.
func (l *line) read(files fs.FS) error {
	var ups []string
	err := fs.WalkDir(files, ".", func(path string, _ fs.DirEntry, err error) error {
		if strings.HasSuffix(path, ".up.sql") {
			ups = append(ups, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	slices.Sort(ups)
	for i, path := range ups {
		if number := fmt.Sprintf("%03d_", i+1); !strings.HasPrefix(path[strings.LastIndexByte(path, '/')+1:], number) {
			return fmt.Errorf("%s: its name must begin with %s", path, number)
		}
		up, err := fs.ReadFile(files, path)
		if err != nil {
			return err
		}
		down, err := fs.ReadFile(files, strings.TrimSuffix(path, ".up.sql")+".down.sql")
		if err != nil {
			return err
		}
		l.steps = append(l.steps, step{l.in(string(up)), l.in(string(down))})
	}
	return nil
}

func (l *line) in(sql string) string { return In(l.quoted, sql) }

// querier is the pool or a transaction.
type querier interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// version returns the version in the database, 0 where there is nothing yet.
func (l *line) version(ctx context.Context, q querier) (version int, err error) {
	var there bool
	err = q.QueryRow(ctx, haveTable, l.schema).Scan(&there)
	if err == nil && there {
		err = q.QueryRow(ctx, l.in(currentVersion), l.name).Scan(&version)
	}
	if err != nil {
		return 0, fmt.Errorf("read version: %w", err)
	}
	return version, nil
}

// lock waits until nobody else migrates the schema and returns the version.
func (l *line) lock(ctx context.Context, tx pgx.Tx) (int, error) {
	if _, err := tx.Exec(ctx, lockSchema, l.schema); err != nil {
		return 0, fmt.Errorf("lock: %w", err)
	}
	return l.version(ctx, tx)
}

// prepare creates the schema and the table of versions. CREATE SCHEMA IF NOT EXISTS asks for the right to create schemas
// even where there is nothing to create, hence the look first.
func (l *line) prepare(ctx context.Context, tx pgx.Tx) error {
	var there bool
	err := tx.QueryRow(ctx, haveSchema, l.schema).Scan(&there)
	if err == nil && !there {
		_, err = tx.Exec(ctx, l.in(createSchema))
	}
	if err == nil {
		_, err = tx.Exec(ctx, l.in(createTable))
	}
	if err != nil {
		return fmt.Errorf("create schema and table of versions: %w", err)
	}
	return nil
}

// apply runs one file, which may hold many statements, and notes it.
func (l *line) apply(ctx context.Context, tx pgx.Tx, version int, sql, note string) error {
	_, err := tx.Conn().PgConn().Exec(ctx, sql).ReadAll()
	if err == nil {
		_, err = tx.Exec(ctx, l.in(note), l.name, version)
	}
	if err != nil {
		return fmt.Errorf("version %d: %w", version, err)
	}
	return nil
}
