package main

import (
	"bytes"
	"context"
	"time"

	format "github.com/cloudevents/sdk-go/binding/format/protobuf/v2"
	cejetstream "github.com/cloudevents/sdk-go/protocol/nats_jetstream/v2"
	"github.com/cloudevents/sdk-go/v2/binding"
	"github.com/cloudevents/sdk-go/v2/client"
	ce "github.com/cloudevents/sdk-go/v2/event"
	"github.com/cloudevents/sdk-go/v2/protocol"
	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
)

// sdk is the CloudEvents SDK with its protocol for NATS JetStream. It sends no message id, acknowledges a message before
// the handler has run, and has no way to refuse one.
type sdk struct {
	connections
	site
	client client.Client
}

func openCloudEvents(_ context.Context, s site) (session, error) {
	c, err := connect(s.url)
	if err != nil {
		return nil, err
	}
	sender, err := cejetstream.NewSenderFromConn(c.pub, s.stream, subject, nil)
	if err != nil {
		return nil, err
	}
	cl, err := client.New(sender)
	return &sdk{connections: c, site: s, client: cl}, err
}

func sdkEvent(v *value) (ce.Event, error) {
	e := ce.New()
	e.SetID(uuid.NewString())
	e.SetSource(source)
	e.SetType(subject)
	e.SetTime(time.Now())
	return e, e.SetData(format.ContentTypeProtobuf, v)
}

func (s *sdk) publish(ctx context.Context, v *value) error {
	e, err := sdkEvent(v)
	if err != nil {
		return err
	}
	if res := s.client.Send(ctx, e); !protocol.IsACK(res) {
		return res
	}
	return nil
}

func (s *sdk) publishAll(ctx context.Context, values []*value) error {
	for _, v := range values {
		if err := s.publish(ctx, v); err != nil {
			return err
		}
	}
	return nil
}

func (s *sdk) backlog(ctx context.Context, values []*value) error {
	msgs := make([]*nats.Msg, len(values))
	for i, v := range values {
		e, err := sdkEvent(v)
		if err != nil {
			return err
		}
		var body bytes.Buffer
		header, err := cejetstream.WriteMsg(ctx, (*binding.EventMessage)(&e), &body)
		if err != nil {
			return err
		}
		msgs[i] = &nats.Msg{Subject: subject, Header: header, Data: body.Bytes()}
	}
	return storeAll(ctx, s.pub, msgs)
}

func (s *sdk) handle(ctx context.Context, n int, fn func(*value) error) (func() error, error) {
	if err := createPushConsumer(ctx, s.sub, s.stream); err != nil {
		return nil, err
	}
	consumer, err := cejetstream.NewConsumerFromConn(s.sub, s.stream, subject, nil,
		[]nats.SubOpt{nats.Durable(group)}, cejetstream.WithQueueSubscriber(group))
	if err != nil {
		return nil, err
	}
	c, err := client.New(consumer, client.WithPollGoroutines(n), client.WithBlockingCallback())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() {
		ended <- c.StartReceiver(ctx, func(e ce.Event) error {
			var v value
			if err := e.DataAs(&v); err != nil {
				return err
			}
			return fn(&v)
		})
	}()
	return func() error {
		cancel()
		return <-ended
	}, nil
}
