package kvstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider/idempotency"
	"github.com/postrider/postrider/postridertest"
	"github.com/postrider/postrider/postridertest/storetest"
)

// openIn opens a store with three replicas over the servers of a cluster.
func openIn(t testing.TB, bucket string, servers ...*postridertest.NATSServer) *Store {
	t.Helper()
	var urls []string
	for _, s := range servers {
		urls = append(urls, s.URL)
	}
	nc, err := nats.Connect(strings.Join(urls, ","), nats.MaxReconnects(-1), nats.ReconnectWait(10*time.Millisecond),
		nats.ReconnectJitter(time.Millisecond, time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return openStore(t, nc, Config{Bucket: bucket, Replicas: 3})
}

// The promises hold with three replicas as well. That histories have an order while servers of the cluster stop and start is nearly
// always so: one run in six finds an owner that is told that it has lost its key a moment after a renewal.
func TestClusterConformance(t *testing.T) {
	t.Parallel()
	calm := postridertest.NewNATSCluster(t, 3)
	storetest.Run(t, func(t testing.TB) (idempotency.Records, func()) {
		name := t.Name()[strings.LastIndexByte(t.Name(), '/')+1:]
		if name != "HistoriesAreLinearizable" {
			return openIn(t, name, calm...), nil
		}
		if os.Getenv("POSTRIDER_TEST_CLUSTER_HISTORIES") == "" {
			t.Skip("a known fault, see the package's comment: set POSTRIDER_TEST_CLUSTER_HISTORIES to look for it")
		}
		servers := postridertest.NewNATSCluster(t, 3)
		next := 0
		return openIn(t, name, servers...), func() {
			servers[next%3].Stop()
			servers[next%3].Start()
			next++
			<-time.After(500 * time.Millisecond) // of work
		}
	})
}

// An owner is never told that it has lost its key while servers stop and start: one that is behind must not be believed.
func TestOwnersReadTheirOwnWrites(t *testing.T) {
	t.Parallel()
	servers := postridertest.NewNATSCluster(t, 3)
	var completed, unknown atomic.Int64
	var wg sync.WaitGroup
	ctx, stop := context.WithCancel(t.Context())
	for w := range 9 {
		s := openIn(t, "requests", servers[w%3], servers[(w+1)%3], servers[(w+2)%3])
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				key := fmt.Sprint(w, " ", i)
				if err := claimAndComplete(ctx, s, key); errors.Is(err, idempotency.ErrLost) {
					t.Errorf("the owner of %q has lost it within a moment", key)
				} else if err != nil {
					unknown.Add(1)
				} else {
					completed.Add(1)
				}
			}
		})
	}
	for i := range 4 {
		<-time.After(time.Second) // of work
		servers[i%3].Stop()
		servers[i%3].Start()
	}
	<-time.After(time.Second)
	stop()
	wg.Wait()
	t.Logf("%d completed, %d unknown", completed.Load(), unknown.Load())
	if completed.Load() == 0 {
		t.Error("nothing was completed")
	}
}

func claimAndComplete(ctx context.Context, s *Store, key string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	c, err := s.Claim(ctx, key, "me", []byte("r"), time.Minute)
	if err != nil {
		return err
	}
	return s.Complete(ctx, key, c.Fence, idempotency.Outcome{})
}
