package main

import (
	"context"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// order is what all peers publish, as JSON: River's jobs and Watermill's envelopes are JSON.
type order struct {
	Number int64  `json:"number"`
	Pad    string `json:"pad"`
}

// What all peers share.
const (
	subject = "orders.placed.v1"
	source  = "//bench/orders"
)

// peer is one way to publish in a transaction.
type peer struct {
	name  string
	title string
	kinds []kind // what it takes part in
	open  func(ctx context.Context, s site) (session, error)
}

func (p peer) String() string { return p.name }

func (p peer) does(c cell) bool { return slices.Contains(p.kinds, c.kind) }

func allPeers() []peer {
	all := []kind{draining, latency, business, inserting, bulk, sustained, idle}
	return []peer{
		{name: "postrider", title: "Postrider", kinds: append([]kind{held, reading, handling, remembered}, all...), open: openPostrider},
		{name: "deferred", title: "Postrider, with the COMMIT", kinds: []kind{latency, business, inserting, sustained}, open: openDeferred},
		{name: "keyed", title: "Postrider, with keys", kinds: []kind{draining, business, inserting, bulk}, open: openKeyed},
		{name: "watermill", title: "Watermill", kinds: append([]kind{held}, all...), open: openWatermill},
		{name: "river", title: "River tuned", kinds: all, open: openRiverTuned},
		{name: "river-default", title: "River", kinds: []kind{draining, latency, idle}, open: openRiver},
		{name: "async", title: "raw async publish", kinds: []kind{draining}, open: openAsync},
		{name: "fast", title: "raw fast batches", kinds: []kind{draining}, open: openFast},
		{name: "copy", title: "raw COPY", kinds: []kind{bulk}, open: openCopy},
	}
}

// site is where a session works: a database and a stream of its own, both empty.
type site struct {
	pool   *pgxpool.Pool
	nc     *nats.Conn
	js     jetstream.JetStream
	stream string
}

// session is a peer at work.
type session interface {
	// publish has messages leave if tx commits. Safe for concurrent use, each caller with its own tx.
	publish(ctx context.Context, tx pgx.Tx, orders []*order) error

	// relay moves to the stream what was published until stop is called.
	relay(ctx context.Context) (stop func() error, err error)

	// table is where published messages are until they are relayed; "" for none.
	table() string
}

// beginner begins the transactions that messages are published in: the pool, or something of the session's.
type beginner interface {
	Begin(ctx context.Context) (pgx.Tx, error)
}

// createStream makes the stream as bus.Stream declares it; all peers work on the same.
func createStream(ctx context.Context, js jetstream.JetStream, name string) (jetstream.Stream, error) {
	return js.CreateStream(ctx, jetstream.StreamConfig{
		Name: name, Subjects: []string{subject}, Discard: jetstream.DiscardNew, MaxBytes: -1, Replicas: 1,
		AllowDirect: true, AllowAtomicPublish: true, AllowBatchPublish: true,
	})
}
