package idempotency_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"maps"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/idempotency"
	"github.com/postrider/postrider/internal/devstack"
)

type Order struct {
	ID      string
	Account string
	Cents   int64
}

type Reserve struct {
	Product  string
	Quantity int
}

type Hold struct{ ID int64 }

type Released struct{}

// A message that is delivered twice is booked once.
func ExampleHandler() {
	ctx := context.Background()
	pool, done := connect(ctx, `create table account (id text primary key, due bigint not null); insert into account values ('ada', 0)`)
	defer done()
	store, err := idempotency.New(pool, idempotency.Config{})
	if err != nil {
		log.Fatal(err)
	}

	orderPlaced := postrider.NewTopic[Order]("orders.placed.v1")
	h := idempotency.Handler(store, "billing", orderPlaced,
		func(ctx context.Context, tx pgx.Tx, e postrider.Event[Order]) error {
			_, err := tx.Exec(ctx, `update account set due = due + $1 where id = $2`, e.Value.Cents, e.Value.Account)
			return err
		})

	// A bus would do this: b.Subscribe(h).
	m, err := orderPlaced.Message(ctx, &Order{ID: "o-1", Account: "ada", Cents: 1999})
	if err != nil {
		log.Fatal(err)
	}
	m.Source = "//shop/orders"
	for range 2 {
		if _, err := h.Handle(ctx, m); err != nil {
			log.Fatal(err)
		}
	}

	var due int64
	if err := pool.QueryRow(ctx, `select due from account where id = 'ada'`).Scan(&due); err != nil {
		log.Fatal(err)
	}
	fmt.Println("due:", due)
	fmt.Printf("%+v\n", store.Stats())
	// Output:
	// due: 1999
	// {Handled:1 Duplicates:1 Busy:0 Expired:0}
}

// One statement books all that is new in a batch.
func ExampleBatchHandler() {
	ctx := context.Background()
	pool, done := connect(ctx, `create table account (id text primary key, due bigint not null); insert into account values ('ada', 0), ('bob', 0)`)
	defer done()
	store, err := idempotency.New(pool, idempotency.Config{})
	if err != nil {
		log.Fatal(err)
	}

	orderPlaced := postrider.NewTopic[Order]("orders.placed.v1")
	h := idempotency.BatchHandler(store, "billing", orderPlaced,
		func(ctx context.Context, tx pgx.Tx, orders []postrider.Event[Order]) error {
			due := map[string]int64{}
			for _, o := range orders {
				due[o.Value.Account] += o.Value.Cents
			}
			accounts := slices.Sorted(maps.Keys(due)) // as every other transaction locks them
			cents := make([]int64, len(accounts))
			for i, account := range accounts {
				cents[i] = due[account]
			}
			_, err := tx.Exec(ctx, `update account set due = due + cents
				from unnest($1::text[], $2::bigint[]) as booked (account, cents) where id = account`, accounts, cents)
			return err
		})

	// A bus would do this: b.Subscribe(h, bus.Batch(100, 20*time.Millisecond)).
	var batch []*postrider.Message
	for i, account := range []string{"ada", "bob", "ada"} {
		m, err := orderPlaced.Message(ctx, &Order{ID: fmt.Sprintf("o-%d", i), Account: account, Cents: 1000})
		if err != nil {
			log.Fatal(err)
		}
		m.Source = "//shop/orders"
		batch = append(batch, m)
	}
	for _, part := range [][]*postrider.Message{batch[:2], batch} { // two are delivered again
		if err := errors.Join(h.HandleBatch(ctx, part)...); err != nil {
			log.Fatal(err)
		}
	}

	rows, err := pool.Query(ctx, `select id || ' ' || due from account order by id`)
	if err != nil {
		log.Fatal(err)
	}
	dues, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(dues)
	fmt.Printf("%+v\n", store.Stats())
	// Output:
	// [ada 2000 bob 1000]
	// {Handled:3 Duplicates:2 Busy:0 Expired:0}
}

// The participant of a saga: a reservation that is undone, and one whose compensation overtakes it.
func ExampleCompensation() {
	ctx := context.Background()
	pool, done := connect(ctx, `create table hold (id bigint generated always as identity, product text, quantity int)`)
	defer done()
	store, err := idempotency.New(pool, idempotency.Config{})
	if err != nil {
		log.Fatal(err)
	}

	reserveStock := postrider.NewMethod[Reserve, Hold]("stock.v1/Reserve")
	releaseStock := postrider.NewMethod[Reserve, Released]("stock.v1/Release")
	reserve := idempotency.Action(store, reserveStock, func(ctx context.Context, tx pgx.Tx, req *Reserve) (*Hold, error) {
		var h Hold
		err := tx.QueryRow(ctx, `insert into hold (product, quantity) values ($1, $2) returning id`, req.Product, req.Quantity).Scan(&h.ID)
		return &h, err
	})
	release := idempotency.Compensation(store, releaseStock, func(ctx context.Context, tx pgx.Tx, _ *Reserve, did *Hold) error {
		fmt.Println("  release hold", did.ID)
		_, err := tx.Exec(ctx, `delete from hold where id = $1`, did.ID)
		return err
	})

	// A saga engine would send these.
	send := func(h postrider.Handler, key string) {
		msg := &postrider.Message{
			ID: postrider.NewID(), Source: "//shop/orders", Type: h.Name(), ContentType: "application/json",
			Data: []byte(`{"Product":"tea","Quantity":2}`),
		}
		if err := msg.SetExtension(postrider.ExtIdempotencyKey, key); err != nil {
			log.Fatal(err)
		}
		reply, err := h.Handle(ctx, msg)
		if err != nil {
			fmt.Printf("%s: %s\n", key, postrider.CodeOf(err))
			return
		}
		fmt.Printf("%s: %s\n", key, reply.Data)
	}
	send(reserve, "saga-1/stock/do")
	send(reserve, "saga-1/stock/do")
	send(release, "saga-1/stock/undo")
	send(release, "saga-2/stock/undo")
	send(reserve, "saga-2/stock/do")
	// Output:
	// saga-1/stock/do: {"ID":1}
	// saga-1/stock/do: {"ID":1}
	//   release hold 1
	// saga-1/stock/undo: {}
	// saga-2/stock/undo: {}
	// saga-2/stock/do: FAILED_PRECONDITION
}

// connect starts a PostgreSQL with the tables of the store and those of the example. A service has a pool already.
func connect(ctx context.Context, tables string) (pool *pgxpool.Pool, done func()) {
	server, err := devstack.StartPostgres(ctx, devstack.PostgresConfig{InMemory: true, Private: true})
	if err != nil {
		log.Fatal(err)
	}
	pool, err = pgxpool.New(ctx, server.URL)
	if err == nil {
		err = idempotency.Migrate(ctx, pool, "")
	}
	if err == nil {
		_, err = pool.Exec(ctx, tables)
	}
	if err != nil {
		log.Fatal(err)
	}
	return pool, func() {
		pool.Close()
		if err := server.Close(); err != nil {
			log.Print(err)
		}
	}
}
