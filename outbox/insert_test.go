package outbox_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
)

func TestCommittedIsSentAndRolledBackIsNot(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	b := &broker{}
	start(t, pool, b, outbox.RelayConfig{Outbox: ob})

	ctx, no := t.Context(), errors.New("no")
	err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		if err := orderPlaced().Publish(ctx, ob.In(tx), &order{ID: "x"}, postrider.MessageID("rolled back")); err != nil {
			return err
		}
		return no
	})
	if !errors.Is(err, no) {
		t.Fatal(err)
	}
	err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		if err := ob.In(tx).Publish(ctx, message("1", "")); err != nil {
			return err
		}
		err := pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
			if err := ob.In(tx).Publish(ctx, message("savepoint rolled back", "k")); err != nil {
				return err
			}
			return no
		})
		if !errors.Is(err, no) {
			return err
		}
		return pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error { return ob.In(tx).Publish(ctx, message("2", "k")) })
	})
	if err != nil {
		t.Fatal(err)
	}
	publish(t, pool, ob, message("3", ""))
	wantIDs(t, b, "1", "2", "3")
}

// Every way to insert keeps the order of the arguments and the message as it is.
func TestMessagesArriveWholeAndInOrder(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 2, 99, 100, 2500} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			pool, ob := setup(t)
			msgs := make([]*postrider.Message, n)
			var ids []string
			for i := range msgs {
				m := message(fmt.Sprint(i), fmt.Sprint("key", i%7))
				m.Subject, m.DataSchema, m.Time = "Größe", "https://example.com/s", time.Date(2024, 2, 29, 1, 2, 3, 4, time.UTC)
				if i%3 == 0 {
					m.Topic, m.Data = "elsewhere.v1", nil
				}
				if i%3 == 1 {
					m.Source, m.Type = "//other", "stock.v1/Reserve"
				}
				msgs[i], ids = m, append(ids, m.ID)
			}
			publish(t, pool, ob, msgs...)
			b := &broker{}
			relay, _ := start(t, pool, b, outbox.RelayConfig{Outbox: ob})
			wantIDs(t, b, ids...)
			for i, got := range b.accepted {
				want := msgs[i].Clone()
				want.Topic = want.Address()
				if got.Source != want.Source || got.Type != want.Type || got.Subject != want.Subject || got.Topic != want.Topic ||
					got.DataSchema != want.DataSchema || got.ContentType != want.ContentType || !got.Time.Equal(want.Time) ||
					!slices.Equal(got.Extensions, want.Extensions) || !bytes.Equal(got.Data, want.Data) {
					t.Fatalf("message %d arrived as %+v, want %+v", i, got, want)
				}
			}
			if msgs[0].Source != "//shop/orders" {
				t.Errorf("source %q was not filled in", msgs[0].Source)
			}
			if s := relay.Stats(); s.Dead != 0 || s.Lag < 0 {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

func TestRefusalLeavesTheTransactionUsable(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	b := &broker{}
	start(t, pool, b, outbox.RelayConfig{Outbox: ob})
	checked, err := outbox.New(outbox.Config{Source: "//s", Check: func(m *postrider.Message) error {
		return postrider.Errorf(postrider.PermissionDenied, "no %s of %s", m.ID, m.Source)
	}})
	if err != nil {
		t.Fatal(err)
	}

	ctx := t.Context()
	err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		p := ob.In(tx)
		if err := p.Publish(ctx); err != nil {
			return err
		}
		large := message("large", "")
		large.Data = make([]byte, 1<<20)
		err := p.Publish(ctx, message("with large", ""), large)
		wantCode(t, err, postrider.ResourceExhausted)
		if postrider.Retryable(err) || !strings.Contains(err.Error(), "claim check") || !strings.Contains(err.Error(), "1032192") {
			t.Errorf("error %v, want a permanent one with the limit and a way out", err)
		}
		bad := message("", "")
		wantCode(t, p.Publish(ctx, message("with bad", ""), bad), postrider.InvalidArgument)
		for _, topic := range []string{"a b", "a.*", "a.>", "a..b", ".", "a\x00", "a\xff"} {
			lost := message("lost", "")
			lost.Topic = topic
			wantCode(t, p.Publish(ctx, lost), postrider.InvalidArgument)
		}
		unwanted := message("unwanted", "")
		wantCode(t, checked.In(tx).Publish(ctx, unwanted), postrider.PermissionDenied)
		return p.Publish(ctx, message("good", ""))
	})
	if err != nil {
		t.Fatal(err)
	}
	wantIDs(t, b, "good")
}

