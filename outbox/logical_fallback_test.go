package outbox_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// What comes by logical replication is what the tables hold, whatever is missing on the way the tables are read, and no slot stays
// behind.
func TestLogical(t *testing.T) {
	t.Parallel()
	server := logicalServer(t)
	for name, test := range map[string]func(*testing.T, *pgxpool.Pool, outbox.RelayConfig){
		"values":               testLogicalValues,
		"large transaction":    testLogicalLargeTransaction,
		"orderly stop":         testLogicalOrderlyStop,
		"paused":               testLogicalPaused,
		"too much WAL":         testLogicalTooMuchWAL,
		"publication altered":  testLogicalPublicationAltered,
		"publication unseen":   testLogicalPublicationUnseen,
		"publication not ours": testLogicalPublicationNotOurs,
		"unlogged":             testLogicalUnlogged,
		"no right":             testLogicalNoRight,
		"wrong database":       testLogicalWrongDatabase,
		"publisher stuck":      testLogicalPublisherStuck,
		"must be":              testLogicalMustBe,
		"long names":           testLogicalLongNames,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool, cfg := logicalSetup(t, server)
			test(t, pool, cfg)
		})
	}
}

// Nulls, empty values, values that are stored out of line, keys, rows of SQL clients.
func testLogicalValues(t *testing.T, pool *pgxpool.Pool, cfg outbox.RelayConfig) {
	t.Helper()
	read, streamed := &broker{}, &broker{}
	publishAll := func() {
		large := message("large", "key")
		large.Data = []byte(`"` + strings.Repeat("x\x00y€", 100_000) + `"`)
		empty := message("empty", "")
		empty.Data = nil
		publish(t, pool, cfg.Outbox, message("ä", "ключ"), large, empty)
		if _, err := pool.Exec(t.Context(), `insert into postrider.postrider_outbox (topic, data) values ('orders.placed.v1', '{}'), ('x', null), ('y', '')`); err != nil {
			t.Fatal(err)
		}
	}
	relay, stop := start(t, pool, streamed, cfg)
	wantLogical(t, relay, true)
	publishAll()
	postridertest.Eventually(t, func() error {
		if n := len(streamed.copy()); n != 6 {
			return fmt.Errorf("%d messages came", n)
		}
		return nil
	})
	if s := relay.Stats(); s.Lag != 0 && s.Depth > 6 {
		t.Errorf("stats %+v", s)
	}
	stop()

	// The same rows, from the tables.
	if _, err := pool.Exec(t.Context(), `update postrider.postrider_outbox_relay set prev = '1:1:', cur = null, last = 0, floor = 0, floors = '{}'`); err != nil {
		t.Fatal(err)
	}
	cfg.Logical.Mode = outbox.LogicalOff
	start(t, pool, read, cfg)
	postridertest.Eventually(t, func() error {
		if n := len(read.copy()); n != 6 {
			return fmt.Errorf("%d messages were read", n)
		}
		return nil
	})
	for i, want := range read.copy() {
		got := streamed.copy()[i]
		if a, b := fmt.Sprintf("%+v", *got), fmt.Sprintf("%+v", *want); a != b {
			t.Errorf("by logical replication %.300s\nfrom the tables %.300s", a, b)
		}
	}
}

// One transaction of more than may be in memory, in messages and in bytes, between two small ones.
func testLogicalLargeTransaction(t *testing.T, pool *pgxpool.Pool, cfg outbox.RelayConfig) {
	t.Helper()
	cfg.BatchSize = 10
	b := &broker{}
	relay, _ := start(t, pool, b, cfg)
	wantLogical(t, relay, true)
	msgs := messages(302)
	for _, m := range msgs[200:220] {
		m.Data = make([]byte, 900_000)
	}
	publish(t, pool, cfg.Outbox, msgs[0])
	publish(t, pool, cfg.Outbox, msgs[1:301]...)
	publish(t, pool, cfg.Outbox, msgs[301])
	wantIDs(t, b, ids(msgs)...)
	if b.repeated != 0 || !relay.Stats().Logical {
		t.Errorf("%d repeated, stats %+v: want all by logical replication", b.repeated, relay.Stats())
	}
}

