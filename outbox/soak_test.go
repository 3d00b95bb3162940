package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// The long versions of these tests print what they see as CSV:
//
//	POSTRIDER_TEST_BLOAT=2000000 go test ./outbox -run TestBloat -v -timeout 1h
//	POSTRIDER_TEST_OUTAGE=600 go test ./outbox -run TestBrokerDownForLong -v -timeout 1h
//	POSTRIDER_TEST_BACKLOG=600000 go test ./outbox -run TestBrokerDownForLong -v

// sizes are what the tables of an outbox take.
type sizes struct{ rows, table, index, dead, relay int64 }

func sizesOf(t testing.TB, pool *pgxpool.Pool) (s sizes) {
	t.Helper()
	err := pool.QueryRow(t.Context(), `
		select sum(pg_table_size(c.oid)), sum(pg_indexes_size(c.oid)), sum(pg_stat_get_live_tuples(c.oid)), sum(pg_stat_get_dead_tuples(c.oid)),
			pg_total_relation_size('postrider.postrider_outbox_relay')
		from pg_class as c where c.oid in (select inhrelid from pg_inherits where inhparent = 'postrider.postrider_outbox'::regclass)`).
		Scan(&s.table, &s.index, &s.rows, &s.dead, &s.relay)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// pour publishes n messages in transactions of some, from several writers. Their ids count up from 0; each has one of 100 keys. At most
// rate of them a second, 0 for no limit.
func pour(t testing.TB, pool *pgxpool.Pool, ob *outbox.Outbox, n, some, rate int) {
	var wg sync.WaitGroup
	var next atomic.Int64
	began := time.Now()
	ctx := t.Context()
	for range 4 {
		wg.Go(func() {
			for {
				first := int(next.Add(int64(some))) - some
				if first >= n {
					return
				}
				if rate > 0 {
					select {
					case <-time.After(time.Until(began.Add(time.Duration(first) * time.Second / time.Duration(rate)))):
					case <-ctx.Done():
						return
					}
				}
				msgs := make([]*postrider.Message, min(some, n-first))
				for i := range msgs {
					msgs[i] = message(fmt.Sprint(first+i), fmt.Sprint("key", first/some%100))
				}
				if err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error { return ob.In(tx).Publish(ctx, msgs...) }); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// sink is a publisher that takes all and keeps nothing.
type sink struct{ n atomic.Int64 }

func (s *sink) Publish(_ context.Context, msgs ...*postrider.Message) error {
	s.n.Add(int64(len(msgs)))
	return nil
}

// watch calls look now and then, until the returned function is called.
func watch(every time.Duration, look func()) (stop func()) {
	end, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for ticker := time.NewTicker(every); ; {
			select {
			case <-ticker.C:
				look()
			case <-end:
				ticker.Stop()
				return
			}
		}
	}()
	return sync.OnceFunc(func() { close(end); <-done })
}

// Tables and indexes are back at their first size when a steady load is over, never had a dead row, and were emptied all the time.
func TestBloat(t *testing.T) {
	t.Parallel()
	n := number(t, "POSTRIDER_TEST_BLOAT", 50_000)
	long := n > 50_000
	pool, ob := setup(t)
	cfg := quick(ob)
	if cfg.Retain = 300 * time.Millisecond; long {
		cfg.Retain = 5 * time.Second
	}
	var out sink
	relay, _ := start(t, pool, &out, cfg)
	wantRows(t, pool, fmt.Sprintf("postrider.postrider_outbox_relay where period = %g", cfg.Retain.Seconds()), 1)
	base, began := sizesOf(t, pool), time.Now()
	var largest, dead int64
	if long {
		t.Log("seconds,sent,rows,table bytes,index bytes,dead rows,relay row bytes")
	}
	every := 50 * time.Millisecond
	if long {
		every = 2 * time.Second
	}
	stop := watch(every, func() {
		s := sizesOf(t, pool)
		largest, dead = max(largest, s.table), max(dead, s.dead)
		if long {
			t.Logf("%.0f,%d,%d,%d,%d,%d,%d", time.Since(began).Seconds(), out.n.Load(), s.rows, s.table, s.index, s.dead, s.relay)
		}
	})
	rate := 25_000 // so that the ring turns several times
	if long {
		rate = 10_000
	}
	pour(t, pool, ob, n, 50, rate)
	poured := time.Since(began)
	for out.n.Load() < int64(n) && relay.Stats().Published < uint64(n) {
		before := out.n.Load()
		postridertest.Eventually(t, func() error {
			if out.n.Load() == before {
				return fmt.Errorf("sent %d of %d", before, n)
			}
			return nil
		})
	}
	var after sizes
	postridertest.Eventually(t, func() error {
		if after = sizesOf(t, pool); after.table > base.table || after.index > base.index {
			return fmt.Errorf("sizes %+v, at the beginning they were %+v", after, base)
		}
		return nil
	})
	stop()
	t.Logf("%d messages in %v; sizes at the beginning %+v, at the end %+v, largest table %d", n, poured, base, after, largest)
	if dead > 0 || after.dead > 0 {
		t.Errorf("there were %d dead rows", dead)
	}
	if after.relay > 256<<10 { // one row, rewritten all the time
		t.Errorf("the relay's row takes %d bytes", after.relay)
	}
	wantRows(t, pool, `pg_class where relname ~ '^postrider_outbox_[012]$' and relfilenode <> oid`, 3) // all were truncated
}

// The broker is away: the relay keeps its lease and a level memory, and when the broker is back it sends all that waited, in
// order, though the ring has turned many times.
func TestBrokerDownForLong(t *testing.T) {
	t.Parallel()
	seconds := number(t, "POSTRIDER_TEST_OUTAGE", 0)
	n, rate := number(t, "POSTRIDER_TEST_BACKLOG", 20_000), 0
	alone := seconds > 0 || n > 20_000 // else other tests run beside it
	if seconds > 0 {
		n, rate = 1000*seconds, 1000
	}
	pool, ob := setup(t)
	srv := newNATSProcess(t) // whose memory is not the relay's
	b := newBus(t, srv.connect())
	cfg := quick(ob)
	cfg.LeaseTTL, cfg.Retain = 30*time.Second, 500*time.Millisecond // a busy machine costs no lease
	relay, _ := start(t, pool, b, cfg)
	publish(t, pool, ob, message("first", ""))
	sent := func(want int) {
		t.Helper()
		for done := false; !done; {
			before := relay.Stats().Published
			postridertest.Eventually(t, func() error { // that it goes on, for as long as it takes
				s := relay.Stats()
				if done = s.Published >= uint64(want); !done && s.Published == before {
					return fmt.Errorf("stats %+v, want %d published", s, want)
				}
				return nil
			})
		}
	}
	sent(1)
	// Before it has marked where the stream ends it would have to go back.
	wantRows(t, pool, `(select from postrider.postrider_outbox_mark where tails::text <> '{}' limit 1) as marked`, 1)
	srv.kill()
	publish(t, pool, ob, message("second", ""))
	postridertest.Eventually(t, func() error {
		if relay.Stats().Lag == 0 {
			return errors.New("nothing waits")
		}
		return nil
	})
	began, base := time.Now(), heap()
	if seconds > 0 {
		t.Log("seconds,depth,published,heap bytes,table bytes")
		stop := watch(10*time.Second, func() {
			s := relay.Stats()
			t.Logf("%.0f,%d,%d,%d,%d", time.Since(began).Seconds(), s.Depth, s.Published, heap(), sizesOf(t, pool).table)
		})
		defer stop()
	}
	pour(t, pool, ob, n, 50, rate)
	down := heap()
	wantRows(t, pool, "postrider.postrider_outbox where id > 1", n+1) // none is gone
	back, resident := time.Now(), rss(t)
	var live, peak uint64 // during the drain
	stop := watch(200*time.Millisecond, func() { live, peak = max(live, heap()), max(peak, rss(t)) })
	srv.start()
	sent(n + 2)
	drained := time.Since(back)
	stop()
	t.Logf("away for %v, %d messages drained in %v; heap %d bytes before, %d at the end of the outage, at most %d during the drain, "+
		"%d after it; resident %d before the drain, at most %d during it", back.Sub(began), n, drained, base, down, live, heap(), resident, peak)
	for when, size := range map[string]uint64{"broker was away": down, "backlog was drained": live} {
		if grown := int64(size) - int64(base); grown > 16<<20 && alone {
			t.Errorf("the heap grew by %d bytes while the %s", grown, when)
		}
	}
	wantRows(t, pool, "postrider.postrider_outbox_relay where fence = 1", 1) // it never lost the lease
	wantRows(t, pool, "postrider.postrider_outbox", 0)

	// The order of a key is that of the numbers in its ids' transactions: the stream has each message once, and within a
	// transaction one after the other.
	seen, last := make([]bool, n), map[string]int{}
	for m, err := range b.Read(t.Context(), "ORDERS", time.Time{}) {
		if err != nil {
			t.Fatal(err)
		}
		id, err := strconv.Atoi(m.ID)
		if err != nil {
			continue // the first two
		}
		if before, ok := last[m.Key()]; seen[id] || ok && before/50 == id/50 && before+1 != id {
			t.Fatalf("message %d came twice or out of order, after %d", id, before)
		}
		seen[id], last[m.Key()] = true, id
	}
	if i := slices.Index(seen, false); i >= 0 {
		t.Errorf("message %d is lost", i)
	}
}

// heap is what is in use.
func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// rss is what this process has in memory, 0 where the system does not tell.
func rss(t testing.TB) uint64 {
	t.Helper()
	text, err := os.ReadFile("/proc/self/statm") // Linux; in pages
	if err != nil {
		return 0
	}
	var size, resident uint64
	if _, err := fmt.Sscan(string(text), &size, &resident); err != nil {
		t.Fatal(err)
	}
	return resident * uint64(os.Getpagesize())
}
