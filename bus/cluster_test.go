package bus_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
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

// cluster starts three servers that form a cluster and returns their addresses.
func cluster(t *testing.T) string {
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
		srv, err := devstack.StartNATS(t.Context(), devstack.NATSConfig{InMemory: true, Options: func(o *server.Options) {
			o.ServerName = fmt.Sprint("n", i)
			o.Cluster = server.ClusterOpts{Name: "test", Host: "127.0.0.1", Port: ports[i]}
			for _, r := range routes {
				u, _ := url.Parse(r)
				o.Routes = append(o.Routes, u)
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := srv.Close(); err != nil {
				t.Error(err)
			}
		})
		urls = append(urls, srv.URL)
	}
	return strings.Join(urls, ",")
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
	servers := cluster(t)
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
