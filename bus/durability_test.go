package bus_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/internal/devstack"
	"github.com/postrider/postrider/internal/wiredoc"
)

// startNATS starts a server of the test's own and connects.
func startNATS(t *testing.T, cfg devstack.NATSConfig, options ...nats.Option) (*devstack.NATS, *nats.Conn) {
	t.Helper()
	cfg.InMemory = true
	srv, err := devstack.StartNATS(t.Context(), cfg)
	for range 4 { // another process may have taken the monitoring port
		if err != nil {
			srv, err = devstack.StartNATS(t.Context(), cfg)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	})
	nc, err := nats.Connect(srv.URL, append(options, nats.MaxReconnects(-1), nats.ReconnectWait(10*time.Millisecond))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return srv, nc
}

// accounts configures a server as docs/wire.md shows it, and adds a user "mute" who may not publish to $SYS.
func accounts(t *testing.T) string {
	t.Helper()
	return strings.Replace(wiredoc.Text(t, "text accounts"), "users: [", `users: [
		{user: mute, password: secret, permissions: {publish: {deny: "$SYS.>"}}}, `, 1)
}

func options(t *testing.T, config string) func(*server.Options) {
	t.Helper()
	return func(o *server.Options) {
		if err := o.ProcessConfigString(config); err != nil {
			t.Error(err)
		}
	}
}

// monitored adds a monitoring port to a server's options, a new one each time that they are applied.
func monitored(t *testing.T, set func(*server.Options), address *string) func(*server.Options) {
	t.Helper()
	return func(o *server.Options) {
		if set != nil {
			set(o)
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Error(err)
			return
		}
		defer l.Close()
		o.HTTPHost, o.HTTPPort = "127.0.0.1", l.Addr().(*net.TCPAddr).Port
		*address = fmt.Sprintf("http://127.0.0.1:%d/", o.HTTPPort)
	}
}

// logText collects what the bus logs.
type logText struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestDurability(t *testing.T) {
	t.Parallel()
	noImport := strings.NewReplacer("imports:", "# imports:").Replace
	for name, tt := range map[string]struct {
		cfg     devstack.NATSConfig
		user    string
		monitor bool
		want    bus.Proof
		finding string
	}{
		"imported":              {devstack.NATSConfig{Options: options(t, accounts(t))}, "app", false, bus.Proved, "stream NOTES is on one server"},
		"imported, not synced":  {devstack.NATSConfig{SyncDefault: true, Options: options(t, accounts(t))}, "app", false, bus.Disproved, "every 2m0s"},
		"not permitted":         {devstack.NATSConfig{Options: options(t, accounts(t))}, "mute", false, bus.NotProved, "this user may not publish"},
		"not imported":          {devstack.NATSConfig{Options: options(t, noImport(accounts(t)))}, "app", false, bus.NotProved, "does not import"},
		"no accounts":           {devstack.NATSConfig{}, "", false, bus.NotProved, "does not import"},
		"monitored":             {devstack.NATSConfig{}, "", true, bus.Proved, "stream NOTES is on one server"},
		"monitored, not synced": {devstack.NATSConfig{SyncDefault: true}, "", true, bus.Disproved, "set sync_interval: always"},
		"monitored, not permitted": {
			devstack.NATSConfig{Options: options(t, accounts(t))}, "mute", true, bus.Proved, "stream NOTES is on one server",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			monitors := make([]string, 0, 1)
			if tt.monitor {
				monitors = monitors[:1]
				tt.cfg.Options = monitored(t, tt.cfg.Options, &monitors[0])
			}
			_, nc := startNATS(t, tt.cfg, nats.UserInfo(tt.user, "secret"), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
			for _, require := range []bool{false, true} {
				var text logText
				b := newBus(t, nc, func(c *bus.Config) {
					c.RequireDurable, c.Monitors, c.Logger = require, monitors, slog.New(slog.NewTextHandler(&text, nil))
				})
				d, err := b.Durability(t.Context())
				if err != nil || d.Proof != tt.want || !strings.Contains(strings.Join(d.Findings, "; "), tt.finding) {
					t.Errorf("durability is %s, %q, %v; want %s with %q", d.Proof, d.Findings, err, tt.want, tt.finding)
				}
				err = noted.Publish(t.Context(), b, &note{})
				if refused := errors.Is(err, postrider.FailedPrecondition) && strings.Contains(err.Error(), tt.finding); refused != (require && tt.want != bus.Proved) {
					t.Errorf("required: %v: Publish says %v", require, err)
				}
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, 1)
				go func() { done <- b.Run(ctx) }()
				if require && tt.want != bus.Proved {
					if err := <-done; !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), tt.finding) {
						t.Errorf("Run says %v", err)
					}
				} else {
					<-b.Started()
					cancel()
					if err := <-done; err != nil {
						t.Error(err)
					}
					if n := strings.Count(text.String(), "durability=\""+tt.want.String()) + strings.Count(text.String(), "durability="+tt.want.String()); n != 1 {
						t.Errorf("the log says %d times that durability is %s: %s", n, tt.want, text.String())
					}
				}
				cancel()
			}
		})
	}
}

