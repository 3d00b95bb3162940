package outbox_test

import (
	"context"
	"fmt"
	"iter"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/devstack"
	"github.com/postrider/postrider/outbox"
)

// stream stands for one of JetStream, and loses what it should not. Of a bus it would be b.Read(ctx, "ORDERS", since).
type stream struct {
	stored []*postrider.Message
	done   chan struct{}
}

func (s *stream) Publish(_ context.Context, msgs ...*postrider.Message) error {
	for _, m := range msgs {
		if m.ID != "o-2" {
			s.stored = append(s.stored, m)
		}
		if m.ID == "o-3" {
			close(s.done)
		}
	}
	return nil
}

func (s *stream) Read(yield func(*postrider.Message, error) bool) {
	for _, m := range s.stored {
		if !yield(m, nil) {
			return
		}
	}
}

func ExampleAudit() {
	ctx, stop := context.WithCancel(context.Background())
	server, err := devstack.StartPostgres(ctx, devstack.PostgresConfig{})
	if err != nil {
		panic(err)
	}
	defer server.Close()
	pool, err := pgxpool.New(ctx, server.URL)
	if err != nil {
		panic(err)
	}
	defer pool.Close()
	if err := outbox.Migrate(ctx, pool, "audited"); err != nil {
		panic(err)
	}
	ob, err := outbox.New(outbox.Config{Schema: "audited", Source: "//shop/orders"})
	if err != nil {
		panic(err)
	}
	orders := &stream{done: make(chan struct{})}
	relay, err := outbox.NewRelay(pool, orders, outbox.RelayConfig{Outbox: ob})
	if err != nil {
		panic(err)
	}
	err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		for _, id := range []string{"o-1", "o-2", "o-3"} {
			if err := OrderPlaced.Publish(ctx, ob.In(tx), &Order{ID: id, Customer: "Ada"}, postrider.MessageID(id)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		panic(err)
	}
	go func() { <-orders.done; stop() }()
	if err := relay.Run(ctx); err != nil {
		panic(err)
	}

	report, err := outbox.Audit(context.Background(), pool, ob, outbox.AuditConfig{
		Streams: []iter.Seq2[*postrider.Message, error]{orders.Read},
	})
	if err != nil {
		panic(err)
	}
	fmt.Println(report.OK(), report.Messages, report.Delivered)
	fmt.Println("lost:", report.Lost.Examples[0].Message.ID)
	// Output:
	// false 3 2
	// lost: o-2
}
