package outbox_test

import (
	"context"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// Whatever a role or a database has set, migration, all ways to publish, relay, ring, dead letters, status and the view work the same.
func TestOddSettings(t *testing.T) {
	t.Parallel()
	for name, settings := range map[string]map[string]string{
		"repeatable read": {"default_transaction_isolation": "repeatable read"},
		"serializable":    {"default_transaction_isolation": "serializable"},
		"time-outs": {
			"statement_timeout": "5s", "lock_timeout": "2s", "idle_in_transaction_session_timeout": "2s",
		},
		"formats": {
			"timezone": "Asia/Kathmandu", "datestyle": "German, DMY", "intervalstyle": "sql_standard", "bytea_output": "escape",
			"standard_conforming_strings": "off", "extra_float_digits": "-15", "xmlbinary": "hex",
		},
		"no search path": {"search_path": ""},
		"planner":        {"enable_indexscan": "off", "enable_seqscan": "off", "row_security": "off"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			useOutbox(t, clonePool(t, postridertest.Postgres(t), func(cfg *pgxpool.Config) {
				maps.Copy(cfg.ConnConfig.RuntimeParams, settings)
			}))
		})
	}
}

// useOutbox uses all of an outbox through a pool.
func useOutbox(t *testing.T, pool *pgxpool.Pool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(outbox.Migrate(ctx, pool, ""))
	ob, err := outbox.New(outbox.Config{Source: "//shop/orders", MaxDepth: 1_000_000})
	must(err)
	b := &broker{refuse: func(m *postrider.Message) error {
		if m.ID == "poison" {
			return postrider.Permanent(fmt.Errorf("%s", m.ID))
		}
		return nil
	}}
	cfg := quick(ob)
	cfg.Listen = pool // a pool of one has no connection for it
	_, stop := start(t, pool, b, cfg)
	n := 1
	must(publishAs(ctx, pool, ob, message("poison", "key")))
	for name, way := range waysToPublish {
		for _, count := range []int{1, 3, 120} {
			msgs := make([]*postrider.Message, count)
			for i := range msgs {
				msgs[i] = message(fmt.Sprintf("%s %d %03d", name, count, i), "key")
			}
			must(way(ctx, pool, ob, msgs))
			n += count
		}
	}
	wantStatus(t, pool, ob, func(s outbox.Status) bool { return s.Depth == 0 && s.Sent == int64(n-1) && s.Dead == 1 })
	sent := b.copy()
	for i, m := range sent[1:] {
		if before := sent[i].ID; len(before) == len(m.ID) && before[:len(before)-3] == m.ID[:len(m.ID)-3] && before >= m.ID {
			t.Errorf("%s comes before %s", before, m.ID)
		}
	}
	report, err := outbox.Audit(ctx, pool, ob, outbox.AuditConfig{Streams: []iter.Seq2[*postrider.Message, error]{
		func(yield func(*postrider.Message, error) bool) {
			for _, m := range sent {
				if !yield(m, nil) {
					return
				}
			}
		},
	}})
	if must(err); !report.OK() || report.Delivered != n-1 {
		t.Error(report)
	}
	wantRows(t, pool, "postrider.postrider_outbox_events where aggregateid = 'key' and id <> ''", n)
	resent, err := ob.Resend(ctx, pool, outbox.Filter{Topic: "orders.>"}, true, clerk)
	if must(err); resent != n-1 {
		t.Errorf("%d were resent, want %d", resent, n-1)
	}
	b.set(func(b *broker) { b.refuse = nil })
	replayed, err := ob.DeadLetters(pool).ReplayAll(ctx, outbox.Filter{Cause: "poison"}, clerk)
	if must(err); replayed != 1 {
		t.Errorf("%d were replayed", replayed)
	}
	wantStatus(t, pool, ob, func(s outbox.Status) bool { return s.Depth == 0 && s.Sent == int64(2*n-1) && s.Dead == 0 })
	stop()
	cfg.Retain = 200 * time.Millisecond
	_, stop = start(t, pool, b, cfg)
	wantRows(t, pool, "postrider.postrider_outbox", 0)
	stop()
	must(outbox.MigrateDown(ctx, pool, ""))
}

func publishAs(ctx context.Context, pool *pgxpool.Pool, ob *outbox.Outbox, msgs ...*postrider.Message) error {
	return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error { return ob.In(tx).Publish(ctx, msgs...) })
}

