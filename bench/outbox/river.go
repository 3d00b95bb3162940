package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
)

// raft is River with a job that publishes to the stream.
type raft struct {
	site
	client *river.Client[pgx.Tx]
}

type orderArgs order

func (orderArgs) Kind() string { return "order" }

type orderWorker struct {
	river.WorkerDefaults[orderArgs]
	js jetstream.JetStream
}

// Work sends a job's arguments, which are the message, and waits for the acknowledgement, without holding up the others.
func (w *orderWorker) Work(ctx context.Context, job *river.Job[orderArgs]) error {
	msg := &nats.Msg{Subject: subject, Data: job.EncodedArgs, Header: headers("river", job.ID)}
	future, err := w.js.PublishMsgAsync(msg)
	if err != nil {
		return err
	}
	select {
	case <-future.Ok():
		return nil
	case err := <-future.Err():
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// openRiver is River with its defaults, 100 workers as its documentation has them.
func openRiver(ctx context.Context, s site) (session, error) {
	return openRaft(ctx, s, river.Config{Queues: map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: 100}}})
}

// openRiverTuned is River set up for speed.
func openRiverTuned(ctx context.Context, s site) (session, error) {
	return openRaft(ctx, s, river.Config{
		FetchCooldown: 2 * time.Millisecond, FetchPollInterval: 20 * time.Millisecond,
		Queues: map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: 2000}},
	})
}

func openRaft(ctx context.Context, s site, cfg river.Config) (session, error) {
	driver := riverpgxv5.New(s.pool)
	quiet := slog.New(slog.DiscardHandler)
	migrator, err := rivermigrate.New(driver, &rivermigrate.Config{Logger: quiet})
	if err != nil {
		return nil, err
	}
	if _, err := migrator.Migrate(ctx, rivermigrate.DirectionUp, nil); err != nil {
		return nil, err
	}
	js, err := jetstream.New(s.nc, jetstream.WithPublishAsyncMaxPending(16_000))
	if err != nil {
		return nil, err
	}
	cfg.Logger = quiet
	cfg.Workers = river.NewWorkers()
	river.AddWorker(cfg.Workers, &orderWorker{js: js})
	client, err := river.NewClient(driver, &cfg)
	return &raft{s, client}, err
}

func (r *raft) publish(ctx context.Context, tx pgx.Tx, orders []*order) error {
	if len(orders) == 1 {
		_, err := r.client.InsertTx(ctx, tx, orderArgs(*orders[0]), nil)
		return err
	}
	params := make([]river.InsertManyParams, len(orders))
	for i, o := range orders {
		params[i].Args = orderArgs(*o)
	}
	_, err := r.client.InsertManyFastTx(ctx, tx, params)
	return err
}

func (r *raft) relay(ctx context.Context) (func() error, error) {
	if err := r.client.Start(ctx); err != nil {
		return nil, err
	}
	return func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		return r.client.Stop(ctx)
	}, nil
}

func (r *raft) table() string { return "river_job" }
