package bus_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/internal/devstack"
	"github.com/postrider/postrider/postridertest"
)

// cluster starts three servers that form a cluster, each with what dirs has for it if there is anything, and returns them with
// their addresses.
func cluster(t *testing.T, dirs ...string) (nodes []*devstack.NATS, servers string) {
	t.Helper()
	var ports []int
	var routes, urls []string
	for range 3 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		ports, routes = append(ports, port), append(routes, fmt.Sprintf("nats-route://127.0.0.1:%d", port))
	}
	for i := range 3 {
		cfg := devstack.NATSConfig{InMemory: true, Options: func(o *server.Options) {
			o.ServerName = fmt.Sprint("n", i)
			o.Cluster = server.ClusterOpts{Name: "test", Host: "127.0.0.1", Port: ports[i]}
			for _, r := range routes {
				u, _ := url.Parse(r)
				o.Routes = append(o.Routes, u)
			}
		}}
		if len(dirs) > 0 {
			cfg.InMemory, cfg.StoreDir, cfg.SyncDefault = false, dirs[i], true
		}
		srv, err := devstack.StartNATS(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := srv.Close(); err != nil {
				t.Error(err)
			}
		})
		nodes, urls = append(nodes, srv), append(urls, srv.URL)
	}
	return nodes, strings.Join(urls, ",")
}

// In a cluster with three replicas nothing is lost or refused when the leaders of stream and consumer step down.
func TestThreeReplicas(t *testing.T) {
	t.Parallel()
	const notes = 400
	connect := func(servers string) *nats.Conn {
		nc, err := nats.Connect(servers, nats.MaxReconnects(-1), nats.ReconnectWait(10*time.Millisecond))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	_, servers := cluster(t)
	nc := connect(servers)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	b := newBus(t, nc, func(c *bus.Config) {
		c.Streams[0].Replicas, c.DeadLetters.Replicas = 3, 3
		c.PublishTimeout = time.Minute // elections on a busy machine
	})
	var got seen
	h := noted.Handler(func(_ context.Context, e postrider.Event[note]) error {
		if e.Value.N == 7 {
			return postrider.Permanent(errors.New("seven"))
		}
		got.add(*e.Value)
		return nil
	})
	parks := keyed.Handler(func(context.Context, postrider.Event[note]) error { return postrider.Park(errors.New("broken")) })
	err = errors.Join(b.Subscribe(h), b.Subscribe(h, bus.Group("ordered"), bus.Ordered()), b.Subscribe(parks, bus.Group("parks"), bus.Ordered()))
	if err != nil {
		t.Fatal(err)
	}
	start(t, b) // also before the cluster has a leader
	for _, name := range []string{"NOTES", "DEAD_LETTERS", "SCHEDULES", "PARKED"} {
		if cfg := streamConfig(t, nc, name); cfg.Replicas != 3 {
			t.Errorf("stream %s has %d replicas", name, cfg.Replicas)
		}
	}
	stepDown := func(what string) {
		postridertest.Eventually(t, func() error { // a leader that is just being elected cannot
			msg, err := nc.Request("$JS.API."+what, nil, 5*time.Second)
			if err == nil && !strings.Contains(string(msg.Data), `"success":true`) {
				err = fmt.Errorf("%s: %s", what, msg.Data)
			}
			return err
		})
	}
	for i := range notes {
		switch i {
		case notes / 4:
			stepDown("STREAM.LEADER.STEPDOWN.NOTES")
		case notes / 2:
			stepDown("CONSUMER.LEADER.STEPDOWN.NOTES." + durable)
		}
		if i%2 == 0 {
			if err := noted.Publish(t.Context(), b, &note{N: i}, postrider.Key(fmt.Sprint(i%5))); err != nil {
				t.Fatal(err)
			}
			continue
		}
		m, err := noted.Message(t.Context(), &note{N: i}, postrider.Delay(time.Millisecond))
		if err == nil {
			err = b.Publish(t.Context(), m)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	stepDown("STREAM.LEADER.STEPDOWN.PARKED")
	publishKeyed(t, b, 20, 0, 3)
	parkedKeys(t, b, bus.ParkedFilter{Group: "parks"}, 60)
	postridertest.Eventually(t, wantCount(got.distinct, notes-1))
	waitLetters(t, b, bus.LetterFilter{}, 2)
	s, err := js.Stream(t.Context(), "NOTES")
	if err != nil {
		t.Fatal(err)
	}
	if n := s.CachedInfo().State.Msgs; n != notes+60 {
		t.Errorf("the stream has %d messages, want %d", n, notes+60)
	}
}

// A cluster that loses one disk, or is restarted, has lost nothing, and nothing is sent again; one that loses the ends of all its
// disks gets them again.
func TestRelayOnACluster(t *testing.T) {
	t.Parallel()
	base, ctx := t.TempDir(), t.Context()
	var dirs []string
	for i := range 3 {
		dirs = append(dirs, filepath.Join(base, fmt.Sprint(i)))
	}
	nodes, servers := cluster(t, dirs...)
	f := newFickleOn(t, servers, func(c *bus.Config) { c.Streams[0].Replicas, c.PublishTimeout = 3, time.Minute })
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	// settled waits until all replicas have all.
	settled := func() {
		t.Helper()
		postridertest.Eventually(t, func() error {
			s, err := f.js.Stream(ctx, "NOTES")
			if err != nil {
				return err
			}
			c := s.CachedInfo().Cluster
			if c == nil || c.Leader == "" || len(c.Replicas) != 2 {
				return fmt.Errorf("cluster %+v", c)
			}
			for _, r := range c.Replicas {
				if !r.Current || r.Offline || r.Lag > 0 {
					return fmt.Errorf("replica %+v", r)
				}
			}
			return nil
		})
	}
	more := func() {
		t.Helper()
		f.publish(30)
		f.wantAll()
		f.wantMark(f.n)
		settled()
	}
	whole := func(after string) {
		t.Helper()
		if log := f.log.String(); strings.Contains(log, "has lost") {
			t.Errorf("after %s:\n%s", after, log)
		}
	}
	more()
	stream, err := f.js.Stream(ctx, "NOTES")
	must(err)
	var leader int
	if _, err := fmt.Sscanf(stream.CachedInfo().Cluster.Leader, "n%d", &leader); err != nil {
		t.Fatal(err)
	}
	must(nodes[leader].Stop(), os.RemoveAll(dirs[leader]))
	f.publish(10)
	must(nodes[leader].Start(ctx))
	more()
	whole("the leader's disk was lost")
	for _, node := range nodes {
		must(node.Stop())
	}
	f.publish(10)
	for _, node := range nodes {
		must(node.Start(ctx))
	}
	more()
	whole("a restart of all")

	for _, dir := range dirs {
		postridertest.Eventually(t, func() error { // files come and go
			return errors.Join(os.RemoveAll(dir+".kept"), os.CopyFS(dir+".kept", os.DirFS(dir)))
		})
	}
	more()
	for i, node := range nodes {
		must(node.Stop(), os.RemoveAll(dirs[i]), os.Rename(dirs[i]+".kept", dirs[i]))
	}
	f.publish(10)
	for _, node := range nodes {
		must(node.Start(ctx))
	}
	more()
	if log := f.log.String(); !strings.Contains(log, "has lost") {
		t.Errorf("the ends of all disks were lost:\n%s", log)
	}
}
