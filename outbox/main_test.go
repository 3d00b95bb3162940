package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

func TestMain(m *testing.M) {
	for env, process := range map[string]func(string) error{processEnv: relayProcess, brokerEnv: brokerProcess} {
		if config := os.Getenv(env); config != "" {
			fmt.Fprintln(os.Stderr, process(config))
			os.Exit(1)
		}
	}
	os.Exit(postridertest.Main(m))
}

type order struct {
	ID       string `json:"id"`
	Customer string `json:"customer,omitempty"`
}

func orderPlaced() *postrider.Topic[order] {
	return postrider.NewTopic[order]("orders.placed.v1", postrider.KeyBy(func(o *order) string { return o.Customer }))
}

// setup returns a database with an outbox.
func setup(t testing.TB) (*pgxpool.Pool, *outbox.Outbox) {
	t.Helper()
	pool := postridertest.Postgres(t)
	if err := outbox.Migrate(t.Context(), pool, ""); err != nil {
		t.Fatal(err)
	}
	ob, err := outbox.New(outbox.Config{Source: "//shop/orders"})
	if err != nil {
		t.Fatal(err)
	}
	return pool, ob
}

// publish commits messages in one transaction.
func publish(t testing.TB, pool *pgxpool.Pool, ob *outbox.Outbox, msgs ...*postrider.Message) {
	t.Helper()
	err := pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error { return ob.In(tx).Publish(t.Context(), msgs...) })
	if err != nil {
		t.Fatal(err)
	}
}

// message has the key if there is one.
func message(id, key string) *postrider.Message {
	m := &postrider.Message{ID: id, Type: "orders.placed.v1", ContentType: "application/json", Data: []byte(`{"id":"` + id + `"}`)}
	if err := m.SetExtension(postrider.ExtPartitionKey, key); err != nil {
		panic(err)
	}
	return m
}

// messages returns n without a key, with ids from "0".
func messages(n int) []*postrider.Message {
	msgs := make([]*postrider.Message, n)
	for i := range msgs {
		msgs[i] = message(fmt.Sprint(i), "")
	}
	return msgs
}

// start runs a relay, which is stopped at the end of the test at the latest.
func start(t testing.TB, pool *pgxpool.Pool, pub postrider.Publisher, cfg outbox.RelayConfig) (relay *outbox.Relay, stop func()) {
	t.Helper()
	if cfg.Logger == nil {
		cfg.Logger = postridertest.Logger(t)
	}
	relay, err := outbox.NewRelay(pool, pub, cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- relay.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return relay, stop
}

// broker is a publisher in memory. It accepts a message unless refuse says no, and counts duplicates by id, as a stream does.
type broker struct {
	mu       sync.Mutex
	refuse   func(*postrider.Message) error
	before   func(batch []*postrider.Message) error // fails a batch as a whole
	after    func(batch []*postrider.Message)       // once it is accepted
	accepted []*postrider.Message                   // without duplicates
	seen     map[string]bool
	repeated int
}

func (b *broker) Publish(_ context.Context, msgs ...*postrider.Message) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.before != nil {
		if err := b.before(msgs); err != nil {
			return err
		}
	}
	failed, errs := false, make([]error, len(msgs))
	for i, m := range msgs {
		if b.refuse != nil {
			if errs[i] = b.refuse(m); errs[i] != nil {
				failed = true
				continue
			}
		}
		b.accept(m)
	}
	if b.after != nil {
		b.after(msgs)
	}
	if failed {
		return &postrider.BatchError{Errs: errs}
	}
	return nil
}

func (b *broker) accept(m *postrider.Message) {
	id := m.Source + " " + m.ID + m.Extension(postrider.ExtRedrive)
	if b.seen[id] {
		b.repeated++
		return
	}
	if b.seen == nil {
		b.seen = map[string]bool{}
	}
	b.seen[id] = true
	b.accepted = append(b.accepted, m)
}

// set changes how the broker behaves while it is in use.
func (b *broker) set(change func(*broker)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	change(b)
}

func (b *broker) copy() []*postrider.Message {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.accepted)
}

func (b *broker) ids() []string { return ids(b.copy()) }

// wantIDs waits until exactly these messages are accepted, in this order.
func wantIDs(t testing.TB, b *broker, want ...string) {
	t.Helper()
	postridertest.Eventually(t, func() error {
		if got := b.ids(); !slices.Equal(got, want) {
			return fmt.Errorf("accepted %q, want %q", clip(got), clip(want))
		}
		return nil
	})
}

func clip(ids []string) []string {
	if len(ids) > 20 {
		return append(slices.Clone(ids[:20]), fmt.Sprintf("... %d in all", len(ids)))
	}
	return ids
}

func wantCode(t testing.TB, err error, code postrider.Code) {
	t.Helper()
	if !errors.Is(err, code) {
		t.Fatalf("error %v, want %v", err, code)
	}
}

// quick is a relay configuration for tests that wait for a lease.
func quick(ob *outbox.Outbox) outbox.RelayConfig {
	return outbox.RelayConfig{Outbox: ob, LeaseTTL: 1500 * time.Millisecond, PollInterval: 20 * time.Millisecond}
}
