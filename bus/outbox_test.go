package bus_test

import (
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// A message that was put off in a transaction comes at its time, if the transaction commits; it can be taken back once the
// relay has published it.
func TestDelayThroughTheOutbox(t *testing.T) {
	t.Parallel()
	nc, pool := postridertest.NATS(t), postridertest.Postgres(t)
	if err := outbox.Migrate(t.Context(), pool, ""); err != nil {
		t.Fatal(err)
	}
	ob, err := outbox.New(outbox.Config{Source: "//test/notes"})
	if err != nil {
		t.Fatal(err)
	}
	b := newBus(t, nc)
	got := arrivals(t, b)
	relay, err := outbox.NewRelay(pool, b, outbox.RelayConfig{Outbox: ob, Logger: postridertest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	run(t, b, relay)
	awaitStart(t, b)
	place := func(n int, id string, delay time.Duration, result error) error {
		return pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
			opts := []postrider.PublishOption{postrider.MessageID(id)}
			if delay > 0 {
				opts = append(opts, postrider.Delay(delay))
			}
			return errors.Join(noted.Publish(t.Context(), ob.In(tx), &note{N: n}, opts...), result)
		})
	}
	const delay = 2 * time.Second
	due := time.Now().Add(delay)
	no := errors.New("no")
	if err := place(9, "rolled back", delay/2, no); !errors.Is(err, no) {
		t.Fatal(err)
	}
	if err := errors.Join(place(9, "cancelled", time.Hour, nil), place(1, "later", delay, nil), place(0, "now", 0, nil)); err != nil {
		t.Fatal(err)
	}
	if m := <-got; m.ID != "now" {
		t.Errorf("the first is %s", m.ID)
	}
	postridertest.Eventually(t, func() error { // once it is with the scheduler
		in, err := b.Cancel(t.Context(), "cancelled")
		if err == nil && !in {
			err = errors.New("there is nothing to cancel yet")
		}
		return err
	})
	m := <-got
	if now := time.Now(); m.ID != "later" || string(m.Data) != `{"n":1}` || m.Source != "//test/notes" || now.Before(due) {
		t.Errorf("then came %+v, %v after its time", m, now.Sub(due))
	}
}

// What the broker would refuse fails the transaction.
func TestCheckRefusesInTheTransaction(t *testing.T) {
	t.Parallel()
	pool := postridertest.Postgres(t)
	b := newBus(t, postridertest.NATS(t))
	if err := outbox.Migrate(t.Context(), pool, ""); err != nil {
		t.Fatal(err)
	}
	ob, err := outbox.New(outbox.Config{Source: "//test/notes", MaxBytes: -1, Check: b.Check})
	if err != nil {
		t.Fatal(err)
	}
	m := func(topic string, size int) *postrider.Message {
		return &postrider.Message{ID: "1", Type: "notes.written.v1", Topic: topic, Data: make([]byte, size)}
	}
	for name, tt := range map[string]struct {
		msg  *postrider.Message
		want error
	}{
		"good":           {m("", 1<<20-1024), nil},
		"with headers":   {m("", 1<<20-50), postrider.ResourceExhausted},
		"address":        {m("notes..v1", 0), postrider.InvalidArgument},
		"no source":      {&postrider.Message{ID: "1", Source: "%zz", Type: "notes.written.v1"}, postrider.InvalidArgument},
		"twice the size": {m("", 2<<20), postrider.ResourceExhausted},
	} {
		if err := ob.On(pool).Publish(t.Context(), tt.msg); !errors.Is(err, tt.want) || err != nil && postrider.Retryable(err) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
}
