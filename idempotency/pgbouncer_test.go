package idempotency

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

// Everything works through a PgBouncer in transaction mode, whose three connections to the server are shared by many callers who
// repeat each other: migration and maintenance, handlers of messages and batches, the barrier, and requests with a key.
func TestThroughPgBouncer(t *testing.T) {
	t.Parallel()
	for name, mode := range map[string]pgx.QueryExecMode{
		"cache_describe": pgx.QueryExecModeCacheDescribe, "exec": pgx.QueryExecModeExec, "simple": pgx.QueryExecModeSimpleProtocol,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			direct := postridertest.Postgres(t)
			b := &bench{newContracts(), t, postridertest.PgBouncer(t, direct, mode)}
			must(t, Migrate(t.Context(), b.pool, testSchema))
			b.exec(`create table ledger (what text not null, at timestamptz not null default clock_timestamp())`)
			s := b.store(Config{LockTimeout: -1, Window: 2 * day})
			pooled := pooledWork{bench: b, store: s, now: time.Now()}
			pooled.site = b.siteOn(s, HTTPConfig{}, func(w http.ResponseWriter, r *http.Request) {
				body, err := io.ReadAll(r.Body)
				if err = errors.Join(err, pooled.effect(r.Context(), "http "+string(body))); err != nil {
					http.Error(w, err.Error(), http.StatusInternalServerError)
				}
			})

			const callers, rounds = 8, 4
			var wg sync.WaitGroup
			for range callers {
				wg.Go(func() {
					for i := range rounds {
						if err := pooled.round(i); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			for i := range rounds {
				for _, what := range []string{
					"one m-%d", "many b-%d-0", "many b-%d-9", "do s/%d", "undo s/%d", "tx t-%d", "key k-%d", "mail m-%d", "http h-%d",
				} {
					b.wantEffects(fmt.Sprintf(what, i), 1)
				}
			}
			known, err := s.Handled(t.Context(), "one", b.event("m-0", pooled.now), b.event("m-77", pooled.now))
			if err != nil || !known[0] || known[1] {
				t.Errorf("handled: %v, %v", known, err)
			}

			// The sweep drops a day, which it first detaches concurrently.
			b.exec(`create table effects.postrider_inbox_20200101 (like effects.postrider_inbox including all)`)
			b.exec(`alter table effects.postrider_inbox attach partition effects.postrider_inbox_20200101
				for values from ('` + lowest(date(2020, 1, 1)) + `') to ('` + lowest(date(2020, 1, 2)) + `')`)
			must(t, s.maintain(t.Context()))
			for _, p := range b.partitions() {
				if strings.Contains(p, "2020") {
					t.Errorf("partitions %q", b.partitions())
				}
			}
			wantNoneOpen(t, direct)
		})
	}
}

func date(year, month, day int) time.Time {
	return time.Date(year, time.Month(month), day, 0, 0, 0, 0, time.UTC)
}

// pooledWork is what a caller does in TestThroughPgBouncer.
type pooledWork struct {
	*bench

	store *Store
	site  *site
	now   time.Time
}

// effect is one that is no part of a transaction of the store.
func (p *pooledWork) effect(ctx context.Context, what string) error {
	_, err := p.pool.Exec(ctx, `insert into ledger (what) values ($1)`, what)
	return err
}

// round does everything once, unless somebody else has done it.
func (p *pooledWork) round(i int) error {
	ctx, id := p.t.Context(), func(what string) string { return fmt.Sprintf("%s-%d", what, i) }
	var errs []error
	add := func(err error) { errs = append(errs, err) }

	add(handle(p.t, p.writer(p.store, "one"), p.event(id("m"), p.now)))
	batch := make([]*postrider.Message, 10)
	for k := range batch {
		batch[k] = p.event(fmt.Sprintf("b-%d-%d", i, k), p.now.Add(time.Duration(k)*time.Millisecond))
	}
	many, _ := p.batcher(p.store, "many", nil)
	add(errors.Join(many.HandleBatch(ctx, batch)...))

	act := Action(p.store, p.reserve, func(ctx context.Context, tx pgx.Tx, req *order) (*hold, error) {
		return &hold{ID: "h"}, write(ctx, tx, "do "+req.ID)
	})
	saga := fmt.Sprintf("s/%d", i)
	_, err := act.Handle(ctx, p.command(p.reserve, saga+"/do", order{ID: saga}))
	if errors.Is(err, postrider.FailedPrecondition) { // another caller has undone it
		err = nil
	}
	add(err)
	undo := Compensation(p.store, p.release, func(ctx context.Context, tx pgx.Tx, req *order, _ *hold) error {
		return write(ctx, tx, "undo "+req.ID)
	})
	add(handle(p.t, undo, p.command(p.release, saga+"/undo", order{ID: saga})))

	_, err = DoTx(ctx, p.store, p.reserve, id("t"), &order{ID: id("t")}, func(ctx context.Context, tx pgx.Tx, req *order) (*hold, error) {
		return nil, write(ctx, tx, "tx "+req.ID)
	})
	add(err)
	_, err = Do(ctx, p.store, p.reserve, id("k"), &order{ID: id("k")}, func(ctx context.Context, req *order) (*hold, error) {
		return nil, p.effect(ctx, "key "+req.ID)
	})
	add(err)
	mail := p.placed.Handler(func(ctx context.Context, e postrider.Event[order]) error {
		return p.effect(ctx, "mail "+e.ID)
	}).With(Dedup(p.store, "mail"))
	add(p.patient(func() error { return handle(p.t, mail, p.event(id("m"), p.now)) }))
	add(p.patient(func() error {
		r, err := p.site.post("/", id("h"), "Idempotency-Key: "+id("h"))
		switch {
		case err == nil && r.status == http.StatusConflict:
			return postrider.Aborted
		case err == nil && r.status != http.StatusOK:
			return fmt.Errorf("HTTP: %d %s", r.status, r.body)
		}
		return err
	}))
	return errors.Join(errs...)
}

// patient asks again while somebody else has the key.
func (p *pooledWork) patient(ask func() error) (err error) {
	for range 3000 {
		if err = ask(); !errors.Is(err, postrider.Aborted) {
			return err
		}
		<-time.After(10 * time.Millisecond)
	}
	return err
}

// wantNoneOpen fails if a transaction is left open in a pool's database.
func wantNoneOpen(t *testing.T, pool *pgxpool.Pool) {
	t.Helper()
	postridertest.Eventually(t, func() error {
		var open string
		err := pool.QueryRow(t.Context(), `select coalesce(string_agg(query, '; '), '') from pg_stat_activity
			where datname = current_database() and pid <> pg_backend_pid() and xact_start is not null and backend_type = 'client backend'`).Scan(&open)
		if err == nil && open != "" {
			err = fmt.Errorf("a transaction is left open after: %s", open)
		}
		return err
	})
}
