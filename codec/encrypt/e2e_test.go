package encrypt_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/codec"
	"github.com/postrider/postrider/codec/compress"
	"github.com/postrider/postrider/codec/encrypt"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
	"github.com/postrider/postrider/rpc"
)

type charge struct {
	Card string `json:"card"`
	Note string `json:"note,omitempty"`
}

// charged is the contract as a service with these keys has it: compressed, then encrypted.
func charged(keys encrypt.KeyProvider) *postrider.Topic[charge] {
	return postrider.NewTopic[charge]("cards.charged.v1", postrider.Encoding(encrypt.New(keys, compress.New(compress.Config{}, codec.JSON))))
}

func newBus(t *testing.T, nc *nats.Conn) *bus.Bus {
	t.Helper()
	b, err := bus.New(nc, bus.Config{
		Source: "//test/cards", Group: "tester", Logger: postridertest.Logger(t),
		Streams: []bus.Stream{{Name: "CARDS", Topics: []string{"cards.>"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// run runs parts until the test ends.
func run(t *testing.T, parts ...postrider.Runner) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- postrider.Run(ctx, parts...) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// payloads returns what the stream holds.
func payloads(t *testing.T, nc *nats.Conn, stream string) []*jetstream.RawStreamMsg {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	var out []*jetstream.RawStreamMsg
	for seq := uint64(1); seq <= s.CachedInfo().State.LastSeq; seq++ {
		m, err := s.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, m)
	}
	return out
}

// received collects what a handler got.
type received struct {
	mu   sync.Mutex
	list []charge
}

func (r *received) handle(_ context.Context, e postrider.Event[charge]) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, *e.Value)
	return nil
}

func (r *received) want(t *testing.T, cards ...string) {
	t.Helper()
	postridertest.Eventually(t, func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		var got []string
		for _, c := range r.list {
			got = append(got, c.Card)
		}
		if fmt.Sprint(got) != fmt.Sprint(cards) {
			return fmt.Errorf("handled %q, want %q", got, cards)
		}
		return nil
	})
}

// Published in a transaction, sent by a relay, kept by a stream: nowhere can the payload be read, and the handler gets it.
func TestThroughOutboxAndBus(t *testing.T) {
	t.Parallel()
	nc, pool := postridertest.NATS(t), postridertest.Postgres(t)
	topic := charged(newRing(t, newKey(t, "k1", "a")))
	b := newBus(t, nc)
	var got received
	if err := b.Subscribe(topic.Handler(got.handle), bus.From(bus.DeliverAll)); err != nil {
		t.Fatal(err)
	}
	if err := outbox.Migrate(t.Context(), pool, ""); err != nil {
		t.Fatal(err)
	}
	ob, err := outbox.New(outbox.Config{Source: "//test/cards"})
	if err != nil {
		t.Fatal(err)
	}
	relay, err := outbox.NewRelay(pool, b, outbox.RelayConfig{Outbox: ob, Logger: postridertest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	note := strings.Repeat("thank you for shopping with us ", 10_000) // 310 KB that pack well
	err = pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
		return topic.Publish(t.Context(), ob.In(tx), &charge{Card: "4111-1111", Note: note})
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, b, relay)
	got.want(t, "4111-1111")
	if got.list[0].Note != note {
		t.Error("the note came back changed")
	}
	m := payloads(t, nc, "CARDS")[0]
	if bytes.Contains(m.Data, []byte("4111")) || len(m.Data) > len(note)/10 || m.Header.Get("ce-datacontenttype") != encrypt.ContentType {
		t.Errorf("the stream has %d bytes of %s, readable: %t", len(m.Data), m.Header.Get("ce-datacontenttype"), bytes.Contains(m.Data, []byte("4111")))
	}
}

func TestThroughRPC(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	keys := newRing(t, newKey(t, "k1", "a"))
	method := func(keys encrypt.KeyProvider) *postrider.Method[charge, charge] {
		return postrider.NewMethod[charge, charge]("cards.v1/Charge", postrider.Encoding(encrypt.New(keys, compress.New(compress.Config{}, codec.JSON))))
	}
	srv, err := rpc.NewServer(nc, rpc.ServerConfig{Logger: postridertest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	err = srv.Register(method(keys).Handler(func(_ context.Context, c *charge) (*charge, error) {
		return &charge{Card: c.Card, Note: strings.Repeat("charged ", 1000)}, nil
	}))
	if err != nil {
		t.Fatal(err)
	}
	run(t, srv)
	client, err := rpc.NewClient(nc, rpc.ClientConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	if _, err := rpc.Call(t.Context(), client, method(keys), &charge{}, rpc.WaitForReady()); err != nil {
		t.Fatal(err)
	}
	spy, err := nc.SubscribeSync(">") // not before: with it every subject has somebody who listens
	if err != nil {
		t.Fatal(err)
	}
	res, err := rpc.Call(t.Context(), client, method(keys), &charge{Card: "4111-1111"})
	if err != nil || res.Card != "4111-1111" || len(res.Note) != 8000 {
		t.Fatalf("%+v, %v", res, err)
	}
	forger := newRing(t, newKey(t, "k1", "b"))
	if _, err := rpc.Call(t.Context(), client, method(forger), &charge{Card: "4111-1111"}); !errors.Is(err, postrider.InvalidArgument) ||
		!strings.Contains(err.Error(), "not authentic") {
		t.Errorf("a call with a forged key: %v", err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	n, _, err := spy.Pending()
	if err != nil || n < 4 {
		t.Fatalf("the spy saw %d messages, %v, want two requests and two replies", n, err)
	}
	for range n {
		m, err := spy.NextMsg(time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(m.Data, []byte("4111")) {
			t.Errorf("%s carries the card number: %q", m.Subject, m.Data)
		}
	}
}

// What nobody can read goes to the dead letters at once with its cause, and what comes after it is handled.
func TestBadPayloadsGoToTheDeadLetters(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	ring := newRing(t, newKey(t, "k1", "a"))
	topic, b := charged(ring), newBus(t, nc)
	var got received
	if err := b.Subscribe(topic.Handler(got.handle), bus.From(bus.DeliverAll), bus.Concurrency(1)); err != nil {
		t.Fatal(err)
	}
	message := func(keys encrypt.KeyProvider, change func(m *postrider.Message)) *postrider.Message {
		t.Helper()
		m, err := charged(keys).Message(t.Context(), &charge{Card: "bad"})
		if err != nil {
			t.Fatal(err)
		}
		change(m)
		return m
	}
	bomb, err := encrypt.New(ring, compress.New(compress.Config{MaxBytes: 64 << 20}, codec.JSON)).
		Append(nil, &charge{Card: "bomb", Note: strings.Repeat(" ", 20<<20)})
	if err != nil {
		t.Fatal(err)
	}
	causes := []string{"not authentic", `key "k2": unknown key`, "it is not encrypted", `no codec for content type "application/json"`, "unpack to more than Config.MaxBytes"}
	err = b.Publish(t.Context(),
		message(ring, func(m *postrider.Message) { m.Data[len(m.Data)/2] ^= 1 }),
		message(newRing(t, newKey(t, "k2", "b")), func(*postrider.Message) {}),
		message(ring, func(m *postrider.Message) { m.Data = []byte(`{"card":"bad"}`) }),
		message(ring, func(m *postrider.Message) { m.Data, m.ContentType = []byte(`{"card":"bad"}`), "application/json" }),
		message(ring, func(m *postrider.Message) { m.Data = bomb }),
		message(ring, func(m *postrider.Message) {}))
	if err != nil {
		t.Fatal(err)
	}
	run(t, b)
	got.want(t, "bad") // the last one
	postridertest.Eventually(t, func() error {
		letters, _, err := b.DeadLetters().List(t.Context(), bus.LetterFilter{}, 0, 0)
		if err == nil && len(letters) != len(causes) {
			err = fmt.Errorf("%d dead letters, want %d", len(letters), len(causes))
		}
		for i := range min(len(letters), len(causes)) {
			if l := letters[i]; l.Attempts != 1 || l.Code != postrider.InvalidArgument || !strings.Contains(l.Cause, causes[i]) {
				t.Errorf("dead letter %d after %d attempts: %v: %s, want %q", i, l.Attempts, l.Code, l.Cause, causes[i])
			}
		}
		return err
	})
}

// flaky is a KeyProvider that fails for a while.
type flaky struct {
	*encrypt.Ring
	failures atomic.Int64
}

func (f *flaky) Key(id string) (*encrypt.Key, error) {
	if f.failures.Add(-1) >= 0 {
		return nil, errors.New("key service: connection refused")
	}
	return f.Ring.Key(id)
}

// A key service that is away delays messages and loses none.
func TestKeyServiceAway(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	keys := &flaky{Ring: newRing(t, newKey(t, "k1", "a"))}
	keys.failures.Store(3)
	topic, b := charged(keys), newBus(t, nc)
	var got received
	if err := b.Subscribe(topic.Handler(got.handle), bus.From(bus.DeliverAll), bus.Retry(postrider.RetryPolicy{Initial: time.Millisecond})); err != nil {
		t.Fatal(err)
	}
	if err := topic.Publish(t.Context(), b, &charge{Card: "4111"}); err != nil {
		t.Fatal(err)
	}
	run(t, b)
	got.want(t, "4111")
	if s := b.Stats(); s.Retried != 3 || s.DeadLettered != 0 {
		t.Errorf("retried %d, dead letters %d, want 3 and 0", s.Retried, s.DeadLettered)
	}
}

// A stream holds messages of both keys while the writer changes over; a reader that has both reads both.
func TestRotationUnderway(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	writerKeys, readerKeys := newRing(t, newKey(t, "k1", "a")), newRing(t, newKey(t, "k1", "a"))
	b := newBus(t, nc)
	var got received
	if err := b.Subscribe(charged(readerKeys).Handler(got.handle), bus.From(bus.DeliverAll), bus.Concurrency(1)); err != nil {
		t.Fatal(err)
	}
	topic := charged(writerKeys)
	publish := func(card string) error { return topic.Publish(t.Context(), b, &charge{Card: card}) }
	err := errors.Join(
		publish("old"),
		readerKeys.Add(newKey(t, "k2", "b")), writerKeys.Add(newKey(t, "k2", "b")), // first everywhere
		writerKeys.Use("k2"), // then where it is written
		publish("new"))
	if err != nil {
		t.Fatal(err)
	}
	run(t, b)
	got.want(t, "old", "new")
	for i, id := range []string{"k1", "k2"} {
		if m := payloads(t, nc, "CARDS")[i]; !bytes.HasPrefix(m.Data, []byte("\x01\x02"+id)) {
			t.Errorf("message %d begins with %q, want key %s", i, m.Data[:4], id)
		}
	}
}
