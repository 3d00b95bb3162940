package idempotency

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/devstack"
)

// BenchmarkRatio measures what the guarantee costs: messages per second of handlers that each update one row, eight at once,
// as a ratio to the same handler with a transaction of its own and no inbox. Each iteration is a round of all of them, 300 ms
// each, and the ratios are the medians of the rounds: run it with -benchtime 15x. With a server that syncs, and with one in
// memory that does not.
func BenchmarkRatio(b *testing.B) {
	for name, cfg := range map[string]devstack.PostgresConfig{"disk": {Private: true}, "memory": {Private: true, InMemory: true}} {
		b.Run(name, func(b *testing.B) {
			server, err := devstack.StartPostgres(b.Context(), cfg)
			must(b, err)
			b.Cleanup(func() { must(b, server.Close()) })
			pool, err := pgxpool.New(b.Context(), server.URL+"&pool_max_conns=16")
			must(b, err)
			b.Cleanup(pool.Close)
			must(b, Migrate(b.Context(), pool, testSchema))
			newRatios(&bench{newContracts(), b, pool}).measure(b)
		})
	}
}

// ratios are the handlers of BenchmarkRatio.
type ratios struct {
	*bench
	n     atomic.Int64
	cells []ratioCell
}

type ratioCell struct {
	name  string
	batch int // messages of a call
	h     postrider.Handler
}

func newRatios(b *bench) *ratios {
	b.exec(`create table account (id int primary key, due bigint not null) with (fillfactor = 50);
		insert into account select i, 0 from generate_series(0, 19999) i`)
	r, s := &ratios{bench: b}, b.store(Config{})
	const pay = `update account set due = due + 1 where id = $1`
	payAll := func(ctx context.Context, tx pgx.Tx, n int) error {
		ids, at := make([]int64, n), r.n.Add(int64(n))
		for i := range ids {
			ids[i] = (at + int64(i)) % 20_000
		}
		slices.Sort(ids)
		_, err := tx.Exec(ctx, `update account set due = due + 1 from unnest($1::int[]) as paid (account) where id = account`, ids)
		return err
	}
	one := func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, pay, r.n.Add(1)%20_000)
		return err
	}
	r.cells = []ratioCell{
		{"plain", 1, b.placed.Handler(func(ctx context.Context, _ postrider.Event[order]) error {
			return pgx.BeginFunc(ctx, b.pool, func(tx pgx.Tx) error { return one(ctx, tx) })
		})},
		{"once", 1, Handler(s, "once", b.placed, func(ctx context.Context, tx pgx.Tx, _ postrider.Event[order]) error { return one(ctx, tx) })},
		{"batch10", 10, BatchHandler(s, "ten", b.placed, func(ctx context.Context, tx pgx.Tx, e []postrider.Event[order]) error {
			return payAll(ctx, tx, len(e))
		})},
		{"batch100", 100, BatchHandler(s, "hundred", b.placed, func(ctx context.Context, tx pgx.Tx, e []postrider.Event[order]) error {
			return payAll(ctx, tx, len(e))
		})},
		{"batch100-update-each", 100, BatchHandler(s, "each", b.placed, func(ctx context.Context, tx pgx.Tx, e []postrider.Event[order]) error {
			var q pgx.Batch
			at := r.n.Add(int64(len(e)))
			for i := range e {
				q.Queue(pay, (at+int64(i))%20_000)
			}
			return tx.SendBatch(ctx, &q).Close()
		})},
	}
	return r
}

func (r *ratios) measure(b *testing.B) {
	b.Helper()
	rates := make([][]float64, len(r.cells))
	for b.Loop() {
		for i, c := range r.cells {
			rates[i] = append(rates[i], r.rate(c))
		}
	}
	b.ReportMetric(0, "ns/op")
	for i, c := range r.cells {
		ratio := make([]float64, len(rates[i]))
		for round := range ratio {
			ratio[round] = rates[i][round] / rates[0][round]
		}
		if i == 0 {
			b.ReportMetric(median(rates[0]), "plain/s")
		} else {
			b.ReportMetric(median(ratio), c.name+"/plain")
		}
	}
}

// rate is how many messages of a cell eight goroutines handle in a second.
func (r *ratios) rate(c ratioCell) float64 {
	const atOnce, howLong = 8, 300 * time.Millisecond
	began := time.Now()
	var done atomic.Int64
	errs := make([]error, atOnce)
	var wg sync.WaitGroup
	for w := range atOnce {
		wg.Go(func() {
			msgs := make([]*postrider.Message, c.batch)
			for time.Since(began) < howLong {
				for i := range msgs {
					msgs[i] = r.event("", time.Now())
					msgs[i].ID = strconv.FormatInt(r.n.Add(1), 36)
				}
				if c.batch == 1 {
					errs[w] = errors.Join(errs[w], handle(r.t, c.h, msgs[0]))
				} else {
					errs[w] = errors.Join(errs[w], errors.Join(c.h.HandleBatch(r.t.Context(), msgs)...))
				}
				done.Add(int64(c.batch))
			}
		})
	}
	wg.Wait()
	must(r.t, errors.Join(errs...))
	return float64(done.Load()) / time.Since(began).Seconds()
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}