// After a stop in order nothing is repeated, and there is no slot.
func testLogicalOrderlyStop(t *testing.T, pool *pgxpool.Pool, cfg outbox.RelayConfig) {
	t.Helper()
	b := &broker{}
	var want []string
	for i := range 3 {
		relay, stop := start(t, pool, b, cfg)
		wantLogical(t, relay, true)
		for j := range 5 {
			msgs := batch(100*i+10*j, 10)
			publish(t, pool, cfg.Outbox, msgs...)
			want = append(want, ids(msgs)...)
		}
		wantIDs(t, b, want...)
		// The cursor covers them soon, without another message.
		wantRows(t, pool, `postrider.postrider_outbox as o, postrider.postrider_outbox_relay as r where not pg_visible_in_snapshot(o.xid, r.prev)`, 0)
		stop()
		wantSlots(t, pool, 0)
		if relay.Stats().Logical {
			t.Error("logical replication goes on after Run")
		}
	}
	if b.repeated != 0 {
		t.Errorf("%d messages were sent again", b.repeated)
	}
}

func testLogicalPaused(t *testing.T, pool *pgxpool.Pool, cfg outbox.RelayConfig) {
	t.Helper()
	b := &broker{}
	relay, _ := start(t, pool, b, cfg)
	wantLogical(t, relay, true)
	action := outbox.Action{By: "test", Why: "test"}
	if err := cfg.Outbox.Pause(t.Context(), pool, action); err != nil {
		t.Fatal(err)
	}
	wantLogical(t, relay, false)
	wantSlots(t, pool, 0)
	msgs := messages(10)
	publish(t, pool, cfg.Outbox, msgs...)
	if err := cfg.Outbox.Resume(t.Context(), pool, action); err != nil {
		t.Fatal(err)
	}
	wantIDs(t, b, ids(msgs)...)
	wantLogical(t, relay, true)
}

// A slot that keeps too much is dropped, messages go on to be sent, and there is a new slot then.
func testLogicalTooMuchWAL(t *testing.T, pool *pgxpool.Pool, cfg outbox.RelayConfig) {
	t.Helper()
	b := &broker{}
	cfg.Logical.MaxRetained = 4 << 20
	relay, _ := start(t, pool, b, cfg)
	wantLogical(t, relay, true)
	old := slot(t, pool)
	msgs := messages(80)
	for i := range 8 {
		publish(t, pool, cfg.Outbox, msgs[10*i:10*i+10]...)
		if _, err := pool.Exec(t.Context(), `select pg_logical_emit_message(false, 'test', repeat('x', 1000000))`); err != nil {
			t.Fatal(err)
		}
	}
	wantIDs(t, b, ids(msgs)...)
	wantRows(t, pool, `pg_replication_slots where slot_name = '`+old+`'`, 0)
	wantLogical(t, relay, true)
	wantSlots(t, pool, 1)
}

