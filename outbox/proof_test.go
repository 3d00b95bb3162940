package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

const (
	proofWriters      = 16
	proofKeys         = 20
	proofTransactions = 60 // of each writer
)

var errOnPurpose = errors.New("rolled back on purpose")

// writeLoad has 16 writers publish messages of 20 keys: whole roll-backs and roll-backs to savepoints, xids taken long before
// the key's lock, transactions held open. The table ledger commits with the messages and says which ones they are and,
// since its number is drawn under the key's lock, in which order those of a key committed.
func writeLoad(t testing.TB, pool *pgxpool.Pool, ob *outbox.Outbox) {
	t.Helper()
	ctx := t.Context()
	var wg sync.WaitGroup
	for w := range proofWriters {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 1))
			for i := range proofTransactions {
				err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
					return writeTransaction(ctx, tx, ob, rnd, fmt.Sprintf("%d-%d", w, i))
				})
				if err != nil && !errors.Is(err, errOnPurpose) {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func writeTransaction(ctx context.Context, tx pgx.Tx, ob *outbox.Outbox, rnd *rand.Rand, id string) error {
	exec := func(sql string, args ...any) error {
		_, err := tx.Exec(ctx, sql, args...)
		return err
	}
	hold := func() error { // nearly always short, sometimes long
		ms := rnd.ExpFloat64() * 2
		if rnd.IntN(100) == 0 {
			ms = 300
		}
		return exec(`select pg_sleep($1)`, ms/1000)
	}
	if rnd.IntN(3) == 0 { // the xid, well before the number
		if err := errors.Join(exec(`select pg_current_xact_id()`), hold()); err != nil {
			return err
		}
	}
	key := fmt.Sprint("key", rnd.IntN(proofKeys))
	add := func(tx pgx.Tx, id string) error {
		if err := ob.In(tx).Publish(ctx, message(id, key)); err != nil {
			return err
		}
		if rnd.IntN(2) == 0 {
			if err := hold(); err != nil {
				return err
			}
		}
		_, err := tx.Exec(ctx, `insert into ledger (key, id) values ($1, $2)`, key, id)
		return err
	}
	if err := add(tx, id); err != nil {
		return err
	}
	if rnd.IntN(4) == 0 {
		keep := rnd.IntN(2) == 0
		err := pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
			if err := add(tx, id+" nested"); err != nil || keep {
				return err
			}
			return errOnPurpose
		})
		if err != nil && !errors.Is(err, errOnPurpose) {
			return err
		}
	}
	if err := hold(); err != nil {
		return err
	}
	if rnd.IntN(8) == 0 {
		return errOnPurpose
	}
	return nil
}

