package idempotency_test

import (
	"net"
	"strconv"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider/idempotency"
	"github.com/postrider/postrider/internal/faultproxy"
	"github.com/postrider/postrider/postridertest"
	"github.com/postrider/postrider/postridertest/storetest"
)

func TestConformance(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(t testing.TB) (idempotency.Records, func()) {
		pool := postridertest.Postgres(t)
		if err := idempotency.Migrate(t.Context(), pool, ""); err != nil {
			t.Fatal(err)
		}
		cut, proxy := behindProxy(t, pool)
		store, err := idempotency.New(cut, idempotency.Config{})
		if err != nil {
			t.Fatal(err)
		}
		return store, proxy.Cut
	})
}

// behindProxy returns a pool to the same database whose connections a test may cut.
func behindProxy(t testing.TB, pool *pgxpool.Pool) (*pgxpool.Pool, *faultproxy.Proxy) {
	t.Helper()
	cfg := pool.Config()
	server := cfg.ConnConfig
	proxy, err := faultproxy.New(net.JoinHostPort(server.Host, strconv.Itoa(int(server.Port))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = proxy.Close() })
	host, port, err := net.SplitHostPort(proxy.Addr())
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		t.Fatal(err)
	}
	server.Host, server.Port, server.Fallbacks = host, uint16(n), nil
	server.TLSConfig = nil
	through, err := pgxpool.NewWithConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(through.Close)
	return through, proxy
}
