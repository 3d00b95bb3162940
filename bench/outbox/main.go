package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"

	"github.com/postrider/postrider/bench/internal/harness"
	"github.com/postrider/postrider/internal/devstack"
)

func main() {
	harness.Program{Name: "outbox", Serve: serve, Work: work, Measure: measure}.Main()
}

// plan is what to measure.
type plan = harness.Plan[cell, peer]

func parseFlags(args []string) (*plan, error) {
	var p plan
	flags := flag.NewFlagSet("outbox", flag.ContinueOnError)
	size := flags.Int("size", 256, "bytes of data in a message")
	if err := p.Parse(flags, args, allCells(), nil, allPeers()); err != nil {
		return nil, err
	}
	if *size < 64 || *size > 512<<10 {
		return nil, fmt.Errorf("-size: %d: want 64 to %d bytes", *size, 512<<10)
	}
	p.Sizes = []int{*size}
	return &p, nil
}

// serve is the role of the servers: both durable, PostgreSQL with its defaults but for room to write, lest checkpoints
// come in the middle.
func serve(ctx context.Context, always bool, in io.Reader, out io.Writer) error {
	stack, err := devstack.Start(ctx, devstack.Config{
		NATS:     devstack.NATSConfig{SyncDefault: !always},
		Postgres: devstack.PostgresConfig{Private: true, Settings: map[string]string{"max_wal_size": "8GB"}},
	})
	if err != nil {
		return err
	}
	return errors.Join(harness.Serve([]string{stack.NATSURL, stack.PostgresURL}, in, out), stack.Close())
}

func measure(ctx context.Context, args []string, out io.Writer) error {
	p, err := parseFlags(args)
	if err != nil {
		return err
	}
	results, err := p.Measure(ctx, func(peer peer, c cell, round int) bool {
		return peer.does(c) && (c.kind != idle || round == 0) // what does nothing varies little
	})
	if err != nil {
		return err
	}
	return report(out, p, results)
}