// Nothing needs a second connection while it holds one.
func TestPoolsOfOneConnection(t *testing.T) {
	t.Parallel()
	one := func(cfg *pgxpool.Config) { cfg.MaxConns = 1 }
	t.Run("relays", func(t *testing.T) {
		t.Parallel()
		pool, obs := tenants(t, 3)
		b := &broker{}
		startRelays(t, clonePool(t, pool, one), b, obs, 4)
		for i, ob := range obs {
			publish(t, pool, ob, message(fmt.Sprint(i), ""))
		}
		postridertest.Eventually(t, func() error {
			if got := b.ids(); len(got) != 3 {
				return fmt.Errorf("accepted %q", got)
			}
			return nil
		})
	})
	t.Run("relay", func(t *testing.T) {
		t.Parallel()
		pool, ob := setup(t)
		b, alone := &broker{}, clonePool(t, pool, one)
		cfg := quick(ob)
		cfg.Listen = alone
		start(t, alone, b, cfg)
		publish(t, pool, ob, messages(300)...)
		wantIDs(t, b, ids(messages(300))...)
		wantRows(t, pool, "postrider.postrider_outbox_relay where prev::text <> '1:1:'", 1)
	})
	t.Run("writers and operators", func(t *testing.T) {
		t.Parallel()
		pool, ob := setup(t)
		b, alone := &broker{}, clonePool(t, pool, one)
		start(t, pool, b, quick(ob))
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		for name, way := range waysToPublish {
			if err := way(ctx, alone, ob, []*postrider.Message{message(name, "key")}); err != nil {
				t.Fatal(err)
			}
		}
		wantStatus(t, alone, ob, func(s outbox.Status) bool { return s.Depth == 0 })
		if n, err := ob.Resend(ctx, alone, outbox.Filter{}, true, clerk); err != nil || n != len(waysToPublish) {
			t.Errorf("resend: %d, %v", n, err)
		}
		if err := ob.Pause(ctx, alone, clerk); err != nil {
			t.Error(err)
		}
	})
}

// Functions and operators that somebody made in a schema of the search path, and that fit the types better than those of
// pg_catalog, are not called.
func TestHostileSearchPath(t *testing.T) {
	t.Parallel()
	pool := postridertest.Postgres(t)
	body := ` language plpgsql as $$ begin raise exception 'hostile'; end $$;`
	var script strings.Builder
	for _, f := range []string{
		"hashtextextended(text, integer) returns bigint", "pg_total_relation_size(text) returns bigint", "modulo(bigint, integer) returns bigint",
		"plus(double precision, integer) returns double precision", "over(double precision, integer) returns double precision",
		"over(double precision, numeric) returns double precision", "band(bigint, integer) returns bigint", "cat(text, bigint) returns text",
		"cat(uuid, text) returns text",
	} {
		script.WriteString("create function public." + f + body)
	}
	for name, operator := range map[string]string{
		"%": "bigint, rightarg = integer, function = public.modulo", "+": "double precision, rightarg = integer, function = public.plus",
		"/": "double precision, rightarg = integer, function = public.over", "&": "bigint, rightarg = integer, function = public.band",
		"||": "text, rightarg = bigint, function = public.cat",
	} {
		script.WriteString("create operator public." + name + " (leftarg = " + operator + ");")
	}
	script.WriteString(`create operator public./ (leftarg = double precision, rightarg = numeric, function = public.over);
		create operator public.|| (leftarg = uuid, rightarg = text, function = public.cat);`)
	execute(t, pool, script.String())
	useOutbox(t, pool)
}

// A database that takes no writes says what it may be, and is waited for.
func TestReadOnlyDatabase(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	standby := clonePool(t, pool, func(cfg *pgxpool.Config) { cfg.ConnConfig.RuntimeParams["default_transaction_read_only"] = "on" })
	err := publishAs(t.Context(), standby, ob, message("1", ""))
	if wantCode(t, err, postrider.Unavailable); !strings.Contains(err.Error(), "standby") {
		t.Error(err)
	}
	var log logs
	cfg := quick(ob)
	cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
	start(t, standby, &broker{}, cfg)
	postridertest.Eventually(t, func() error {
		if text := log.text(); !strings.Contains(text, "target_session_attrs") {
			return fmt.Errorf("logged %s", text)
		}
		return nil
	})
	if _, err := ob.Status(t.Context(), standby); err != nil {
		t.Error(err)
	}
}