// A publication that somebody changes hides messages from the feed: they are read from the tables.
func testLogicalPublicationAltered(t *testing.T, pool *pgxpool.Pool, cfg outbox.RelayConfig) {
	t.Helper()
	b := &broker{}
	relay, stop := start(t, pool, b, cfg)
	exec := func(sql string) {
		t.Helper()
		if _, err := pool.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	msgs := messages(40)
	for i, change := range []string{
		`alter publication postrider_outbox_postrider set (publish = 'update')`,
		`alter publication postrider_outbox_postrider set (publish_via_partition_root = false)`,
		`alter publication postrider_outbox_postrider drop table postrider.postrider_outbox`,
		`drop publication postrider_outbox_postrider`,
	} {
		wantLogical(t, relay, true)
		exec(change)
		publish(t, pool, cfg.Outbox, msgs[10*i:10*i+10]...)
		wantIDs(t, b, ids(msgs[:10*i+10])...)
		wantRows(t, pool, `postrider.postrider_outbox as o, postrider.postrider_outbox_relay as r where not pg_visible_in_snapshot(o.xid, r.prev)`, 0)
		wantLogical(t, relay, false)
		exec(`drop publication if exists postrider_outbox_postrider`)
	}
	wantLogical(t, relay, true)
	stop()
	sql, err := outbox.MigrateDownSQL("")
	if err != nil {
		t.Fatal(err)
	}
	exec(sql)
	wantRows(t, pool, "pg_publication", 0)
	if err := outbox.Migrate(t.Context(), pool, ""); err != nil {
		t.Fatal(err)
	}
	_, stop = start(t, pool, b, cfg)
	wantRows(t, pool, "pg_publication", 1)
	stop()
	if err := outbox.MigrateDown(t.Context(), pool, ""); err != nil {
		t.Fatal(err)
	}
	wantRows(t, pool, "pg_publication", 0)
}

// The publication is altered by a transaction whose commit is in the WAL, where the feed goes by it, and which no snapshot sees yet.
func testLogicalPublicationUnseen(t *testing.T, pool *pgxpool.Pool, cfg outbox.RelayConfig) {
	t.Helper()
	b := &broker{}
	relay, _ := start(t, pool, b, cfg)
	msgs := messages(30)
	for i, change := range []string{
		`alter publication postrider_outbox_postrider set (publish = 'update')`,
		`alter publication postrider_outbox_postrider drop table postrider.postrider_outbox`,
	} {
		wantLogical(t, relay, true)
		const waits = `pg_stat_activity where datname = current_database() and wait_event = 'SyncRep'`
		altered := make(chan error, 1)
		go func() {
			_, err := pool.Exec(t.Context(), `begin; set local synchronous_commit = on; `+change+`; commit`)
			altered <- err
		}()
		wantRows(t, pool, waits, 1)
		publish(t, pool, cfg.Outbox, msgs[10*i:10*i+10]...)
		wantIDs(t, b, ids(msgs[:10*i+10])...)
		wantRows(t, pool, waits, 1)
		execute(t, pool, `select pg_cancel_backend(pid) from `+waits)
		if err := <-altered; err != nil {
			t.Fatal(err)
		}
		execute(t, pool, `drop publication if exists postrider_outbox_postrider`)
	}
	wantLogical(t, relay, true)
	publish(t, pool, cfg.Outbox, msgs[20:]...)
	wantIDs(t, b, ids(msgs)...)
}

// What goes to a table without WAL does not come through the feed.
func testLogicalUnlogged(t *testing.T, pool *pgxpool.Pool, cfg outbox.RelayConfig) {
	t.Helper()
	b := &broker{}
	relay, _ := start(t, pool, b, cfg)
	wantLogical(t, relay, true)
	for i := range 3 {
		execute(t, pool, fmt.Sprintf(`alter table postrider.postrider_outbox_%d set unlogged`, i))
	}
	msgs := messages(10)
	publish(t, pool, cfg.Outbox, msgs...)
	wantIDs(t, b, ids(msgs)...)
	wantLogical(t, relay, false)
}

func testLogicalPublicationNotOurs(t *testing.T, pool *pgxpool.Pool, cfg outbox.RelayConfig) {
	t.Helper()
	ctx := t.Context()
	if _, err := pool.Exec(ctx, `create publication postrider_outbox_postrider for all tables`); err != nil {
		t.Fatal(err)
	}
	b := &broker{}
	relay, _ := start(t, pool, b, cfg)
	msgs := messages(20)
	publish(t, pool, cfg.Outbox, msgs[:10]...)
	wantIDs(t, b, ids(msgs[:10])...)
	if _, err := pool.Exec(ctx, `drop publication postrider_outbox_postrider;
		create publication postrider_outbox_postrider for table postrider.postrider_outbox, ledger
			with (publish = 'insert', publish_via_partition_root = true)`); err != nil {
		t.Fatal(err)
	}
	wantLogical(t, relay, true)
	if _, err := pool.Exec(ctx, `insert into ledger (key) values ('another table')`); err != nil {
		t.Fatal(err)
	}
	publish(t, pool, cfg.Outbox, msgs[10:]...)
	wantIDs(t, b, ids(msgs)...)
	if !relay.Stats().Logical {
		t.Error("rows of another table end the replication")
	}
}

// A role without REPLICATION.
func testLogicalNoRight(t *testing.T, pool *pgxpool.Pool, cfg outbox.RelayConfig) {
	t.Helper()
	ctx := t.Context()
	role := "plain_" + strings.ReplaceAll(postrider.NewID(), "-", "_")
	if _, err := pool.Exec(ctx, `create role `+role+` login password 'secret'; grant usage on schema postrider to `+role+`;
		grant all on all tables in schema postrider to `+role+`; grant all on all sequences in schema postrider to `+role); err != nil {
		t.Fatal(err)
	}
	limited := clonePool(t, pool, func(cfg *pgxpool.Config) { cfg.ConnConfig.User, cfg.ConnConfig.Password = role, "secret" })
	b := &broker{}
	relay, _ := start(t, limited, b, cfg)
	msgs := messages(20)
	publish(t, pool, cfg.Outbox, msgs[:10]...)
	wantIDs(t, b, ids(msgs[:10])...)
	if relay.Stats().Logical {
		t.Error("logical replication without the right to it")
	}
	if _, err := pool.Exec(ctx, `alter role `+role+` replication; create publication postrider_outbox_postrider
		for table postrider.postrider_outbox with (publish = 'insert', publish_via_partition_root = true)`); err != nil {
		t.Fatal(err)
	}
	wantLogical(t, relay, true)
	publish(t, pool, cfg.Outbox, msgs[10:]...)
	wantIDs(t, b, ids(msgs)...)
}

// An address of another database: it has an outbox too, and the role may replicate there.
func testLogicalWrongDatabase(t *testing.T, pool *pgxpool.Pool, cfg outbox.RelayConfig) {
	t.Helper()
	right := pool.Config().ConnConfig.Database
	wrong := right + "_b"
	if _, err := pool.Exec(t.Context(), `create database `+wrong); err != nil {
		t.Fatal(err)
	}
	other := clonePool(t, pool, func(cfg *pgxpool.Config) { cfg.ConnConfig.Database = wrong })
	if err := outbox.Migrate(t.Context(), other, ""); err != nil {
		t.Fatal(err)
	}
	var log logs
	cfg.Logical.URL, cfg.Logger = databaseURL(other), slog.New(slog.NewTextHandler(&log, nil))
	b := &broker{}
	relay, _ := start(t, pool, b, cfg)
	msgs := messages(20)
	publish(t, pool, cfg.Outbox, msgs[:10]...)
	wantIDs(t, b, ids(msgs[:10])...)
	postridertest.Eventually(t, func() error {
		if text := log.text(); !strings.Contains(text, "cannot import a snapshot from a different database") {
			return fmt.Errorf("logged %s", text)
		}
		return nil
	})
	publish(t, pool, cfg.Outbox, msgs[10:]...)
	wantIDs(t, b, ids(msgs)...)
	if relay.Stats().Logical {
		t.Error("logical replication from another database")
	}
}

// logs keeps what is logged.
type logs struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (l *logs) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(line)
}

