package bus_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
)

// The instances of failover_test.go are processes: this test binary, started with memberEnv. They share the keys of one subscription, and
// what a handler does is to ask the ledger in the test's process, before and after, as it would a database.
const (
	memberEnv  = "POSTRIDER_TEST_MEMBER"
	memberURL  = "POSTRIDER_TEST_NATS"
	memberKeys = 60
	answerPark = "park" // of the ledger
)

// deed is what a member tells the ledger.
type deed struct {
	Member, Key string
	N           int
	Fence       uint64
}

// member is the main function of such a process. It ends with the process that started it.
func member(name string) error {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	nc, err := nats.Connect(os.Getenv(memberURL), nats.MaxReconnects(-1), nats.ReconnectWait(10*time.Millisecond))
	if err != nil {
		return err
	}
	defer nc.Close()
	b, err := bus.New(nc, bus.Config{
		Source: "//test/" + name, Group: "tester",
		Streams: []bus.Stream{{Name: "NOTES", Topics: []string{"notes.>"}, Partitions: 16}},
		Logger:  slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if err != nil {
		return err
	}
	ask := func(ctx context.Context, what string, e postrider.Event[note]) error {
		data, err := json.Marshal(deed{Member: name, Key: e.Value.Text, N: e.Value.N, Fence: e.Delivery.Fence})
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		answer, err := nc.RequestWithContext(ctx, "ledger."+what, data)
		if err == nil && len(answer.Data) > 0 {
			err = errors.New(string(answer.Data))
		}
		if err != nil && err.Error() == answerPark {
			err = postrider.Park(err)
		}
		return err
	}
	h := keyed.Handler(func(ctx context.Context, e postrider.Event[note]) error {
		if err := ask(ctx, "begin", e); err != nil {
			return err
		}
		return ask(ctx, "end", e)
	})
	patient := bus.Retry(postrider.RetryPolicy{Attempts: -1, Initial: time.Millisecond, Max: 100 * time.Millisecond})
	if err := b.Subscribe(h, bus.Ordered(), bus.From(bus.DeliverAll), patient); err != nil {
		return err
	}
	go func() { <-b.Started(); fmt.Println("started") }()
	return b.Run(ctx)
}
