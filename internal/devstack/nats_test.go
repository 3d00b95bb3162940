package devstack

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

func TestNATSRestartKeepsStreams(t *testing.T) {
	t.Parallel()
	srv := startNATS(t, NATSConfig{})
	url := srv.URL
	js := jetStream(t, url)
	if _, err := js.AddStream(&nats.StreamConfig{Name: "S", Subjects: []string{"s"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish("s", []byte("one")); err != nil {
		t.Fatal(err)
	}

	if err := srv.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := refuses(url); err != nil {
		t.Error(err)
	}
	for range 2 { // a second Start finds it running
		if err := srv.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if srv.URL != url {
		t.Errorf("URL = %s after the restart, was %s", srv.URL, url)
	}
	msg, err := jetStream(t, url).GetMsg("S", 1)
	if err != nil || string(msg.Data) != "one" {
		t.Errorf("message after the restart: %v, %v", msg, err)
	}
}

func TestNATSSync(t *testing.T) {
	t.Parallel()
	for name, syncDefault := range map[string]bool{"always": false, "default": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startNATS(t, NATSConfig{SyncDefault: syncDefault})
			vars, err := srv.srv.Varz(nil)
			if err != nil {
				t.Fatal(err)
			}
			if got := vars.JetStream.Config.SyncAlways; got == syncDefault {
				t.Errorf("sync always = %v with SyncDefault = %v", got, syncDefault)
			}
		})
	}
}

// Somebody takes the port between our choice and the server's bind: another one must be tried.
func TestNATSPortTaken(t *testing.T) {
	t.Parallel()
	var taken net.Listener
	srv := startNATS(t, NATSConfig{Options: func(o *server.Options) {
		if taken != nil {
			return
		}
		var err error
		if taken, err = net.Listen("tcp", loopback(o.Port)); err != nil {
			t.Error(err)
		}
		t.Cleanup(func() { taken.Close() })
	}})
	if strings.HasSuffix(srv.URL, taken.Addr().String()) {
		t.Errorf("server says %s, which is taken", srv.URL)
	}
	jetStream(t, srv.URL)
}

func TestNATSGivenByURL(t *testing.T) {
	t.Parallel()
	running := startNATS(t, NATSConfig{})
	given := startNATS(t, NATSConfig{URL: running.URL})
	if given.URL != running.URL {
		t.Errorf("URL = %s, want %s", given.URL, running.URL)
	}
	if err := given.Stop(); err == nil {
		t.Error("stopped a server that was given by URL")
	}
	if err := given.Close(); err != nil {
		t.Error(err)
	}
	jetStream(t, running.URL) // Close must have left it alone

	if err := running.Stop(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := StartNATS(ctx, NATSConfig{URL: running.URL}); err == nil {
		t.Error("no error for a server that is down")
	}
}

func BenchmarkNATS(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		srv, err := StartNATS(b.Context(), NATSConfig{})
		if err != nil {
			b.Fatal(err)
		}
		if err := srv.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

func startNATS(t *testing.T, cfg NATSConfig) *NATS {
	t.Helper()
	srv, err := StartNATS(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	})
	return srv
}

func jetStream(t *testing.T, url string) nats.JetStreamContext {
	t.Helper()
	nc, err := nats.Connect(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := nc.JetStream()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.AccountInfo(); err != nil {
		t.Fatal(err)
	}
	return js
}
