package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/idempotency"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// newBus returns a bus that runs, with the streams of the tests' topics.
func newBus(t testing.TB, nc *nats.Conn, handlers ...postrider.Handler) *bus.Bus {
	t.Helper()
	b, err := bus.New(nc, bus.Config{Source: "//shop/orders", Group: "tester", Logger: postridertest.Logger(t), Streams: []bus.Stream{
		{Name: "ORDERS", Topics: []string{"orders.>"}}, {Name: "STOCK", Topics: []string{"stock.>"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range handlers {
		if err := b.Subscribe(h, bus.From(bus.DeliverAll), bus.Ordered()); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-b.Started():
	case err := <-done:
		t.Fatal(err)
	}
	return b
}

// auditOf returns an audit of both streams.
func auditOf(ctx context.Context, b *bus.Bus) outbox.AuditConfig {
	return outbox.AuditConfig{Streams: []iter.Seq2[*postrider.Message, error]{
		b.Read(ctx, "ORDERS", time.Time{}), b.Read(ctx, "STOCK", time.Time{}),
	}}
}

func wantAudit(t testing.TB, pool *pgxpool.Pool, ob *outbox.Outbox, cfg outbox.AuditConfig) *outbox.AuditReport {
	t.Helper()
	report, err := outbox.Audit(t.Context(), pool, ob, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// found returns the ids of a finding.
func found(f outbox.AuditFinding) (ids []string) {
	for _, m := range f.Examples {
		ids = append(ids, m.Message.ID)
	}
	return ids
}

// tampering is how a test does to a stream what must not happen.
type tampering struct {
	testing.TB
	jetstream.Stream
	js jetstream.JetStream
}

func tamper(t testing.TB, nc *nats.Conn, stream string) tampering {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	return tampering{t, s, js}
}

// find returns the stored message with an id.
func (s tampering) find(id string) *jetstream.RawStreamMsg {
	s.Helper()
	for seq := uint64(1); ; seq++ {
		raw, err := s.GetMsg(s.Context(), seq)
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound) && seq < 1000:
		case err != nil:
			s.Fatalf("message %s: %v", id, err)
		case raw.Header.Get("ce-id") == id:
			return raw
		}
	}
}

// again stores a message that is there once more, as if the server had not seen that it is a duplicate.
func (s tampering) again(raw *jetstream.RawStreamMsg) {
	s.Helper()
	header := nats.Header{}
	for name, values := range raw.Header {
		if strings.HasPrefix(name, "ce-") { // without its id, and its place in a batch
			header[name] = values
		}
	}
	if _, err := s.js.PublishMsg(s.Context(), &nats.Msg{Subject: raw.Subject, Header: header, Data: raw.Data}); err != nil {
		s.Fatal(err)
	}
}

func (s tampering) remove(raw *jetstream.RawStreamMsg) {
	s.Helper()
	if err := s.DeleteMsg(s.Context(), raw.Sequence); err != nil {
		s.Fatal(err)
	}
}

func TestAuditFindsWhatWasDone(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	nc, ctx := postridertest.NATS(t), t.Context()
	b := newBus(t, nc)
	if err := idempotency.Migrate(ctx, pool, ""); err != nil {
		t.Fatal(err)
	}
	store, err := idempotency.New(pool, idempotency.Config{})
	if err != nil {
		t.Fatal(err)
	}

	sendAll := func(n int, msgs ...*postrider.Message) {
		t.Helper()
		relay, stop := start(t, pool, b, quick(ob))
		publish(t, pool, ob, msgs...)
		postridertest.Eventually(t, func() error {
			if s := relay.Stats(); int(s.Published+s.Dead) != n {
				return fmt.Errorf("want %d sent, stats %+v", n, s)
			}
			return nil
		})
		stop()
	}
	at := time.Now()
	for i := range 60 {
		m := message(fmt.Sprintf("m%02d", i), fmt.Sprint("key", i%5))
		if m.Time = at; i%4 == 3 {
			m.Type = "stock.taken.v1" // another stream, whose order with the first nobody knows
		}
		publish(t, pool, ob, m)
	}
	sendAll(61, message("twice", "key0"))
	cfg := auditOf(ctx, b)
	if r := wantAudit(t, pool, ob, cfg); !r.OK() || r.Messages != 61 || r.Delivered != 61 || r.Others != 0 {
		t.Fatalf("nothing happened yet: %v", r)
	}

	later := message("delayed", "key1")
	if err := later.SetExtension(postrider.ExtDeliverAt, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	dead, revived := message("dead", "key2"), message("revived", "key3")
	dead.Topic, revived.Topic = "nowhere.v1", "nowhere.v1"
	sendAll(4, later, dead, revived, message("twice", "key0"))
	_, err = pool.Exec(ctx, `insert into postrider.postrider_outbox (topic, attributes, data)
		select 'orders.placed.v1', attributes, data from postrider.postrider_outbox_dead order by id desc limit 1;
		insert into postrider.postrider_outbox (topic, data) values ('orders.placed.v1', '{}')`)
	if err != nil {
		t.Fatal(err)
	}
	sendAll(3, message("last", "key4"))
	publish(t, pool, ob, message("in flight", "key0"))
	if err := b.Publish(ctx, message("another's", "key0")); err != nil {
		t.Fatal(err)
	}

	s := tamper(t, nc, "ORDERS")
	s.remove(s.find("m12"))
	s.again(s.find("m20"))
	for _, id := range []string{"m50", "m45"} { // both of key0, and the last of it in their stream
		raw := s.find(id)
		s.remove(raw)
		s.again(raw)
	}
	s.remove(s.find("twice"))
	handler := idempotency.Handler(store, "billing", orderPlaced(), func(context.Context, pgx.Tx, postrider.Event[order]) error { return nil })
	for m := range b.Read(ctx, "ORDERS", time.Time{}) {
		if m.ID != "m08" && m.ID != "m09" {
			if _, err := handler.Handle(ctx, m); err != nil {
				t.Fatal(err)
			}
		}
	}
	cfg.Inbox, cfg.Consumer = store, "billing"

	r := wantAudit(t, pool, ob, cfg)
	if r.OK() || r.Messages != 67 || r.Delivered != 62 || r.Others != 1 || r.Unhandled.Count != 17 {
		t.Errorf("the counts are wrong: %v", r)
	}
	for kind, c := range map[string]struct {
		found outbox.AuditFinding
		count int
		want  string
	}{
		"lost":         {r.Lost, 2, "m12 twice"},
		"doubled":      {r.Doubled, 1, "m20"},
		"out of order": {r.OutOfOrder, 1, "m45"},
		"in flight":    {r.InFlight, 2, "delayed in flight"},
		"dead":         {r.Dead, 1, "dead"},
		"unhandled":    {r.Unhandled, 17, "m03 m07 m08 m09 m11 m15 m19 m23 m27 m31"}, // of the stock nothing is handled
	} {
		if got := strings.Join(found(c.found), " "); got != c.want || c.found.Count != c.count {
			t.Errorf("%s: %d, %s; want %d, %s", kind, c.found.Count, got, c.count, c.want)
		}
	}
	for _, line := range []string{
		"67 messages: 62 delivered, 2 in flight, 1 dead, 2 lost; 1 doubled, 1 out of order, 17 unhandled; 1 others\n",
		"\nlost: number 13, ", "orders.placed.v1, //shop/orders m12, key key2",
	} {
		if !strings.Contains(r.String(), line) {
			t.Errorf("the report has no %q:\n%v", line, r)
		}
	}

	// Whatever it may know at a time, it finds the same.
	for _, memory := range []int{1, 7, 33} {
		if again := wantAudit(t, pool, ob, cfg.WithMemory(memory)); again.String() != r.String() || !reflect.DeepEqual(found(again.Lost), found(r.Lost)) {
			t.Errorf("knowing %d at a time: %v\nwant %v", memory, again, r)
		}
	}

	// A part of the time.
	var from, to time.Time
	if err := pool.QueryRow(ctx, `select min(at), max(at) from postrider.postrider_outbox where id in (11, 21)`).Scan(&from, &to); err != nil {
		t.Fatal(err)
	}
	cfg.From, cfg.To, cfg.Examples = from, to, -1
	if r := wantAudit(t, pool, ob, cfg); r.Messages != 10 || r.Delivered != 9 || r.Lost.Count != 1 || len(r.Lost.Examples) != 0 || r.Doubled.Count != 0 {
		t.Errorf("from message 10 to 20: %v", r)
	}
}

// An audit beside writers and a relay sees no fault where there is none.
func TestAuditOfARunningOutbox(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx := t.Context()
	b := newBus(t, postridertest.NATS(t))
	cfg := quick(ob)
	cfg.Retain = 200 * time.Millisecond
	relay, _ := start(t, pool, b, cfg)
	const transactions = 200
	var writer sync.WaitGroup
	writer.Go(func() {
		for n := range transactions {
			publish(t, pool, ob, message(fmt.Sprint(n), fmt.Sprint("key", n%7)), message(fmt.Sprint(n, "b"), ""))
		}
	})
	rows := 0
	for relay.Stats().Published < 2*transactions {
		r := wantAudit(t, pool, ob, auditOf(ctx, b).WithMemory(200))
		if !r.OK() {
			t.Fatal(r)
		}
		rows += r.Messages
	}
	writer.Wait()
	if rows == 0 {
		t.Error("no audit saw a row: the test shows nothing")
	}
	postridertest.Eventually(t, func() error {
		if s := relay.Stats(); s.Depth != 0 {
			return fmt.Errorf("stats %+v", s)
		}
		return nil
	})
	wantRows(t, pool, "postrider.postrider_outbox", 0) // audits held up the truncation while they lasted
}

func TestAuditErrors(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx := t.Context()
	_, err := outbox.Audit(ctx, pool, ob, outbox.AuditConfig{})
	wantCode(t, err, postrider.InvalidArgument)
	publish(t, pool, ob, message("1", ""))
	broken := func(yield func(*postrider.Message, error) bool) {
		yield(nil, postrider.Errorf(postrider.Unavailable, "no stream today"))
	}
	cfg := outbox.AuditConfig{Streams: []iter.Seq2[*postrider.Message, error]{broken}}
	_, err = outbox.Audit(ctx, pool, ob, cfg)
	wantCode(t, err, postrider.Unavailable)
	if _, err := pool.Exec(ctx, `update postrider.postrider_outbox_relay set system_id = 1`); err != nil {
		t.Fatal(err)
	}
	_, err = outbox.Audit(ctx, pool, ob, cfg)
	wantCode(t, err, postrider.FailedPrecondition)
}
