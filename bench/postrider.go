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
	mode  bus.Mode
	topic *postrider.Topic[value]
	bus   *bus.Bus
}

func openPostrider(_ context.Context, s site) (session, error) { return openRider(s, bus.Binary) }

// openCompact has the whole event in the payload, in the CloudEvents protobuf format.
func openCompact(_ context.Context, s site) (session, error) { return openRider(s, bus.Compact) }

func openRider(s site, mode bus.Mode) (session, error) {
	c, err := connect(s.url)
	if err != nil {
		return nil, err
	}
	opts := []postrider.ContractOption{postrider.Encoding(protocodec.Binary)}
	if s.keyed {
		opts = append(opts, postrider.KeyBy(func(v *value) string { return strconv.FormatUint(key(v), 10) }))
	}
	r := &rider{connections: c, site: s, mode: mode, topic: postrider.NewTopic[value](subject, opts...)}
	r.bus, err = bus.New(c.pub, r.config())
	return r, err
}

func (r *rider) config() bus.Config {
	return bus.Config{
		Source: source, Group: group, Mode: r.mode,
		Streams: []bus.Stream{{Name: r.stream, Topics: []string{subject}}},
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
	b, err := bus.New(r.sub, r.config())
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