// TestDurabilityOfStreams has streams that cannot be durable whatever the server does.
func TestDurabilityOfStreams(t *testing.T) {
	t.Parallel()
	_, nc := startNATS(t, devstack.NATSConfig{Options: options(t, accounts(t))}, nats.UserInfo("app", "secret"))
	js := jetStream(t, nc)
	for _, cfg := range []jetstream.StreamConfig{
		{Name: "MEMORY", Subjects: []string{"memory.>"}, Storage: jetstream.MemoryStorage},
		{Name: "ASYNC", Subjects: []string{"async.>"}, PersistMode: jetstream.AsyncPersistMode},
	} {
		if _, err := js.CreateStream(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
	}
	// Declared, it is refused.
	b := newBus(t, nc, func(c *bus.Config) { c.Streams = []bus.Stream{{Name: "ASYNC", Topics: []string{"async.>"}}} })
	m := func(topic string) *postrider.Message { return &postrider.Message{ID: "1", Type: topic} }
	if err := b.Publish(t.Context(), m("async.a")); !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), "persist_mode async") {
		t.Errorf("a declared stream with persist_mode async: %v", err)
	}
	// Another's stream is refused where durability is required.
	for _, require := range []bool{false, true} {
		b := newBus(t, nc, func(c *bus.Config) { c.RequireDurable = require })
		for topic, want := range map[string]string{"memory.a": "kept in memory", "async.a": "persist_mode async"} {
			err := b.Publish(t.Context(), m(topic))
			if refused := errors.Is(err, postrider.FailedPrecondition) && strings.Contains(err.Error(), want); refused != require {
				t.Errorf("required: %v: publish to %s: %v", require, topic, err)
			}
		}
		if err := b.Publish(t.Context(), m("notes.a")); err != nil {
			t.Error(err)
		}
	}
}

// TestDurabilityIsProvedAgain restarts the server with another sync setting under a bus that requires durability.
func TestDurabilityIsProvedAgain(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	always := true
	set := options(t, accounts(t))
	srv, nc := startNATS(t, devstack.NATSConfig{StoreDir: t.TempDir(), Options: func(o *server.Options) {
		mu.Lock()
		defer mu.Unlock()
		set(o)
		o.SyncAlways = always
	}}, nats.UserInfo("app", "secret"))
	b := newBus(t, nc, func(c *bus.Config) { c.RequireDurable = true })
	if err := noted.Publish(t.Context(), b, &note{}); err != nil {
		t.Fatal(err)
	}
	if err := srv.Stop(); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	always = false
	mu.Unlock()
	if err := srv.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := noted.Publish(t.Context(), b, &note{}); !errors.Is(err, postrider.FailedPrecondition) {
		t.Errorf("error is %v, want FailedPrecondition: the server does not sync any more", err)
	}
}
