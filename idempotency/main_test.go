package idempotency

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

func TestMain(m *testing.M) { os.Exit(postridertest.Main(m)) }

type order struct {
	ID    string
	Cents int
}

type hold struct {
	ID    string
	Names map[string]int
}

// contracts are the contracts of the tests.
type contracts struct {
	placed           *postrider.Topic[order]
	reserve, release *postrider.Method[order, hold]
}

func newContracts() contracts {
	return contracts{
		placed:  postrider.NewTopic[order]("orders.placed.v1"),
		reserve: postrider.NewMethod[order, hold]("stock.v1/Reserve"),
		release: postrider.NewMethod[order, hold]("stock.v1/Release"),
	}
}

// bench is what each test has for itself: a database with the tables, and a ledger of effects.
type bench struct {
	contracts
	t    testing.TB
	pool *pgxpool.Pool
}

const testSchema = "effects"

func setup(t testing.TB) *bench {
	t.Helper()
	pool := postridertest.Postgres(t)
	if err := Migrate(t.Context(), pool, testSchema); err != nil {
		t.Fatal(err)
	}
	b := &bench{newContracts(), t, pool}
	b.exec(`create table ledger (what text not null, at timestamptz not null default clock_timestamp())`)
	return b
}

func (b *bench) exec(sql string, args ...any) {
	b.t.Helper()
	if _, err := b.pool.Exec(b.t.Context(), sql, args...); err != nil {
		b.t.Fatal(err)
	}
}

// store returns a store on the tables of the bench.
func (b *bench) store(cfg Config) *Store { return b.storeOn(b.pool, cfg) }

func (b *bench) storeOn(pool *pgxpool.Pool, cfg Config) *Store {
	b.t.Helper()
	cfg.Schema = testSchema
	cfg.Logger = postridertest.Logger(b.t)
	s, err := New(pool, cfg)
	if err != nil {
		b.t.Fatal(err)
	}
	return s
}

// event returns a message of the topic, from a time.
func (b *bench) event(id string, at time.Time) *postrider.Message {
	b.t.Helper()
	m, err := b.placed.Message(b.t.Context(), &order{ID: id}, postrider.MessageID(id))
	if err != nil {
		b.t.Fatal(err)
	}
	m.Source, m.Time = "//test/shop", at
	return m
}

// command returns a request to method with an idempotency key, none if it is empty.
func (b *bench) command(method *postrider.Method[order, hold], key string, req order) *postrider.Message {
	b.t.Helper()
	m, err := method.Request(b.t.Context(), &req)
	if err == nil && key != "" {
		err = m.SetExtension(postrider.ExtIdempotencyKey, key)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	m.Source = "//test/saga"
	return m
}

// write is a handler's effect.
func write(ctx context.Context, tx pgx.Tx, what string) error {
	_, err := tx.Exec(ctx, `insert into ledger (what) values ($1)`, what)
	return err
}

// effects returns how often an effect is in the ledger.
func (b *bench) effects(what string) (n int) {
	b.t.Helper()
	if err := b.pool.QueryRow(b.t.Context(), `select count(*) from ledger where what = $1`, what).Scan(&n); err != nil {
		b.t.Fatal(err)
	}
	return n
}

func (b *bench) wantEffects(what string, want int) {
	b.t.Helper()
	if n := b.effects(what); n != want {
		b.t.Fatalf("effect %q is there %d times, want %d", what, n, want)
	}
}

// writer handles an event by one line in the ledger.
func (b *bench) writer(s *Store, consumer string) postrider.Handler {
	return Handler(s, consumer, b.placed, func(ctx context.Context, tx pgx.Tx, e postrider.Event[order]) error {
		return write(ctx, tx, consumer+" "+e.ID)
	})
}

func handle(t testing.TB, h postrider.Handler, m *postrider.Message) error {
	_, err := h.Handle(t.Context(), m)
	return err
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantCode(t testing.TB, err error, code postrider.Code, retryable bool) {
	t.Helper()
	if !errors.Is(err, code) || postrider.Retryable(err) != retryable {
		t.Fatalf("error %v, retryable %v; want %v, retryable %v", err, postrider.Retryable(err), code, retryable)
	}
}
