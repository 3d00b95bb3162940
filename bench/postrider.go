package main

import (
	"context"
	"strconv"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/codec/protocodec"
)

// rider is Postrider as its documentation shows it: a typed topic, a bus, a handler.
type rider struct {
	connections
	site
	topic *postrider.Topic[value]
	bus   *bus.Bus
}

func openPostrider(_ context.Context, s site) (session, error) {
	c, err := connect(s.url)
	if err != nil {
		return nil, err
	}
	opts := []postrider.ContractOption{postrider.Encoding(protocodec.Binary)}
	if s.keyed {
		opts = append(opts, postrider.KeyBy(func(v *value) string { return strconv.FormatUint(key(v), 10) }))
	}
	b, err := bus.New(c.pub, riderConfig())
	if err != nil {
		return nil, err
	}
	return &rider{connections: c, site: s, topic: postrider.NewTopic[value](subject, opts...), bus: b}, nil
}

func riderConfig() bus.Config {
	return bus.Config{
		Source: source, Group: group,
		Streams: []bus.Stream{{Name: streamName, Topics: []string{subject}}},
	}
}

func (r *rider) publish(ctx context.Context, v *value) error { return r.topic.Publish(ctx, r.bus, v) }

func (r *rider) publishAll(ctx context.Context, values []*value) error {
	return r.topic.PublishAll(ctx, r.bus, values)
}

func (r *rider) backlog(ctx context.Context, values []*value) error {
	return r.publishAll(ctx, values)
}

func (r *rider) handle(ctx context.Context, n int, fn func(*value) error) (func() error, error) {
	b, err := bus.New(r.sub, riderConfig())
	if err != nil {
		return nil, err
	}
	h := r.topic.Handler(func(_ context.Context, e postrider.Event[value]) error { return fn(e.Value) })
	opts := []bus.SubscribeOption{
		bus.Concurrency(n), bus.From(bus.DeliverAll), bus.AckWait(ackWait),
		bus.Retry(postrider.RetryPolicy{Initial: retryDelay, Max: retryDelay}),
	}
	if r.keyed {
		opts = append(opts, bus.Ordered())
	}
	if err := b.Subscribe(h, opts...); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- b.Run(ctx) }()
	select {
	case <-b.Started():
	case err := <-ended:
		cancel()
		return nil, err
	}
	return func() error {
		cancel()
		return <-ended
	}, nil
}
