package bus_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/internal/devstack"
)

// onDisk connects to a server that keeps its streams on disk, as users' servers do: those of tests are in memory.
func onDisk(b *testing.B) *nats.Conn {
	b.Helper()
	srv, err := devstack.StartNATS(b.Context(), devstack.NATSConfig{StoreDir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	nc, err := nats.Connect(srv.URL)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		nc.Close()
		if err := srv.Close(); err != nil {
			b.Error(err)
		}
	})
	return nc
}

// BenchmarkPublish compares typed publishing with the plain client library doing the same work: the same CloudEvents
// headers, the same acknowledgement, on the same server with sync_interval: always.
func BenchmarkPublish(b *testing.B) {
	nc := onDisk(b)
	pr := newBus(b, nc)
	if err := noted.Publish(b.Context(), pr, &note{}); err != nil {
		b.Fatal(err)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		b.Fatal(err)
	}
	plain := func(ctx context.Context, n *note) error {
		m, err := noted.Message(ctx, n)
		if err != nil {
			return err
		}
		msg := &nats.Msg{Subject: m.Type, Data: m.Data, Header: nats.Header{
			"ce-specversion": {"1.0"}, "ce-id": {m.ID}, "ce-source": {"//test/notes"}, "ce-type": {m.Type},
			"ce-time": {m.Time.Format("2006-01-02T15:04:05.999999999Z07:00")}, "ce-datacontenttype": {m.ContentType},
			"Nats-Msg-Id": {m.ID},
		}}
		_, err = js.PublishMsg(ctx, msg)
		return err
	}
	for _, callers := range []int{1, 16, 64, 256} {
		for name, publish := range map[string]func(context.Context, *note) error{
			"postrider": func(ctx context.Context, n *note) error { return noted.Publish(ctx, pr, n) },
			"nats.go":   plain,
		} {
			b.Run(fmt.Sprintf("%s/callers=%d", name, callers), func(b *testing.B) {
				b.ReportAllocs()
				b.SetParallelism(callers / 2) // times GOMAXPROCS; 1 caller runs as one goroutine a processor
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						if err := publish(b.Context(), &note{N: 1, Text: "a text of some length, as events have"}); err != nil {
							b.Error(err)
							return
						}
					}
				})
			})
		}
	}
}

// BenchmarkHandle drains a backlog through a handler that does nothing.
func BenchmarkHandle(b *testing.B) {
	for _, concurrency := range []int{1, 16, 256} {
		b.Run(fmt.Sprintf("concurrency=%d", concurrency), func(b *testing.B) {
			nc := onDisk(b)
			pub := newBus(b, nc)
			for n := 0; n < b.N; n += 1000 {
				notes := make([]*note, min(1000, b.N-n))
				for i := range notes {
					notes[i] = &note{N: n + i}
				}
				if err := noted.PublishAll(b.Context(), pub, notes); err != nil {
					b.Fatal(err)
				}
			}
			sub := newBus(b, nc)
			var handled atomic.Int64
			done := make(chan struct{})
			h := noted.Handler(func(context.Context, postrider.Event[note]) error {
				if handled.Add(1) == int64(b.N) {
					close(done)
				}
				return nil
			})
			if err := sub.Subscribe(h, bus.Concurrency(concurrency), bus.From(bus.DeliverAll)); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			b.ResetTimer()
			run(b, sub)
			<-done
		})
	}
}