func (l *logs) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

// databaseURL is the address of a pool of logicalSetup.
func databaseURL(pool *pgxpool.Pool) string {
	return strings.Replace(pool.Config().ConnString(), "/postgres?", "/"+pool.Config().ConnConfig.Database+"?", 1)
}

// A publisher that takes nothing: the slot would keep the WAL, and the server from shutting down.
func testLogicalPublisherStuck(t *testing.T, pool *pgxpool.Pool, cfg outbox.RelayConfig) {
	t.Helper()
	b := &broker{}
	cfg.BatchSize = 10
	relay, _ := start(t, pool, b, cfg)
	wantLogical(t, relay, true)
	b.set(func(b *broker) {
		b.before = func([]*postrider.Message) error { return postrider.Errorf(postrider.Unavailable, "no broker") }
	})
	msgs := messages(200)
	publish(t, pool, cfg.Outbox, msgs...)
	wantLogical(t, relay, false)
	wantSlots(t, pool, 0)
	b.set(func(b *broker) { b.before = nil })
	wantIDs(t, b, ids(msgs)...)
	wantLogical(t, relay, true)
}

// LogicalOn is an error where somebody must do something first.
func testLogicalMustBe(t *testing.T, pool *pgxpool.Pool, cfg outbox.RelayConfig) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cfg.Logical.Mode = outbox.LogicalOn
	want := func(in *pgxpool.Pool, text string) {
		t.Helper()
		relay, err := outbox.NewRelay(in, &broker{}, cfg)
		if err != nil {
			t.Fatal(err)
		}
		err = relay.Run(ctx)
		if wantCode(t, err, postrider.FailedPrecondition); !strings.Contains(err.Error(), text) {
			t.Errorf("%v: want %q in it", err, text)
		}
	}
	role := "mute_" + strings.ReplaceAll(postrider.NewID(), "-", "_")
	execute(t, pool, `create role `+role+` login password 'secret'; grant all on schema postrider to `+role+`;
		grant all on all tables in schema postrider to `+role+`; grant all on all sequences in schema postrider to `+role)
	limited := clonePool(t, pool, func(cfg *pgxpool.Config) { cfg.ConnConfig.User, cfg.ConnConfig.Password = role, "secret" })
	want(limited, "ALTER ROLE ... REPLICATION")
	execute(t, pool, `alter role `+role+` replication`)
	want(limited, "make publication")
	execute(t, pool, `create publication postrider_outbox_postrider for all tables`)
	want(pool, "drop it")
	execute(t, pool, `drop publication postrider_outbox_postrider`)
	relay, _ := start(t, pool, &broker{}, cfg)
	wantLogical(t, relay, true)
	execute(t, pool, `alter publication postrider_outbox_postrider set (publish = 'delete')`)
	wantLogical(t, relay, false)
	wantStatus(t, pool, cfg.Outbox, func(s outbox.Status) bool { return strings.Contains(s.LastError, "no logical replication: ") })
}

