package idempotency

import (
	"cmp"
	"context"
	"embed"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/migrate"
)

// DefaultSchema is the schema of the tables unless one is named.
const DefaultSchema = "postrider"

// line is the name of this package's migrations.
const line = "idempotency"

//go:embed migrations/*.sql
var migrations embed.FS

// Migrate creates the tables in a schema, or brings them up to date. Any number of instances may call it at once. An
// empty schema is [DefaultSchema].
func Migrate(ctx context.Context, pool *pgxpool.Pool, schema string) error {
	return migrate.Run(ctx, pool, cmp.Or(schema, DefaultSchema), line, migrations)
}

// MigrateDown drops the tables of a schema and all that is known about handled messages with them.
func MigrateDown(ctx context.Context, pool *pgxpool.Pool, schema string) error {
	return migrate.Down(ctx, pool, cmp.Or(schema, DefaultSchema), line, migrations)
}

// MigrateSQL returns what [Migrate] does to a new database, as a script for another tool.
func MigrateSQL(schema string) (string, error) {
	return migrate.SQL(cmp.Or(schema, DefaultSchema), line, migrations)
}

// Config configures a Store. The zero value is ready to use.
type Config struct {
	// Schema holds the tables that [Migrate] created. Stores that share a schema should have the same Config: the shortest
	// Window and Retention win. Default [DefaultSchema].
	Schema string

	// Window is how long a message is known to be handled, counted from the message's own time, at least a day. An older
	// one is refused. A row takes about 100 bytes. Negative: for ever. Default 7 days.
	Window time.Duration

	// Retention is how long the barrier of [Action] and [Compensation] keeps an answer. It must be longer than the longest
	// saga lives, those included that wait for an operator: a compensation that comes after it finds nothing to undo. An
	// older message is refused. Negative: for ever. Default 90 days.
	Retention time.Duration

	// KeyRetention is how long [Do] and [HTTP] know a key at least, from its first use, at least a minute. After it the same
	// key is a new one. Negative: for ever. Default 7 days.
	KeyRetention time.Duration

	// LockTimeout bounds how long a statement waits for a lock: that of a second copy for the first one, and, since it
	// holds for the whole transaction, those of the handler. A handler may SET LOCAL lock_timeout for itself. Whole
	// milliseconds. Negative: without bound. Default 2 s.
	LockTimeout time.Duration

	// Logger is told when partitions cannot be maintained. Nil is silent.
	Logger *slog.Logger
}

func (c Config) withDefaults() Config {
	const day = 24 * time.Hour
	c.Schema = cmp.Or(c.Schema, DefaultSchema)
	c.Window = cmp.Or(c.Window, 7*day)
	c.Retention = cmp.Or(c.Retention, 90*day)
	c.KeyRetention = cmp.Or(c.KeyRetention, 7*day)
	c.LockTimeout = cmp.Or(c.LockTimeout, 2*time.Second)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

func (c Config) validate() error {
	switch {
	case c.Window > 0 && c.Window < 24*time.Hour:
		return postrider.Errorf(postrider.InvalidArgument, "idempotency: Config.Window is %v: want at least a day", c.Window)
	case c.Retention > 0 && c.Retention < 24*time.Hour:
		return postrider.Errorf(postrider.InvalidArgument, "idempotency: Config.Retention is %v: want at least a day", c.Retention)
	case c.KeyRetention > 0 && c.KeyRetention < time.Minute:
		return postrider.Errorf(postrider.InvalidArgument, "idempotency: Config.KeyRetention is %v: want at least a minute", c.KeyRetention)
	case c.LockTimeout > 0 && c.LockTimeout < time.Millisecond:
		return postrider.Errorf(postrider.InvalidArgument, "idempotency: Config.LockTimeout is %v: want at least 1 ms", c.LockTimeout)
	default:
		return nil
	}
}

// Store remembers in PostgreSQL what was handled. It is safe for concurrent use. It starts no goroutine; [Store.Run]
// cleans up and should run in at least one instance.
type Store struct {
	pool   *pgxpool.Pool
	cfg    Config
	sql    statements
	closed pgx.Tx // what a handler that keeps its transaction for too long is left with

	handled, duplicates, busy, expired atomic.Int64
}

// New returns a store on the tables that [Migrate] created. It does not connect. The error is InvalidArgument and names
// the field.
func New(pool *pgxpool.Pool, cfg Config) (*Store, error) {
	if pool == nil {
		return nil, postrider.Errorf(postrider.InvalidArgument, "idempotency: the pool is nil")
	}
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	schema, err := migrate.Quote(cfg.Schema)
	if err != nil {
		return nil, err
	}
	var b pgx.Batch
	b.BeginTx(pgx.TxOptions{})
	return &Store{
		pool: pool, cfg: cfg, sql: newStatements(schema, cfg.LockTimeout),
		closed: pgx.FailedBatchResults(&b, pgx.ErrTxClosed).Tx(),
	}, nil
}

// Stats counts what a Store has done since it was made.
type Stats struct {
	Handled    int64 // messages whose transaction was committed, refusals and null compensations included, and outcomes written down
	Duplicates int64 // copies that were answered without running the handler
	Busy       int64 // copies delayed because another one was being handled
	Expired    int64 // messages refused because of their time
}

// Stats returns the counters.
func (s *Store) Stats() Stats {
	return Stats{s.handled.Load(), s.duplicates.Load(), s.busy.Load(), s.expired.Load()}
}
