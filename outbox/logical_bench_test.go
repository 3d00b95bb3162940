package outbox_test

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
)

// stopwatch notes when each message arrives.
type stopwatch struct {
	mu   sync.Mutex
	took []time.Duration
	want int
	all  chan struct{}
}

func (s *stopwatch) Publish(_ context.Context, msgs ...*postrider.Message) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range msgs {
		s.took = append(s.took, time.Since(m.Time))
	}
	if len(s.took) == s.want {
		close(s.all)
	}
	return nil
}

// BenchmarkLatency is the way from the beginning of a transaction with one message to the publisher, at 500 messages a second from
// 8 writers: with the relay woken in its process before the commit, or after it (of one statement), left to its polls, and by
// logical replication. An operation is a message. Processor time is that of this process, writers included, and of the server's.
func BenchmarkLatency(b *testing.B) {
	server := logicalServer(b)
	for _, bench := range []struct {
		name   string
		wakes  bool
		direct bool // in a transaction of its own
		mode   outbox.LogicalMode
	}{
		{"woken before", true, false, outbox.LogicalOff},
		{"woken after", true, true, outbox.LogicalOff},
		{"polled", false, false, outbox.LogicalOff},
		{"logical", false, false, outbox.LogicalOn},
		{"logical direct", false, true, outbox.LogicalOn},
	} {
		b.Run(bench.name, func(b *testing.B) {
			pool, cfg := logicalSetup(b, server)
			writers := cfg.Outbox
			if !bench.wakes {
				var err error
				if writers, err = outbox.New(outbox.Config{Source: "//shop/orders"}); err != nil {
					b.Fatal(err)
				}
			}
			write := func(ctx context.Context, m *postrider.Message) error {
				if bench.direct {
					return writers.On(pool).Publish(ctx, m)
				}
				return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error { return writers.In(tx).Publish(ctx, m) })
			}
			watch := &stopwatch{want: b.N, all: make(chan struct{})}
			cfg = outbox.RelayConfig{Outbox: cfg.Outbox, Logical: outbox.LogicalConfig{Mode: bench.mode}}
			relay, stop := start(b, pool, watch, cfg)
			wantLogical(b, relay, bench.mode == outbox.LogicalOn)
			before := spent(b, pool)
			b.ResetTimer()
			var wg sync.WaitGroup
			const each = 8
			for w := range each {
				wg.Go(func() {
					tick := time.NewTicker(each * 2 * time.Millisecond)
					defer tick.Stop()
					for i := w; i < b.N; i += each {
						<-tick.C
						m := message(fmt.Sprint(i), "")
						m.Data, m.Time = make([]byte, 256), time.Now()
						if err := write(b.Context(), m); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			<-watch.all
			b.StopTimer()
			after := spent(b, pool)
			slices.Sort(watch.took)
			at := func(q float64) float64 { return watch.took[int(q*float64(b.N-1))].Seconds() * 1000 }
			b.ReportMetric(at(0.5), "p50-ms")
			b.ReportMetric(at(0.99), "p99-ms")
			b.ReportMetric(float64(after.wal-before.wal)/float64(b.N), "WAL-B/op")
			b.ReportMetric((after.own-before.own).Seconds()*1e6/float64(b.N), "cpu-us/op")
			b.ReportMetric((after.server-before.server).Seconds()*1e6/float64(b.N), "server-cpu-us/op")
			stop()
		})
	}
}

type expense struct {
	wal         int64
	own, server time.Duration
}

// spent is what was used so far. That of the server is zero where there is no /proc.
func spent(b *testing.B, pool *pgxpool.Pool) (e expense) {
	b.Helper()
	var pids []int
	err := pool.QueryRow(b.Context(), `select (pg_current_wal_insert_lsn() - '0/0')::bigint, array(select pid from pg_stat_activity order by 1)`).Scan(&e.wal, &pids)
	if err != nil {
		b.Fatal(err)
	}
	var own syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &own); err != nil {
		b.Fatal(err)
	}
	e.own = time.Duration(own.Utime.Nano() + own.Stime.Nano())
	for _, pid := range pids {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		fields := strings.Fields(rest)
		for _, f := range fields[11:13] { // user and system, in hundredths of a second
			n, err := strconv.Atoi(f)
			if err != nil {
				b.Fatal(err)
			}
			e.server += time.Duration(n) * 10 * time.Millisecond
		}
	}
	return e
}
