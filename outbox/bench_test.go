package outbox_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
)

// BenchmarkInsert is a transaction of four statements (BEGIN, UPDATE, INSERT, COMMIT) without and with messages.
func BenchmarkInsert(b *testing.B) {
	for _, bench := range []struct {
		name string
		n    int
		key  string
	}{{"none", 0, ""}, {"1", 1, ""}, {"1 with key", 1, "k"}, {"10", 10, ""}, {"100", 100, ""}} {
		b.Run(bench.name, func(b *testing.B) {
			pool, ob := setup(b)
			ctx := b.Context()
			_, err := pool.Exec(ctx, `create table account (id int primary key, due int) with (fillfactor = 70);
				insert into account select g, 0 from generate_series(1, 20000) g; create table orders (id int, account int)`)
			if err != nil {
				b.Fatal(err)
			}
			var next atomic.Int64
			b.ReportAllocs()
			b.SetParallelism(4) // 8 connections on 2 processors
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					i := next.Add(1)
					msgs := make([]*postrider.Message, bench.n)
					for j := range msgs {
						key := ""
						if bench.key != "" {
							key = fmt.Sprint(bench.key, i)
						}
						msgs[j] = message(fmt.Sprint(i, j), key)
						msgs[j].Data = make([]byte, 256)
					}
					err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
						if _, err := tx.Exec(ctx, `update account set due = due + 1 where id = $1`, i*7919%20000+1); err != nil {
							return err
						}
						if _, err := tx.Exec(ctx, `insert into orders values ($1, $2)`, i, i%20000); err != nil {
							return err
						}
						return ob.In(tx).Publish(ctx, msgs...)
					})
					if err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}

// counter accepts everything.
type counter struct {
	n    atomic.Int64
	want int64
	all  chan struct{}
}

func (c *counter) Publish(_ context.Context, msgs ...*postrider.Message) error {
	if c.n.Add(int64(len(msgs))) == c.want {
		close(c.all)
	}
	return nil
}

// BenchmarkDrain is the relay's rate where the publisher costs nothing, without and with a write transaction held open
// elsewhere; an operation is a message.
func BenchmarkDrain(b *testing.B) {
	for _, held := range []bool{false, true} {
		b.Run(fmt.Sprintf("held=%v", held), func(b *testing.B) {
			pool, ob := setup(b)
			ctx := b.Context()
			if held {
				tx, err := pool.Begin(ctx)
				if err != nil {
					b.Fatal(err)
				}
				defer tx.Rollback(ctx)
				if err := ob.In(tx).Publish(ctx, message("held", "")); err != nil {
					b.Fatal(err)
				}
			}
			for n := 0; n < b.N; n += 10_000 {
				msgs := messages(min(10_000, b.N-n))
				for _, m := range msgs {
					m.Data = make([]byte, 256)
				}
				publish(b, pool, ob, msgs...)
			}
			c := &counter{want: int64(b.N), all: make(chan struct{})}
			b.ReportAllocs()
			b.ResetTimer()
			_, stop := start(b, pool, c, outbox.RelayConfig{Outbox: ob})
			<-c.all
			b.StopTimer()
			stop()
		})
	}
}
