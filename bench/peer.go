package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// value is the protobuf message that all peers publish: bytes.
type value = wrapperspb.BytesValue

// What all peers share.
const (
	subject     = "bench.written.v1"
	group       = "bench"
	source      = "//bench/worker"
	contentType = "application/protobuf"
	ackWait     = 10 * time.Second
	maxPending  = 1000 // messages that a push consumer sends ahead: the server's default
)

// peer is one way to publish and handle events.
type peer struct {
	name  string
	title string
	lacks []kind // what it cannot do
	open  func(ctx context.Context, s site) (session, error)
}

func (p peer) String() string { return p.name }

func allPeers() []peer {
	handling := []kind{endToEnd, draining, keyed, retrying, slow, latency, memory}
	return []peer{
		{name: "plain", title: "nats.go", open: openPlain},
		{name: "postrider", title: "Postrider", open: openPostrider},
		{name: "compact", title: "Postrider compact", open: openCompact},
		{name: "watermill", title: "Watermill", lacks: []kind{keyed}, open: openWatermill},
		{name: "cqrs", title: "Watermill CQRS", lacks: []kind{keyed}, open: openCQRS},
		{name: "cloudevents", title: "CloudEvents SDK", lacks: []kind{keyed, retrying}, open: openCloudEvents},
		{name: "ceiling", title: "ceiling", lacks: handling, open: openCeiling},
		{name: "ceiling-atomic", title: "ceiling, atomic", lacks: handling, open: openAtomicCeiling},
	}
}

// site is where a session works.
type site struct {
	url    string
	stream string
	size   int  // of the payload
	keyed  bool // messages have a key, and a key's messages are handled in order
}

// session is a peer at work on an empty stream. It has one connection for what it publishes and one for what it handles.
type session interface {
	publish(ctx context.Context, v *value) error
	publishAll(ctx context.Context, values []*value) error

	// backlog stores values as publishAll would, by the fastest way there is. It is not measured.
	backlog(ctx context.Context, values []*value) error

	// handle runs fn on every message, n at once. What fn fails on comes again. stop returns when no fn runs.
	handle(ctx context.Context, n int, fn func(*value) error) (stop func() error, err error)

	close()
}

// createStream makes the stream as bus.Stream declares it; all peers work on the same.
func createStream(ctx context.Context, js jetstream.JetStream, name string) (jetstream.Stream, error) {
	return js.CreateStream(ctx, jetstream.StreamConfig{
		Name: name, Subjects: []string{subject}, Discard: jetstream.DiscardNew, MaxBytes: -1, Replicas: 1,
		Duplicates: 2 * time.Minute, AllowDirect: true, AllowAtomicPublish: true, AllowBatchPublish: true,
	})
}

// createPushConsumer makes the consumer of the peers that use the client library's older interface. A library that made
// it would delete it when it stops, and nobody could ask the server what was acknowledged.
func createPushConsumer(ctx context.Context, nc *nats.Conn, stream string) error {
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	_, err = js.CreateOrUpdatePushConsumer(ctx, stream, jetstream.ConsumerConfig{
		Durable: group, DeliverGroup: group, DeliverSubject: nc.NewInbox(), FilterSubject: subject,
		AckPolicy: jetstream.AckExplicitPolicy, AckWait: ackWait, MaxDeliver: -1, MaxAckPending: maxPending,
	})
	return err
}

// storeAll stores messages in atomic batches: one sync of the disk for a thousand.
func storeAll(ctx context.Context, nc *nats.Conn, msgs []*nats.Msg) error {
	for len(msgs) > 0 {
		group := msgs[:min(batchSize, len(msgs))]
		msgs = msgs[len(group):]
		id := uuid.NewString()
		for i, m := range group {
			m.Header.Set("Nats-Batch-Id", id)
			m.Header.Set("Nats-Batch-Sequence", strconv.Itoa(i+1))
			if i < len(group)-1 {
				if err := nc.PublishMsg(m); err != nil {
					return fmt.Errorf("store a backlog: %w", err)
				}
				continue
			}
			m.Header.Set("Nats-Batch-Commit", "1")
			ack, err := nc.RequestMsgWithContext(ctx, m)
			if err != nil {
				return fmt.Errorf("store a backlog: %w", err)
			}
			var pubAck struct {
				jetstream.PubAck
				Error *jetstream.APIError `json:"error"`
			}
			if err := json.Unmarshal(ack.Data, &pubAck); err != nil {
				return fmt.Errorf("store a backlog: %w", err)
			}
			if pubAck.Error != nil {
				return fmt.Errorf("store a backlog: %w", pubAck.Error)
			}
		}
	}
	return nil
}

// connections are those of a session.
type connections struct{ pub, sub *nats.Conn }

func connect(url string) (connections, error) {
	var c connections
	var err error
	if c.pub, err = nats.Connect(url); err != nil {
		return c, err
	}
	if c.sub, err = nats.Connect(url); err != nil {
		c.pub.Close()
		return c, err
	}
	return c, nil
}

func (c connections) close() {
	c.pub.Close()
	c.sub.Close()
}
