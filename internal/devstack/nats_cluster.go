package devstack

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// StartNATSCluster starts n servers that form a cluster, with temporary stores, and returns when it has a leader for streams.
func StartNATSCluster(ctx context.Context, n int) (servers []*NATS, err error) {
	defer func() {
		if err != nil {
			for _, s := range servers {
				err = errors.Join(err, s.Close())
			}
			servers = nil
		}
	}()
	ports, routes := make([]int, n), make([]*url.URL, n)
	for i := range n {
		if ports[i], err = freePort(); err != nil {
			return nil, err
		}
		routes[i] = &url.URL{Scheme: "nats-route", Host: loopback(ports[i])}
	}
	for i, p := range ports {
		s, err := StartNATS(ctx, NATSConfig{InMemory: true, Options: func(o *server.Options) {
			o.ServerName = fmt.Sprint("n", i)
			o.Cluster = server.ClusterOpts{Name: "postrider", Host: "127.0.0.1", Port: p}
			o.Routes = routes
		}})
		if err != nil {
			return servers, err
		}
		servers = append(servers, s)
	}
	return servers, waitLeader(ctx, servers[0].URL)
}

// waitLeader returns when streams can be created.
func waitLeader(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	nc, err := nats.Connect(address)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	for {
		try, cancel := context.WithTimeout(ctx, 250*time.Millisecond) // nobody answers while there is none
		_, err = js.AccountInfo(try)
		cancel()
		if err == nil {
			return nil
		}
		if !pause(ctx) {
			return fmt.Errorf("devstack: the cluster has no leader: %w", err)
		}
	}
}