func TestMaxBytes(t *testing.T) {
	t.Parallel()
	pool, _ := setup(t)
	small, err := outbox.New(outbox.Config{Source: "//s", MaxBytes: 200})
	if err != nil {
		t.Fatal(err)
	}
	unlimited, err := outbox.New(outbox.Config{Source: "//s", MaxBytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		m := message("1", "")
		m.Data = make([]byte, 200)
		wantCode(t, small.In(tx).Publish(ctx, m), postrider.ResourceExhausted)
		m.Data = make([]byte, 2<<20)
		return unlimited.In(tx).Publish(ctx, m)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A transaction that publishes a key waits for another one that did; one without a key, or with another one, does not.
func TestKeyLock(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	unlocked, err := outbox.New(outbox.Config{Source: "//s", NoKeyLock: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	first, err := pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Rollback(ctx)
	if err := ob.In(first).Publish(ctx, message("first", "a")); err != nil {
		t.Fatal(err)
	}
	many := messages(150)
	many[17] = message("17", "a")
	for name, c := range map[string]struct {
		ob    *outbox.Outbox
		msgs  []*postrider.Message
		waits bool
	}{
		"same key":                      {ob, []*postrider.Message{message("2", "a")}, true},
		"same key of many":              {ob, many, true},
		"other key":                     {ob, []*postrider.Message{message("3", "b")}, false},
		"no key":                        {ob, []*postrider.Message{message("4", "")}, false},
		"same key, lock switched off":   {unlocked, []*postrider.Message{message("5", "a")}, false},
		"same key among some, in a row": {ob, []*postrider.Message{message("6", "b"), message("7", "a")}, true},
	} {
		err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, `set local lock_timeout = '20ms'`); err != nil {
				return err
			}
			return c.ob.In(tx).Publish(ctx, c.msgs...)
		})
		if waited := err != nil && strings.Contains(err.Error(), "55P03"); waited != c.waits || err != nil && !waited {
			t.Errorf("%s: waits %v, want %v (%v)", name, waited, c.waits, err)
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	t.Parallel()
	for _, cfg := range []outbox.Config{
		{}, {Source: "%zz"}, {Source: "//s", Schema: "Bad Name"},
	} {
		if _, err := outbox.New(cfg); !errors.Is(err, postrider.InvalidArgument) || !strings.Contains(err.Error(), "Config.S") {
			t.Errorf("New(%+v): %v, want InvalidArgument that names the field", cfg, err)
		}
	}
	ob, err := outbox.New(outbox.Config{Source: "//s"})
	if err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]outbox.RelayConfig{
		"Outbox":       {},
		"BatchSize":    {Outbox: ob, BatchSize: 10_001},
		"PollInterval": {Outbox: ob, PollInterval: -1},
		"LeaseTTL":     {Outbox: ob, LeaseTTL: time.Millisecond},
		"Retain":       {Outbox: ob, Retain: time.Millisecond},
		"DrainTimeout": {Outbox: ob, DrainTimeout: -1},
	} {
		if _, err := outbox.NewRelay(nil, nil, cfg); !errors.Is(err, postrider.InvalidArgument) || !strings.Contains(err.Error(), "RelayConfig."+name) {
			t.Errorf("%s: %v, want InvalidArgument that names the field", name, err)
		}
	}
}
