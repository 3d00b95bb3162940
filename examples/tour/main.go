// Command tour is the library on one page: an event, a publish in a transaction, a call and a saga, on servers that it
// starts itself. README.md quotes its files.
package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/idempotency"
	"github.com/postrider/postrider/internal/devstack"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/rpc"
	"github.com/postrider/postrider/saga"
)

func main() {
	if err := tour(context.Background(), os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "tour:", err)
		os.Exit(1)
	}
}

func tour(ctx context.Context, out io.Writer) (err error) {
	stack, err := devstack.Start(ctx, devstack.Config{})
	if err != nil {
		return err
	}
	defer stack.Close() //nolint:errcheck // temporary servers
	// Without MaxReconnects(-1) nats.go gives up after two minutes without a server.
	nc, err := nats.Connect(stack.NATSURL, nats.MaxReconnects(-1))
	if err != nil {
		return err
	}
	defer nc.Close()
	pool, err := pgxpool.New(ctx, stack.PostgresURL)
	if err != nil {
		return err
	}
	defer pool.Close()
	for _, migrate := range []func(context.Context, *pgxpool.Pool, string) error{outbox.Migrate, idempotency.Migrate, saga.Migrate} {
		if err := migrate(ctx, pool, "postrider"); err != nil {
			return err
		}
	}
	if _, err := pool.Exec(ctx, `create table orders (id text primary key, customer text not null, cents bigint not null);
		create table sales (order_id text primary key, cents bigint not null)`); err != nil {
		return err
	}

	s, err := assemble(nc, pool)
	if err != nil {
		return err
	}
	defer s.client.Close()
	runCtx, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- postrider.Run(runCtx, s.bus, s.server, s.engine, s.relay) }()
	defer func() {
		stop()
		if runErr := <-done; err == nil {
			err = runErr
		}
	}()
	select {
	case <-s.bus.Started():
	case err := <-done:
		done <- nil
		return err
	}
	return s.show(ctx, out)
}

// service is what one process of a system holds.
type service struct {
	pool   *pgxpool.Pool
	bus    *bus.Bus
	server *rpc.Server
	client *rpc.Client
	outbox *outbox.Outbox
	relay  *outbox.Relay
	engine *saga.Engine
	mailed chan string
}

func assemble(nc *nats.Conn, pool *pgxpool.Pool) (*service, error) {
	s := &service{pool: pool, mailed: make(chan string, 10)}
	var err error
	if s.bus, err = bus.New(nc, bus.Config{Source: "//tour", Group: "tour", Streams: []bus.Stream{
		{Name: "TOUR", Topics: []string{"orders.>", "stock.>", "payments.>", "shipping.>", "saga.>"}},
	}}); err != nil {
		return nil, err
	}
	if s.server, err = rpc.NewServer(nc, rpc.ServerConfig{}); err != nil {
		return nil, err
	}
	if s.client, err = rpc.NewClient(nc, rpc.ClientConfig{Source: "//tour"}); err != nil {
		return nil, err
	}
	if s.outbox, err = outbox.New(outbox.Config{Source: "//tour"}); err != nil {
		return nil, err
	}
	if s.relay, err = outbox.NewRelay(pool, s.bus, outbox.RelayConfig{Outbox: s.outbox}); err != nil {
		return nil, err
	}
	if s.engine, err = saga.NewEngine(pool, s.outbox, saga.Config{Name: "tour"}, PlaceOrder); err != nil {
		return nil, err
	}
	store, err := idempotency.New(pool, idempotency.Config{})
	if err != nil {
		return nil, err
	}
	for _, err := range []error{
		subscribe(s.bus, s.mailed), countSales(s.bus, store), serve(s.server), participate(s.bus, store),
		s.bus.Subscribe(s.engine.Handler(), bus.From(bus.DeliverAll)),
	} {
		if err != nil {
			return nil, err
		}
	}
	return s, nil
}

// show does each thing once and prints what came of it.
func (s *service) show(ctx context.Context, out io.Writer) error {
	say := func(words ...any) { _, _ = fmt.Fprintln(out, words...) }
	if err := placeOrder(ctx, s.pool, s.outbox, &Order{ID: "o-1", Customer: "Åse", Cents: 1800}); err != nil {
		return err
	}
	say("event: mail to", <-s.mailed)

	price, err := priceOf(ctx, s.client, "chai")
	if err != nil {
		return err
	}
	say("call: chai costs", price.Cents)
	_, err = priceOf(ctx, s.client, "gold")
	say("call:", err)

	for _, o := range []*Order{{ID: "o-2", Customer: "Zoë", Cents: 900}, {ID: "o-3", Customer: "Bob", Cents: 900_000}} {
		var id string
		if err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) (err error) {
			id, err = PlaceOrder.Start(ctx, s.engine.In(tx), o)
			return err
		}); err != nil {
			return err
		}
		end, err := s.engine.Wait(ctx, id)
		if err != nil {
			return err
		}
		say("saga:", o.ID, "is", end.Status, end.Cause)
	}
	return nil
}