// Schemas whose names differ behind what a publication's name has room for.
func testLogicalLongNames(t *testing.T, pool *pgxpool.Pool, cfg outbox.RelayConfig) {
	t.Helper()
	for i := range 2 {
		schema := strings.Repeat("s", 62) + fmt.Sprint(i)
		if err := outbox.Migrate(t.Context(), pool, schema); err != nil {
			t.Fatal(err)
		}
		ob, err := outbox.New(outbox.Config{Source: "//shop/orders", Schema: schema})
		if err != nil {
			t.Fatal(err)
		}
		cfg.Outbox, cfg.Logical.Mode = ob, outbox.LogicalOn
		b := &broker{}
		relay, _ := start(t, pool, b, cfg)
		wantLogical(t, relay, true)
		publish(t, pool, ob, message("1", "key"))
		wantIDs(t, b, "1")
	}
}

// What was committed before the slot's beginning and not read by then comes from the tables, what was read by then does not come
// again.
func TestLogicalBeginning(t *testing.T) {
	t.Parallel()
	server := logicalServer(t)
	pool, cfg := logicalSetup(t, server)
	release := holdSlots(t, server)
	gate := make(chan struct{})
	b := &broker{before: func([]*postrider.Message) error { <-gate; return nil }}
	cfg.BatchSize = 1
	relay, _ := start(t, pool, b, cfg)
	wantSlots(t, pool, 1) // being made
	msgs := messages(30)
	publish(t, pool, cfg.Outbox, msgs[0])
	postridertest.Eventually(t, func() error {
		if relay.Stats().Lag == 0 {
			return errors.New("nothing was read")
		}
		return nil
	})
	for _, m := range msgs[1:20] { // of which, with the gate closed, nothing is read
		publish(t, pool, cfg.Outbox, m)
	}
	release()
	wantLogical(t, relay, true)
	for _, m := range msgs[20:] {
		publish(t, pool, cfg.Outbox, m)
	}
	close(gate)
	wantIDs(t, b, ids(msgs)...)
	if b.repeated != 0 || !relay.Stats().Logical {
		t.Errorf("%d repeated, stats %+v", b.repeated, relay.Stats())
	}
}

