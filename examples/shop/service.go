package main

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/idempotency"
	"github.com/postrider/postrider/rpc"
)

//go:embed sql
var schemas embed.FS

// prefix stands before all subjects of the shop, so that it can share a NATS server with others.
const prefix = "shop"

// servers says where the servers are, and what all services have in common.
type servers struct {
	nats, postgres string
	log            *slog.Logger
}

// service is what each of the four services has: its own connection to NATS, its own schema in PostgreSQL with its own
// pool, and on them the parts of Postrider that it needs. Nothing is shared but contracts.go.
type service struct {
	name    string
	schema  string
	nc      *nats.Conn
	db      *pgxpool.Pool // its search_path is the schema
	bus     *bus.Bus
	server  *rpc.Server
	once    *idempotency.Store
	calls   *rpc.Client // of the services that call others
	log     *slog.Logger
	relay   *restartable       // of the services that have an outbox
	parts   []postrider.Runner // what runs, in the order of draining
	traffic func() Traffic     // of this service in this process
}

// open connects a service to its servers and brings its schema up to date.
func open(ctx context.Context, name string, at servers) (_ *service, err error) {
	s := &service{name: name, schema: "shop_" + name, log: at.log.With("service", name)}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.nc, err = connect(name, at.nats); err != nil {
		return nil, err
	}
	if err := s.openDatabase(ctx, at.postgres); err != nil {
		return nil, err
	}
	s.bus, err = bus.New(s.nc, bus.Config{
		Source: "//shop/" + name, Group: name, Prefix: prefix, Logger: s.log,
		// One stream for the whole shop: what is published at the same time shares the server's disk syncs.
		Streams:        []bus.Stream{{Name: "SHOP", Topics: []string{"orders.>", "stock.>", "payments.>", "shipping.>", "saga.>"}}},
		DeadLetters:    bus.Stream{Name: "SHOP_DEAD_LETTERS"},
		PublishTimeout: 5 * time.Second,
		DrainTimeout:   10 * time.Second,
	})
	if err != nil {
		return nil, err
	}
	s.server, err = rpc.NewServer(s.nc, rpc.ServerConfig{Prefix: prefix, MaxConcurrent: 1000, DrainTimeout: 10 * time.Second, Logger: s.log})
	if err != nil {
		return nil, err
	}
	if err := idempotency.Migrate(ctx, s.db, s.schema); err != nil {
		return nil, err
	}
	if s.once, err = idempotency.New(s.db, idempotency.Config{Schema: s.schema, Logger: s.log}); err != nil {
		return nil, err
	}
	s.parts = []postrider.Runner{s.server, s.bus, s.once}
	return s, nil
}

// connect returns a connection to NATS that comes back by itself.
func connect(name, url string) (*nats.Conn, error) {
	nc, err := nats.Connect(url, nats.Name("shop-"+name), nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond))
	if err != nil {
		return nil, fmt.Errorf("connect to NATS: %w: is a nats-server running at the address given by -nats?", err)
	}
	return nc, nil
}

// openDatabase opens the service's pool and creates its tables, whether it is the first to start or the hundredth.
func (s *service) openDatabase(ctx context.Context, url string) error {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		return fmt.Errorf("address of PostgreSQL: %w", err)
	}
	cfg.MaxConns = 8
	cfg.ConnConfig.ConnectTimeout = 3 * time.Second
	cfg.ConnConfig.RuntimeParams["application_name"] = "shop-" + s.name
	cfg.ConnConfig.RuntimeParams["search_path"] = s.schema
	if s.db, err = pgxpool.NewWithConfig(ctx, cfg); err != nil {
		return fmt.Errorf("connect to PostgreSQL: %w", err)
	}
	tables, err := schemas.ReadFile("sql/" + s.name + ".sql")
	if err != nil {
		return err
	}
	err = pgx.BeginFunc(ctx, s.db, func(tx pgx.Tx) error {
		// Instances that start at once wait for each other here.
		if _, err := tx.Exec(ctx, `select pg_advisory_xact_lock(hashtextextended($1, 0))`, s.schema); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `create schema if not exists `+s.schema+";\n"+string(tables))
		return err
	})
	if err != nil {
		return fmt.Errorf("prepare schema %s in PostgreSQL: %w", s.schema, err)
	}
	return nil
}

// handle subscribes to events and durable commands. A group of the shop begins with the oldest event: the streams are
// the shop's own, and a service that starts late must miss nothing. Attempts are many, because -chaos uses them up.
func (s *service) handle(hs ...postrider.Handler) error {
	var errs []error
	for _, h := range hs {
		errs = append(errs, s.bus.Subscribe(h, bus.From(bus.DeliverAll), bus.AckWait(2*time.Second),
			bus.Retry(postrider.RetryPolicy{Attempts: 25, Initial: 100 * time.Millisecond, Max: 2 * time.Second})))
	}
	return errors.Join(errs...)
}

func (t *Traffic) add(other Traffic) {
	t.Published += other.Published
	t.Handled += other.Handled
	t.Retried += other.Retried
	t.DeadLettered += other.DeadLettered
	t.Duplicates += other.Duplicates
}

// run runs the service until ctx ends and then drains it.
func (s *service) run(ctx context.Context) error { return postrider.Run(ctx, s.parts...) }

// close gives the connections back. It follows run.
func (s *service) close() {
	if s.calls != nil {
		s.calls.Close()
	}
	if s.nc != nil {
		s.nc.Close()
	}
	if s.db != nil {
		s.db.Close()
	}
}
