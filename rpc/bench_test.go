package rpc

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/codec"
	"github.com/postrider/postrider/postridertest"
)

// BenchmarkCall compares a call, with its envelope, deadline and worker pool, with a bare request of nats.go, both with
// 128 bytes each way. The server is in the same process, on a connection of its own, and so is the nats-server.
func BenchmarkCall(b *testing.B) {
	srv := postridertest.NewNATS(b)
	raw := postrider.NewMethod[[]byte, []byte]("bench.v1/Echo", postrider.Encoding(codec.Bytes))
	serve(b, srv.Connect(), ServerConfig{}, raw.Handler(func(_ context.Context, data *[]byte) (*[]byte, error) { return data, nil }))
	responder := srv.Connect()
	if _, err := responder.Subscribe("bench.bare", func(m *nats.Msg) { _ = m.Respond(m.Data) }); err != nil {
		b.Fatal(err)
	}
	if err := responder.Flush(); err != nil {
		b.Fatal(err)
	}
	c := dial(b, srv.Connect(), ClientConfig{Timeout: 10 * time.Second})
	bare := srv.Connect()
	data := []byte(strings.Repeat("x", 128))

	for _, callers := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("nats/callers=%d", callers), func(b *testing.B) {
			together(b, callers, func() error {
				_, err := bare.Request("bench.bare", data, 10*time.Second)
				return err
			})
		})
		b.Run(fmt.Sprintf("rpc/callers=%d", callers), func(b *testing.B) {
			ctx := context.Background()
			together(b, callers, func() error {
				_, err := Call(ctx, c, raw, &data)
				return err
			})
		})
	}
}

// together runs b.N calls from a number of goroutines.
func together(b *testing.B, callers int, call func() error) {
	b.Helper()
	b.ReportAllocs()
	var left atomic.Int64
	left.Store(int64(b.N))
	errs := make(chan error, callers)
	b.ResetTimer()
	for range callers {
		go func() {
			for left.Add(-1) >= 0 {
				if err := call(); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range callers {
		if err := <-errs; err != nil {
			b.Error(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "calls/s")
}
