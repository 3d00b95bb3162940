package outbox_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// A transaction left open delays neither the others nor, for longer than it lasts, itself.
func TestOpenTransactionHoldsUpNobody(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx, b := t.Context(), &broker{}
	cfg := quick(ob)
	cfg.Retain = 100 * time.Millisecond
	start(t, pool, b, cfg)
	held, err := pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Rollback(ctx)
	if err := ob.In(held).Publish(ctx, message("held", "")); err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, m := range messages(10) {
		publish(t, pool, ob, m)
		want = append(want, m.ID)
	}
	wantIDs(t, b, want...)
	if err := held.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	wantIDs(t, b, append(want, "held")...)
	wantRows(t, pool, "postrider.postrider_outbox", 0)
}

// The rows of a broker's outage outlive their period.
func TestUnsentRowsAreNotTruncated(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	b := &broker{before: func([]*postrider.Message) error { return postrider.Errorf(postrider.Unavailable, "no broker") }}
	cfg := quick(ob)
	cfg.Retain = 100 * time.Millisecond
	relay, _ := start(t, pool, b, cfg)
	wantRows(t, pool, "postrider.postrider_outbox_relay where period = 0.1", 1)
	publish(t, pool, ob, messages(5)...)
	postridertest.Eventually(t, func() error {
		if lag := relay.Stats().Lag; lag < 10*cfg.Retain {
			return fmt.Errorf("a lag of %v", lag)
		}
		return nil
	})
	wantRows(t, pool, "postrider.postrider_outbox", 5)
	b.set(func(b *broker) { b.before = nil })
	wantIDs(t, b, "0", "1", "2", "3", "4")
	wantRows(t, pool, "postrider.postrider_outbox", 0)
}

// publishFor publishes for some time, waits until the relay has sent it all, and returns how many messages that were.
func publishFor(t *testing.T, pool *pgxpool.Pool, ob *outbox.Outbox, relay *outbox.Relay, d time.Duration) int {
	t.Helper()
	n := 0
	for began := time.Now(); time.Since(began) < d; n++ {
		publish(t, pool, ob, message(fmt.Sprint(n), ""))
	}
	postridertest.Eventually(t, func() error {
		if sent := relay.Stats().Published; sent != uint64(n) {
			return fmt.Errorf("sent %d of %d", sent, n)
		}
		return nil
	})
	return n
}

func TestRetainForEver(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	if _, err := pool.Exec(t.Context(), `
		alter table postrider.postrider_outbox alter slot set default floor(date_part('epoch', clock_timestamp()) / 0.05)::bigint % 3;
		update postrider.postrider_outbox_relay set period = 0.05`); err != nil {
		t.Fatal(err)
	}
	b := &broker{}
	cfg := quick(ob)
	cfg.Retain = -1
	relay, _ := start(t, pool, b, cfg)
	n := publishFor(t, pool, ob, relay, 500*time.Millisecond) // several periods
	wantRows(t, pool, "postrider.postrider_outbox", n)
}

// A role that may write and read but not truncate: messages are sent, the tables stay.
func TestRelayWithoutTheRightToTruncate(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx := t.Context()
	role := "postrider_relay_" + strings.ReplaceAll(postrider.NewID(), "-", "_")
	_, err := pool.Exec(ctx, `create role `+role+`; grant usage on schema postrider to `+role+`;
		grant select, insert, update on all tables in schema postrider to `+role+`;
		grant usage, select on all sequences in schema postrider to `+role)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := pool.Exec(context.WithoutCancel(ctx), `drop owned by `+role+`; drop role `+role); err != nil {
			t.Error(err)
		}
	})
	limited := clonePool(t, pool, func(cfg *pgxpool.Config) { cfg.ConnConfig.RuntimeParams["role"] = role })
	b := &broker{}
	cfg := quick(ob)
	cfg.Retain = 100 * time.Millisecond
	relay, _ := start(t, limited, b, cfg)
	n := publishFor(t, limited, ob, relay, 500*time.Millisecond) // while the relay tries to truncate
	wantRows(t, pool, "postrider.postrider_outbox", n)
	wantRows(t, pool, "postrider.postrider_outbox_relay where fence = 1", 1) // and never lost the lease for it
}
