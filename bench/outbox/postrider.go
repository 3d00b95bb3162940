package main

import (
	"context"
	"strconv"
	"sync/atomic"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/outbox"
)

// rider is Postrider as its documentation shows it, with all defaults.
type rider struct {
	site
	topic  *postrider.Topic[order]
	outbox *outbox.Outbox
	bus    *bus.Bus
}

func openPostrider(ctx context.Context, s site) (session, error) { return openRider(ctx, s) }

// openKeyed gives messages keys, whose order is kept: each publish takes a lock.
func openKeyed(ctx context.Context, s site) (session, error) {
	return openRider(ctx, s, postrider.KeyBy(func(o *order) string { return strconv.FormatInt(o.Number%keys, 10) }))
}

// openDeferred begins its transactions by the outbox, so that messages go with the COMMIT.
func openDeferred(ctx context.Context, s site) (session, error) {
	r, err := openRider(ctx, s)
	if err != nil {
		return nil, err
	}
	return deferred{r}, nil
}

type deferred struct{ *rider }

func (d deferred) begins() beginner { return d.outbox.On(d.pool) }

func openRider(ctx context.Context, s site, opts ...postrider.ContractOption) (*rider, error) {
	r := &rider{site: s, topic: postrider.NewTopic[order](subject, opts...)}
	if err := outbox.Migrate(ctx, s.pool, ""); err != nil {
		return nil, err
	}
	var err error
	if r.outbox, err = outbox.New(outbox.Config{Source: source}); err != nil {
		return nil, err
	}
	r.bus, err = bus.New(s.nc, bus.Config{Source: source, Streams: []bus.Stream{{Name: s.stream, Topics: []string{subject}}}})
	return r, err
}

func (r *rider) publish(ctx context.Context, tx pgx.Tx, orders []*order) error {
	if len(orders) == 1 {
		return r.topic.Publish(ctx, r.outbox.In(tx), orders[0])
	}
	return r.topic.PublishAll(ctx, r.outbox.In(tx), orders)
}

func (r *rider) relay(ctx context.Context) (func() error, error) { return r.relayTo(ctx, r.bus) }

func (r *rider) relayTo(ctx context.Context, p postrider.Publisher) (func() error, error) {
	relay, err := outbox.NewRelay(r.pool, p, outbox.RelayConfig{Outbox: r.outbox})
	if err != nil {
		return nil, err
	}
	return start(ctx, relay.Run), nil
}

func (r *rider) table() string { return "postrider.postrider_outbox" }

// start runs something until stop is called.
func start(ctx context.Context, run func(context.Context) error) (stop func() error) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- run(ctx) }()
	return func() error {
		cancel()
		return <-ended
	}
}

// sink is a publisher that accepts everything at once.
type sink struct{ n atomic.Int64 }

func (s *sink) Publish(_ context.Context, msgs ...*postrider.Message) error {
	s.n.Add(int64(len(msgs)))
	return nil
}
