package postridertest

import (
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider/internal/devstack"
)

// NATS returns a connection to a nats-server of the test's own, with JetStream and sync_interval: always. Both end with the
// test. Each call starts another server, which takes about 10 ms; [NewNATS] gives several connections to one.
func NATS(t testing.TB) *nats.Conn {
	t.Helper()
	return NewNATS(t).Connect()
}

// NATSServer is a nats-server of one test, which may stop and start it. Its methods are for the test's goroutine: they fail the
// test when they fail.
type NATSServer struct {
	// URL is where clients connect. It stays the same over Stop and Start.
	URL string

	t   testing.TB
	srv *devstack.NATS
}

// NewNATS starts a nats-server with JetStream and sync_interval: always, on a port of 127.0.0.1. It ends with the test.
func NewNATS(t testing.TB) *NATSServer {
	t.Helper()
	srv, err := devstack.StartNATS(t.Context(), devstack.NATSConfig{InMemory: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	})
	return &NATSServer{URL: srv.URL, t: t, srv: srv}
}

// NewNATSCluster starts n servers as of [NewNATS] that form a cluster, and returns when streams can be created, which takes some
// seconds. A connection to one of them goes on with another when that one stops.
func NewNATSCluster(t testing.TB, n int) []*NATSServer {
	t.Helper()
	cluster, err := devstack.StartNATSCluster(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	var servers []*NATSServer
	for _, srv := range cluster {
		t.Cleanup(func() {
			if err := srv.Close(); err != nil {
				t.Error(err)
			}
		})
		servers = append(servers, &NATSServer{URL: srv.URL, t: t, srv: srv})
	}
	return servers
}

// Connect returns a new connection, closed when the test ends. It reconnects for ever and within milliseconds, unless
// options say otherwise.
func (s *NATSServer) Connect(options ...nats.Option) *nats.Conn {
	s.t.Helper()
	options = append([]nats.Option{
		nats.Name(s.t.Name()),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(10 * time.Millisecond),
		nats.ReconnectJitter(time.Millisecond, time.Millisecond),
	}, options...)
	nc, err := nats.Connect(s.URL, options...)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(nc.Close)
	return nc
}

// Stop ends the server. Connections break; streams are kept for Start.
func (s *NATSServer) Stop() {
	s.t.Helper()
	if err := s.srv.Stop(); err != nil {
		s.t.Fatal(err)
	}
}

// Start starts a stopped server again, on the same port and with the streams it had.
func (s *NATSServer) Start() {
	s.t.Helper()
	if err := s.srv.Start(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
}
