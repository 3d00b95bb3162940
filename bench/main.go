package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/postrider/postrider/bench/internal/harness"
	"github.com/postrider/postrider/internal/devstack"
)

func main() {
	harness.Program{Name: "bench", Serve: serve, Work: work, Measure: measure}.Main()
}

// plan is what to measure.
type plan = harness.Plan[cell, peer]

func parseFlags(args []string) (*plan, error) {
	var p plan
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	sizes := flags.String("sizes", "1024", "comma-separated sizes of the payload in bytes")
	if err := p.Parse(flags, args, allCells(), memoryCells(), allPeers()); err != nil {
		return nil, err
	}
	for size := range strings.SplitSeq(*sizes, ",") {
		n, err := strconv.Atoi(size)
		if err != nil || n < stampSize || n > 512<<10 {
			return nil, fmt.Errorf("-sizes: %q: want %d to %d bytes", size, stampSize, 512<<10)
		}
		p.Sizes = append(p.Sizes, n)
	}
	return &p, nil
}

// serve is the role of the server.
func serve(ctx context.Context, always bool, in io.Reader, out io.Writer) error {
	srv, err := devstack.StartNATS(ctx, devstack.NATSConfig{SyncDefault: !always})
	if err != nil {
		return err
	}
	return errors.Join(harness.Serve([]string{srv.URL}, in, out), srv.Close())
}

func measure(ctx context.Context, args []string, out io.Writer) error {
	p, err := parseFlags(args)
	if err != nil {
		return err
	}
	results, err := p.Measure(ctx, func(peer peer, c cell, _ int) bool { return !slices.Contains(peer.lacks, c.kind) })
	if err != nil {
		return err
	}
	return report(out, p, results)
}
