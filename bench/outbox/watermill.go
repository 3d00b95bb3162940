package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	wmnats "github.com/ThreeDotsLabs/watermill-nats/v2/pkg/nats"
	wmsql "github.com/ThreeDotsLabs/watermill-sql/v3/pkg/sql"
	"github.com/ThreeDotsLabs/watermill/components/forwarder"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
)

// mill is Watermill's SQL publisher in the transaction and its forwarder to JetStream.
type mill struct {
	site
	db *sql.DB
}

const (
	forwarderTopic = "forwarder"
	millPoll       = 10 * time.Millisecond
	millPart       = 500 // messages in one INSERT
)

func openWatermill(ctx context.Context, s site) (session, error) {
	m := &mill{s, stdlib.OpenDBFromPool(s.pool)}
	schema, offsets := wmsql.DefaultPostgreSQLSchema{}, wmsql.DefaultPostgreSQLOffsetsAdapter{}
	for _, q := range append(schema.SchemaInitializingQueries(forwarderTopic), offsets.SchemaInitializingQueries(forwarderTopic)...) {
		if _, err := s.pool.Exec(ctx, q.Query, q.Args...); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// publish runs on pgx itself, which is faster than by way of database/sql.
func (m *mill) publish(ctx context.Context, tx pgx.Tx, orders []*order) error {
	p, err := wmsql.NewPublisher(executor{ctx: ctx, tx: tx}, wmsql.PublisherConfig{SchemaAdapter: wmsql.DefaultPostgreSQLSchema{}}, nil)
	if err != nil {
		return err
	}
	enveloping := forwarder.NewPublisher(p, forwarder.PublisherConfig{ForwarderTopic: forwarderTopic})
	for len(orders) > 0 {
		msgs := make([]*message.Message, min(millPart, len(orders)))
		for i, o := range orders[:len(msgs)] {
			data, err := json.Marshal(o)
			if err != nil {
				return err
			}
			msgs[i] = message.NewMessage(watermill.NewUUID(), data)
		}
		if err := enveloping.Publish(subject, msgs...); err != nil {
			return err
		}
		orders = orders[len(msgs):]
	}
	return nil
}

// executor is a transaction of pgx for Watermill, which only executes.
type executor struct {
	wmsql.ContextExecutor

	ctx context.Context //nolint:containedctx // Watermill passes none
	tx  pgx.Tx
}

func (e executor) ExecContext(_ context.Context, query string, args ...any) (sql.Result, error) {
	_, err := e.tx.Exec(e.ctx, query, args...)
	return nil, err
}

func (m *mill) relay(ctx context.Context) (func() error, error) {
	log := watermill.NopLogger{}
	sub, err := wmsql.NewSubscriber(m.db, wmsql.SubscriberConfig{
		SchemaAdapter: wmsql.DefaultPostgreSQLSchema{}, OffsetsAdapter: wmsql.DefaultPostgreSQLOffsetsAdapter{},
		PollInterval: millPoll,
	}, log)
	if err != nil {
		return nil, err
	}
	pub, err := wmnats.NewPublisherWithNatsConn(m.nc, wmnats.PublisherPublishConfig{
		Marshaler: &wmnats.NATSMarshaler{}, SubjectCalculator: wmnats.DefaultSubjectCalculator,
		JetStream: wmnats.JetStreamConfig{TrackMsgId: true},
	}, log)
	if err != nil {
		return nil, err
	}
	f, err := forwarder.NewForwarder(sub, pub, log, forwarder.Config{ForwarderTopic: forwarderTopic})
	if err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- f.Run(context.WithoutCancel(ctx)) }()
	select {
	case <-f.Running():
	case err := <-ended:
		return nil, err
	}
	return func() error { return errors.Join(f.Close(), <-ended, sub.Close()) }, nil
}

func (m *mill) table() string { return `"watermill_` + forwarderTopic + `"` }
