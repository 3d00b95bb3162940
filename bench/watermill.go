package main

import (
	"context"
	"errors"

	"github.com/ThreeDotsLabs/watermill"
	wmnats "github.com/ThreeDotsLabs/watermill-nats/v2/pkg/nats"
	"github.com/ThreeDotsLabs/watermill/components/cqrs"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"
)

// mill is Watermill over NATS JetStream, its Router calling the handler. It is set up for speed: acknowledgements that do
// not wait for the server, metadata as NATS headers. It carries no CloudEvents.
type mill struct {
	connections
	site
	publisher *wmnats.Publisher
}

func openWatermill(_ context.Context, s site) (session, error) { return openMill(s) }

func openMill(s site) (*mill, error) {
	c, err := connect(s.url)
	if err != nil {
		return nil, err
	}
	p, err := wmnats.NewPublisherWithNatsConn(c.pub, wmnats.PublisherPublishConfig{
		Marshaler: &wmnats.NATSMarshaler{}, SubjectCalculator: wmnats.DefaultSubjectCalculator,
		JetStream: wmnats.JetStreamConfig{TrackMsgId: true},
	}, watermill.NopLogger{})
	if err != nil {
		return nil, err
	}
	return &mill{connections: c, site: s, publisher: p}, nil
}

func millMessage(v *value) (*message.Message, error) {
	data, err := proto.Marshal(v)
	if err != nil {
		return nil, err
	}
	return message.NewMessage(watermill.NewUUID(), data), nil
}

func (m *mill) publish(_ context.Context, v *value) error {
	msg, err := millMessage(v)
	if err != nil {
		return err
	}
	return m.publisher.Publish(subject, msg)
}

func (m *mill) publishAll(_ context.Context, values []*value) error {
	msgs := make([]*message.Message, len(values))
	for i, v := range values {
		var err error
		if msgs[i], err = millMessage(v); err != nil {
			return err
		}
	}
	return m.publisher.Publish(subject, msgs...)
}

func (m *mill) backlog(ctx context.Context, values []*value) error {
	return m.store(ctx, values, millMessage)
}

func (m *mill) store(ctx context.Context, values []*value, encode func(*value) (*message.Message, error)) error {
	msgs := make([]*nats.Msg, len(values))
	for i, v := range values {
		msg, err := encode(v)
		if err != nil {
			return err
		}
		if msgs[i], err = (&wmnats.NATSMarshaler{}).Marshal(subject, msg); err != nil {
			return err
		}
		msgs[i].Header.Set(nats.MsgIdHdr, msg.UUID)
	}
	return storeAll(ctx, m.pub, msgs)
}

// subscriber handles n messages at once: each of its subscribers waits for the handler.
func (m *mill) subscriber(n int) (message.Subscriber, error) {
	return wmnats.NewSubscriberWithNatsConn(m.sub, wmnats.SubscriberSubscriptionConfig{
		Unmarshaler: &wmnats.NATSMarshaler{}, QueueGroupPrefix: group, SubscribersCount: n, AckWaitTimeout: ackWait,
		NakDelay: wmnats.NewStaticDelay(retryDelay),
		JetStream: wmnats.JetStreamConfig{
			DurablePrefix: group, AckAsync: true,
			// Without ManualAck the client library acknowledges what the subscriber has thrown away when it closes.
			SubscribeOptions: []nats.SubOpt{nats.ManualAck()},
		},
	}, watermill.NopLogger{})
}

func (m *mill) handle(ctx context.Context, n int, fn func(*value) error) (func() error, error) {
	return m.route(ctx, func(router *message.Router) error {
		sub, err := m.subscriber(n)
		if err != nil {
			return err
		}
		router.AddConsumerHandler("bench", subject, sub, func(msg *message.Message) error {
			var v value
			if err := proto.Unmarshal(msg.Payload, &v); err != nil {
				return err
			}
			return fn(&v)
		})
		return nil
	})
}

// route runs a router with the handlers that add gives it.
func (m *mill) route(ctx context.Context, add func(*message.Router) error) (func() error, error) {
	if err := createPushConsumer(ctx, m.sub, m.stream); err != nil {
		return nil, err
	}
	router, err := message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
	if err != nil {
		return nil, err
	}
	if err := add(router); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- router.Run(context.WithoutCancel(ctx)) }()
	select {
	case <-router.Running():
	case err := <-ended:
		return nil, err
	}
	return func() error { return errors.Join(router.Close(), <-ended) }, nil
}

// millCQRS is Watermill's typed layer with its protobuf marshaler.
type millCQRS struct {
	*mill
	events *cqrs.EventBus
}

var marshaler = cqrs.ProtoMarshaler{} //nolint:gochecknoglobals // a constant

func openCQRS(_ context.Context, s site) (session, error) {
	m, err := openMill(s)
	if err != nil {
		return nil, err
	}
	events, err := cqrs.NewEventBusWithConfig(m.publisher, cqrs.EventBusConfig{
		GeneratePublishTopic: func(cqrs.GenerateEventPublishTopicParams) (string, error) { return subject, nil },
		Marshaler:            marshaler,
	})
	return &millCQRS{m, events}, err
}

func (m *millCQRS) publish(ctx context.Context, v *value) error { return m.events.Publish(ctx, v) }

func (m *millCQRS) publishAll(ctx context.Context, values []*value) error {
	for _, v := range values {
		if err := m.events.Publish(ctx, v); err != nil {
			return err
		}
	}
	return nil
}

func (m *millCQRS) backlog(ctx context.Context, values []*value) error {
	return m.store(ctx, values, func(v *value) (*message.Message, error) { return marshaler.Marshal(v) })
}

func (m *millCQRS) handle(ctx context.Context, n int, fn func(*value) error) (func() error, error) {
	return m.route(ctx, func(router *message.Router) error {
		p, err := cqrs.NewEventProcessorWithConfig(router, cqrs.EventProcessorConfig{
			GenerateSubscribeTopic: func(cqrs.EventProcessorGenerateSubscribeTopicParams) (string, error) { return subject, nil },
			SubscriberConstructor: func(cqrs.EventProcessorSubscriberConstructorParams) (message.Subscriber, error) {
				return m.subscriber(n)
			},
			Marshaler: marshaler,
		})
		if err != nil {
			return err
		}
		return p.AddHandlers(cqrs.NewEventHandler("bench", func(_ context.Context, v *value) error { return fn(v) }))
	})
}
