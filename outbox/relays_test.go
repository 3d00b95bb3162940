package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// tenants are outboxes in schemas of their own.
func tenants(t *testing.T, n int) (*pgxpool.Pool, []*outbox.Outbox) {
	t.Helper()
	pool := postridertest.Postgres(t)
	var obs []*outbox.Outbox
	for i := range n {
		schema := fmt.Sprint("tenant_", i)
		if err := outbox.Migrate(t.Context(), pool, schema); err != nil {
			t.Fatal(err)
		}
		ob, err := outbox.New(outbox.Config{Source: "//" + schema, Schema: schema})
		if err != nil {
			t.Fatal(err)
		}
		obs = append(obs, ob)
	}
	return pool, obs
}

// startRelays runs relays for all of them, until the end of the test at the latest.
func startRelays(t *testing.T, pool *pgxpool.Pool, b *broker, obs []*outbox.Outbox, connections int) (*outbox.Relays, func()) {
	t.Helper()
	cfg := quick(nil)
	cfg.Logger = postridertest.Logger(t)
	relays, err := outbox.NewRelays(pool, b, outbox.RelaysConfig{Outboxes: obs, Connections: connections, Relay: cfg})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- relays.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return relays, stop
}

// wantRest waits until nobody serves any of them, with nothing left.
func wantRest(t *testing.T, pool *pgxpool.Pool, obs []*outbox.Outbox) {
	t.Helper()
	for _, ob := range obs {
		wantStatus(t, pool, ob, func(s outbox.Status) bool { return s.Depth == 0 && s.Leader == "" })
	}
}

func TestRelaysServeManySchemas(t *testing.T) {
	t.Parallel()
	pool, obs := tenants(t, 8)
	b := &broker{}
	first, stop := startRelays(t, clonePool(t, pool, func(c *pgxpool.Config) { c.MaxConns = 3 }), b, obs, 2)
	second, _ := startRelays(t, clonePool(t, pool, func(c *pgxpool.Config) { c.MaxConns = 3 }), b, obs, 2)
	const rounds = 6
	var want []string
	for round := range rounds {
		for i, ob := range obs {
			m := message(fmt.Sprintf("%d-%d", i, round), fmt.Sprint("key", i))
			publish(t, pool, ob, m)
			want = append(want, m.ID)
		}
	}
	check := func() {
		t.Helper()
		postridertest.Eventually(t, func() error {
			if got := b.ids(); len(got) != len(want) {
				return fmt.Errorf("%d of %d accepted", len(got), len(want))
			}
			return nil
		})
		for i := range obs {
			mine := func(ids []string) []string {
				return slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return !strings.HasPrefix(id, fmt.Sprint(i, "-")) })
			}
			if got := mine(b.ids()); !slices.Equal(got, mine(want)) {
				t.Errorf("tenant %d: %q", i, got)
			}
		}
	}
	check()
	wantRest(t, pool, obs)
	var sum uint64
	for _, ob := range obs {
		sum += first.Stats(ob).Published + second.Stats(ob).Published
	}
	if sum != uint64(len(want)) || b.repeated != 0 {
		t.Errorf("%d published, %d twice, want %d", sum, b.repeated, len(want))
	}
	stop()
	for i := range obs { // by others, who wake nobody
		if _, err := pool.Exec(t.Context(), fmt.Sprintf(`insert into tenant_%d.postrider_outbox (topic, data) values ('x.v1', 'x')`, i)); err != nil {
			t.Fatal(err)
		}
	}
	postridertest.Eventually(t, func() error {
		if n := len(b.ids()); n != len(want)+len(obs) {
			return fmt.Errorf("%d accepted", n)
		}
		return nil
	})
	wantRest(t, pool, obs)
}

// An outbox that is never quiet leaves turns to the others, and one that is paused or led by another relay takes none.
func TestRelaysTakeTurns(t *testing.T) {
	t.Parallel()
	pool, obs := tenants(t, 4)
	ctx, b := t.Context(), &broker{}
	if err := obs[2].Pause(ctx, pool, clerk); err != nil {
		t.Fatal(err)
	}
	alone, _ := start(t, pool, b, quick(obs[3]))
	postridertest.Eventually(t, func() error {
		if !alone.Stats().Leading {
			return errors.New("the relay does not lead")
		}
		return nil
	})
	relays, _ := startRelays(t, pool, b, obs, 1)
	heard := func(id string) bool { return slices.Contains(b.ids(), id) }
	publish(t, pool, obs[2], message("paused", ""))
	publish(t, pool, obs[3], message("another's", ""))
	published := 0
	for ; published < 10 || !heard("quiet"); published++ {
		publish(t, pool, obs[0], message(fmt.Sprint("busy ", published), ""))
		if published == 5 {
			publish(t, pool, obs[1], message("quiet", ""))
		}
		if published > 100_000 {
			t.Fatal("the other outbox has no turn")
		}
	}
	wantRest(t, pool, obs[:2])
	if n := relays.Stats(obs[0]).Published; n != uint64(published) {
		t.Errorf("%d published, want %d", n, published)
	}
	if heard("paused") {
		t.Error("sent though it is paused")
	}
	if err := obs[2].Resume(ctx, pool, clerk); err != nil {
		t.Fatal(err)
	}
	postridertest.Eventually(t, func() error {
		if !heard("paused") || !heard("another's") || alone.Stats().Published != 1 || relays.Stats(obs[3]).Published != 0 {
			return fmt.Errorf("accepted %q", clip(b.ids()))
		}
		return nil
	})
}

// What a transaction that was open before commits is found while the outbox rests, and so is what a dead relay left.
func TestRelaysFindWhatIsLate(t *testing.T) {
	t.Parallel()
	pool, obs := tenants(t, 2)
	ctx, b := t.Context(), &broker{}
	startRelays(t, pool, b, obs, 2)
	held, err := pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Rollback(context.WithoutCancel(ctx))
	if err := obs[0].In(held).Publish(ctx, message("late", "")); err != nil {
		t.Fatal(err)
	}
	publish(t, pool, obs[0], message("first", ""))
	wantIDs(t, b, "first")
	wantRest(t, pool, obs)
	if err := held.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	wantIDs(t, b, "first", "late")
	if _, err := pool.Exec(ctx, `update tenant_1.postrider_outbox_relay set owner = 'dead', expires = clock_timestamp() + interval '1 s'`); err != nil {
		t.Fatal(err)
	}
	publish(t, pool, obs[1], message("left", ""))
	wantIDs(t, b, "first", "late", "left")
	wantRest(t, pool, obs)
}

func TestRelaysAreChecked(t *testing.T) {
	t.Parallel()
	pool := postridertest.Postgres(t)
	ob, err := outbox.New(outbox.Config{Source: "//s"})
	if err != nil {
		t.Fatal(err)
	}
	one := []*outbox.Outbox{ob}
	for _, cfg := range []outbox.RelaysConfig{
		{},
		{Outboxes: []*outbox.Outbox{nil}},
		{Outboxes: []*outbox.Outbox{ob, ob}},
		{Outboxes: one, Connections: -1},
		{Outboxes: one, Relay: outbox.RelayConfig{Outbox: ob}},
		{Outboxes: one, Relay: outbox.RelayConfig{BatchSize: -1}},
	} {
		_, err := outbox.NewRelays(pool, &broker{}, cfg)
		wantCode(t, err, postrider.InvalidArgument)
	}
	relays, err := outbox.NewRelays(pool, &broker{}, outbox.RelaysConfig{Outboxes: one})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	wantCode(t, relays.Run(ctx), postrider.FailedPrecondition)
}