// holdSlots opens a transaction in another database, for the end of which every new slot waits.
func holdSlots(t *testing.T, server *postridertest.PostgresServer) (release func()) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	tx, err := server.Pool().Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(ctx, `select pg_current_xact_id()`); err != nil {
		t.Fatal(err)
	}
	release = sync.OnceFunc(func() {
		if err := tx.Rollback(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(release)
	return release
}

// A transaction left open keeps a slot from being made, not a message from being sent; and a server without wal_level=logical
// serves as well.
func TestLogicalServer(t *testing.T) {
	t.Parallel()
	server := logicalServer(t)
	pool, cfg := logicalSetup(t, server)
	ctx := t.Context()
	release := holdSlots(t, server)
	b := &broker{}
	relay, _ := start(t, pool, b, cfg)
	msgs := messages(60)
	wantSlots(t, pool, 1) // being made
	publish(t, pool, cfg.Outbox, msgs[:10]...)
	wantIDs(t, b, ids(msgs[:10])...)
	wantSlots(t, pool, 0) // given up
	publish(t, pool, cfg.Outbox, msgs[10:20]...)
	wantIDs(t, b, ids(msgs[:20])...)
	if relay.Stats().Logical {
		t.Error("a slot was made: the test shows nothing")
	}
	release()
	wantLogical(t, relay, true)
	publish(t, pool, cfg.Outbox, msgs[20:30]...)
	wantIDs(t, b, ids(msgs[:30])...)

	alterServer(t, server, "wal_level = replica")
	postridertest.Eventually(t, func() error { return pool.Ping(ctx) })
	must := cfg
	must.Logical.Mode = outbox.LogicalOn
	if other, err := outbox.NewRelay(pool, b, must); err != nil {
		t.Fatal(err)
	} else if err = other.Run(ctx); !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), "wal_level") {
		t.Errorf("LogicalOn: %v", err)
	}
	publish(t, pool, cfg.Outbox, msgs[30:40]...)
	wantIDs(t, b, ids(msgs[:40])...)
	if relay.Stats().Logical {
		t.Error("logical replication without wal_level=logical")
	}
	alterServer(t, server, "wal_level = logical")
	postridertest.Eventually(t, func() error { return pool.Ping(ctx) })
	publish(t, pool, cfg.Outbox, msgs[40:50]...)
	wantIDs(t, b, ids(msgs[:50])...)
	wantLogical(t, relay, true)
	server.Kill() // the slot goes with it
	server.Start()
	postridertest.Eventually(t, func() error {
		if err := pool.Ping(ctx); err != nil {
			return err
		}
		if !relay.Stats().Leading {
			return errors.New("nobody leads")
		}
		return nil
	})
	publish(t, pool, cfg.Outbox, msgs[50:]...)
	wantIDs(t, b, ids(msgs)...)
	wantLogical(t, relay, true)
	wantSlots(t, pool, 1)
}
