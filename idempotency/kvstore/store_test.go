package kvstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/idempotency"
	"github.com/postrider/postrider/internal/faultproxy"
	"github.com/postrider/postrider/postridertest"
	"github.com/postrider/postrider/postridertest/storetest"
)

func TestMain(m *testing.M) { os.Exit(postridertest.Main(m)) }

func openStore(t testing.TB, nc *nats.Conn, cfg Config) *Store {
	t.Helper()
	s, err := Open(t.Context(), nc, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestConformance(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(t testing.TB) (idempotency.Records, func()) {
		server := postridertest.NewNATS(t)
		proxy, err := faultproxy.New(strings.TrimPrefix(server.URL, "nats://"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = proxy.Close() })
		nc, err := nats.Connect("nats://"+proxy.Addr(), nats.MaxReconnects(-1), nats.ReconnectWait(time.Millisecond),
			nats.ReconnectJitter(time.Millisecond, time.Millisecond), nats.IgnoreDiscoveredServers())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return openStore(t, nc, Config{}), proxy.Cut
	})
}

func TestOpen(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	for name, cfg := range map[string]Config{"Retention": {Retention: time.Second}, "Bucket": {Bucket: "a.b"}} {
		if _, err := Open(t.Context(), nc, cfg); !errors.Is(err, postrider.InvalidArgument) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Open(t.Context(), nil, Config{}); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("no connection: %v", err)
	}
	ctx := t.Context()
	s := openStore(t, nc, Config{Bucket: "mine"})
	c, err := s.Claim(ctx, "k", "me", nil, time.Minute)
	if err != nil || c.Fence == 0 {
		t.Fatalf("%+v, %v", c, err)
	}
	// Again, with another retention: what is there stays.
	s = openStore(t, nc, Config{Bucket: "mine", Retention: time.Hour})
	if again, err := s.Claim(ctx, "k", "another", nil, time.Minute); err != nil || again.Fence != 0 {
		t.Fatalf("%+v, %v", again, err)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	kv, err := js.KeyValue(ctx, "mine")
	if err != nil {
		t.Fatal(err)
	}
	if status, err := kv.Status(ctx); err != nil || status.TTL() != time.Hour {
		t.Errorf("retention %v, %v", status.TTL(), err)
	}
	for name, o := range map[string]idempotency.Outcome{"too large": {Data: bytes.Repeat([]byte("x"), 1<<20)}} {
		if err := s.Complete(ctx, "k", c.Fence, o); !errors.Is(err, postrider.InvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := js.DeleteKeyValue(ctx, "mine"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Claim(ctx, "k", "me", nil, time.Minute); err == nil || errors.Is(err, idempotency.ErrLost) {
		t.Errorf("without a bucket: %v", err)
	}
}

// TestNothingIsLeft: of a key that was given back the bucket keeps nothing, after a while.
func TestNothingIsLeft(t *testing.T) {
	t.Parallel()
	s, ctx := openStore(t, postridertest.NATS(t), Config{}), t.Context()
	for i := range 10 {
		key := fmt.Sprint(i)
		c, err := s.Claim(ctx, key, "me", nil, time.Second)
		if err == nil && i%2 == 0 {
			err = s.Release(ctx, key, c.Fence)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	postridertest.Eventually(t, func() error {
		info, err := s.stream.Info(ctx)
		if err != nil || info.State.Msgs > 0 {
			return fmt.Errorf("%d messages are left, %w", info.State.Msgs, err)
		}
		return nil
	})
}

func FuzzParseEntry(f *testing.F) {
	f.Add([]byte(`{"key":"k","state":"open","request":"cg=="}`))
	f.Add([]byte(`{"key":"k","state":"done","fence":7,"content_type":"a/b","data":"AAE="}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := parseEntry(9, nil, data)
		if e.sequence != 9 || (err == nil) != e.exists() {
			t.Fatalf("%q: %+v, %v", data, e, err)
		}
		if err != nil {
			return
		}
		msg, err := e.message("s")
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseEntry(9, nil, msg.Data)
		if err != nil || fmt.Sprint(again) != fmt.Sprint(e) || e.Fence <= 0 {
			t.Fatalf("%q: %+v, again %+v, %v", data, e, again, err)
		}
	})
}

// BenchmarkDo measures a request whose outcome is known, and a first one.
func BenchmarkDo(b *testing.B) {
	s := openStore(b, postridertest.NATS(b), Config{})
	m := postrider.NewMethod[string, string]("payments.v1/Charge")
	do := func(b *testing.B, key string) {
		b.Helper()
		req := "r"
		_, err := idempotency.Do(b.Context(), s, m, key, &req, func(context.Context, *string) (*string, error) { return &req, nil })
		if err != nil {
			b.Fatal(err)
		}
	}
	b.Run("known", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			do(b, "known")
		}
	})
	b.Run("first", func(b *testing.B) {
		b.ReportAllocs()
		for n := 0; b.Loop(); n++ {
			do(b, fmt.Sprintf("%p %d", b, n))
		}
	})
}
