package outbox_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// logicalServer is a PostgreSQL of the test's own with wal_level=logical. Who sets synchronous_commit to on there waits with a commit
// until it is cancelled: it is in the WAL, and nobody sees it.
func logicalServer(t testing.TB) *postridertest.PostgresServer {
	t.Helper()
	server := postridertest.NewPostgres(t)
	alterServer(t, server, "wal_level = logical", "synchronous_commit = local", "synchronous_standby_names = 'nobody'")
	return server
}

// alterServer restarts the server with other settings.
func alterServer(t testing.TB, server *postridertest.PostgresServer, settings ...string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	for _, setting := range settings {
		if _, err := conn.Exec(t.Context(), `alter system set `+setting); err != nil {
			t.Fatal(err)
		}
	}
	server.Stop()
	server.Start()
}

// logicalSetup returns a database of the server with an outbox, and a relay's configuration.
func logicalSetup(t testing.TB, server *postridertest.PostgresServer) (*pgxpool.Pool, outbox.RelayConfig) {
	t.Helper()
	ctx, admin := context.WithoutCancel(t.Context()), server.Pool()
	name := "logical_" + strings.ReplaceAll(postrider.NewID(), "-", "_")
	if _, err := admin.Exec(ctx, `create database `+name); err != nil {
		t.Fatal(err)
	}
	pool := clonePool(t, admin, func(cfg *pgxpool.Config) { cfg.ConnConfig.Database, cfg.MaxConns = name, proofWriters+4 })
	if err := outbox.Migrate(ctx, pool, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(ctx, `create table ledger (n bigserial primary key, key text, id text)`); err != nil {
		t.Fatal(err)
	}
	ob, err := outbox.New(outbox.Config{Source: "//shop/orders"})
	if err != nil {
		t.Fatal(err)
	}
	cfg := quick(ob)
	cfg.Logical.Mode = outbox.LogicalAuto
	return pool, cfg
}

func wantLogical(t testing.TB, relay *outbox.Relay, want bool) {
	t.Helper()
	postridertest.Eventually(t, func() error {
		if got := relay.Stats().Logical; got != want {
			return fmt.Errorf("logical replication %v, want %v", got, want)
		}
		return nil
	})
}

// wantSlots counts the slots of the database, wanting all that are there to be temporary.
func wantSlots(t testing.TB, pool *pgxpool.Pool, want int) {
	t.Helper()
	wantRows(t, pool, "pg_replication_slots where database = current_database()", want)
	wantRows(t, pool, "pg_replication_slots where database = current_database() and not temporary", 0)
}

// slot is the name of the database's only one.
func slot(t testing.TB, pool *pgxpool.Pool) (name string) {
	t.Helper()
	err := pool.QueryRow(t.Context(), `select slot_name from pg_replication_slots where database = current_database()`).Scan(&name)
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// batch returns messages with ids from "first".
func batch(first, n int) []*postrider.Message {
	return messages(first + n)[first:]
}

// wantProof checks what was accepted against the ledger, once all is there.
func wantProof(t testing.TB, pool *pgxpool.Pool, b *broker) (committed int) {
	t.Helper()
	want := ledger(t, pool)
	for _, ids := range want {
		committed += len(ids)
	}
	postridertest.Eventually(t, func() error {
		if n := len(b.ids()); n < committed {
			return fmt.Errorf("%d of %d messages sent", n, committed)
		}
		return nil
	})
	if lost, ghosts, wrongOrder := audit(b.copy(), want); lost > 0 || ghosts > 0 || len(wrongOrder) > 0 {
		t.Errorf("%d lost, %d that were rolled back, order broken of %q", lost, ghosts, wrongOrder)
	}
	return committed
}

// The proof run by logical replication: the connection of the feed and those of the relay break all the time, slots are made among
// open transactions, the ring is truncated, and two relays take over from each other.
func TestLogicalProof(t *testing.T) {
	t.Parallel()
	server := logicalServer(t)
	pool, cfg := logicalSetup(t, server)
	relays, crash := relayPool(t, pool)
	ctx := context.WithoutCancel(t.Context())
	crashes, drops := 0, 0
	rnd := rand.New(rand.NewPCG(3, 3))
	b := &broker{}
	b.after = func([]*postrider.Message) {
		switch n := rnd.IntN(200); {
		case n == 0:
			crashes++
			crash()
		case n < 4:
			tag, err := pool.Exec(ctx, `select pg_terminate_backend(active_pid) from pg_replication_slots where active and database = current_database()`)
			if err != nil {
				t.Error(err)
			}
			drops += int(tag.RowsAffected())
		}
	}
	cfg.BatchSize, cfg.Retain = 50, 250*time.Millisecond
	first, _ := start(t, relays, b, cfg)
	wantRows(t, pool, "postrider.postrider_outbox_relay where period = 0.25", 1)
	wantLogical(t, first, true)
	_, stopSecond := start(t, relays, b, cfg)
	writeLoad(t, pool, cfg.Outbox)
	b.set(func(b *broker) { b.after = nil })
	committed := wantProof(t, pool, b)
	stopSecond()
	wantRows(t, pool, "postrider.postrider_outbox", 0)
	if crashes == 0 || drops == 0 {
		t.Errorf("%d crashes, %d feeds broken: the test shows too little", crashes, drops)
	}
	t.Logf("%d committed, %d crashes, %d feeds broken, %d repeated", committed, crashes, drops, b.repeated)
}