// ledger returns the ids that committed, by key in the order of their commits.
func ledger(t testing.TB, pool *pgxpool.Pool) map[string][]string {
	t.Helper()
	want := map[string][]string{}
	rows, err := pool.Query(t.Context(), `select key, id from ledger order by n`)
	if err != nil {
		t.Fatal(err)
	}
	var key, id string
	if _, err := pgx.ForEachRow(rows, []any{&key, &id}, func() error {
		want[key] = append(want[key], id)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return want
}

// audit compares what was accepted with the ledger.
func audit(accepted []*postrider.Message, want map[string][]string) (lost, ghosts int, wrongOrder []string) {
	got := map[string][]string{}
	for _, m := range accepted {
		got[m.Key()] = append(got[m.Key()], m.ID)
	}
	for key, ids := range want {
		there := func(id string) bool { return slices.Contains(got[key], id) }
		for _, id := range ids {
			if !there(id) {
				lost++
			}
		}
		var known []string
		for _, id := range got[key] {
			if slices.Contains(ids, id) {
				known = append(known, id)
			} else {
				ghosts++
			}
		}
		sent := slices.Clone(ids)
		sent = slices.DeleteFunc(sent, func(id string) bool { return !there(id) })
		if !slices.Equal(known, sent) {
			wrongOrder = append(wrongOrder, key)
		}
	}
	return lost, ghosts, wrongOrder
}

func proofSetup(t *testing.T) (*pgxpool.Pool, *outbox.Outbox) {
	t.Helper()
	base, ob := setup(t)
	if _, err := base.Exec(t.Context(), `create table ledger (n bigserial primary key, key text, id text)`); err != nil {
		t.Fatal(err)
	}
	return clonePool(t, base, func(cfg *pgxpool.Config) { cfg.MaxConns = proofWriters + 4 }), ob
}

// The proof run: nothing lost, nothing from a roll-back, every key in the order of its commits, while relays crash between
// publish and cursor, one takes over from the other, pages are small and the ring is truncated all the time.
func TestProof(t *testing.T) {
	t.Parallel()
	pool, ob := proofSetup(t)
	relays, crash := relayPool(t, pool)
	crashes := 0
	rnd := rand.New(rand.NewPCG(2, 2))
	b := &broker{}
	b.after = func([]*postrider.Message) {
		if rnd.IntN(20) == 0 {
			crashes++
			crash()
		}
	}
	cfg := outbox.RelayConfig{
		Outbox: ob, BatchSize: 50, LeaseTTL: 1500 * time.Millisecond, PollInterval: 20 * time.Millisecond, Retain: 250 * time.Millisecond,
	}
	start(t, relays, b, cfg)
	wantRows(t, pool, "postrider.postrider_outbox_relay where period = 0.25", 1) // which writers at full speed would delay
	_, stopSecond := start(t, relays, b, cfg)
	writeLoad(t, pool, ob)
	b.set(func(b *broker) { b.after = nil })

	want := ledger(t, pool)
	committed := 0
	for _, ids := range want {
		committed += len(ids)
	}
	postridertest.Eventually(t, func() error {
		if n := len(b.ids()); n < committed {
			return fmt.Errorf("%d of %d messages sent", n, committed)
		}
		return nil
	})
	stopSecond()
	wantRows(t, pool, "postrider.postrider_outbox", 0) // the ring empties itself
	lost, ghosts, wrongOrder := audit(b.accepted, want)
	if lost > 0 || ghosts > 0 || len(wrongOrder) > 0 {
		t.Errorf("%d lost, %d that were rolled back, order broken of %q", lost, ghosts, wrongOrder)
	}
	var truncated int // a table that was truncated has another file than the one it was created with
	err := pool.QueryRow(t.Context(), `select count(*) from pg_class where relname ~ '^postrider_outbox_[012]$' and relfilenode <> oid`).Scan(&truncated)
	if err != nil {
		t.Fatal(err)
	}
	if crashes == 0 || truncated < 2 {
		t.Errorf("%d crashes, %d of 3 tables truncated: the test shows too little", crashes, truncated)
	}
	t.Logf("%d committed, %d crashes, %d repeated, %d tables truncated", committed, crashes, b.repeated, truncated)
}

// The checker finds what the design avoids: numbers drawn without the key's lock are out of order, and a reader that
// remembers the last number loses messages.
func TestProofFindsWrongDesigns(t *testing.T) {
	t.Parallel()
	pool, ob := proofSetup(t)
	unlocked, err := outbox.New(outbox.Config{Source: "//shop/orders", NoKeyLock: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Run("last number", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		seen, done := 0, make(chan struct{})
		go func() {
			defer close(done)
			last := int64(0)
			for finishing := false; !finishing; {
				finishing = ctx.Err() != nil // once more after the end
				rows, err := pool.Query(context.WithoutCancel(ctx), `select id from postrider.postrider_outbox where id > $1 order by id`, last)
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := pgx.ForEachRow(rows, []any{&last}, func() error { seen++; return nil }); err != nil {
					t.Error(err)
					return
				}
			}
		}()
		writeLoad(t, pool, ob)
		cancel()
		<-done
		var all int
		if err := pool.QueryRow(t.Context(), `select count(*) from postrider.postrider_outbox`).Scan(&all); err != nil {
			t.Fatal(err)
		}
		if seen >= all {
			t.Errorf("a reader by number saw %d of %d rows: the load does not show its fault", seen, all)
		}
		t.Logf("lost %d of %d", all-seen, all)
	})
	t.Run("no key lock", func(t *testing.T) {
		if _, err := pool.Exec(t.Context(), `truncate ledger; truncate postrider.postrider_outbox`); err != nil {
			t.Fatal(err)
		}
		b := &broker{}
		start(t, pool, b, outbox.RelayConfig{Outbox: unlocked})
		writeLoad(t, pool, unlocked)
		want := ledger(t, pool)
		postridertest.Eventually(t, func() error {
			if lost, _, _ := audit(b.copy(), want); lost > 0 {
				return fmt.Errorf("%d not sent yet", lost)
			}
			return nil
		})
		if _, _, wrongOrder := audit(b.copy(), want); len(wrongOrder) == 0 {
			t.Error("the order held without the key's lock: the load does not show its use")
		} else {
			t.Logf("order broken of %s", strings.Join(wrongOrder, " "))
		}
	})
}
