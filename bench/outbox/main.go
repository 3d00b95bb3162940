package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/postrider/postrider/bench/internal/harness"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Stdin, os.Stdout)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "outbox:", err)
		os.Exit(1)
	}
}

// run is the program in its three roles: the one that a person starts, and the two that it starts itself.
func run(ctx context.Context, args []string, in io.Reader, out io.Writer) error {
	switch {
	case len(args) == 2 && args[0] == roleServers:
		return serve(ctx, args[1] == syncAlways, in, out)
	case len(args) == 4 && args[0] == roleWorker:
		return work(ctx, args[1], args[2], args[3], in, out)
	default:
		p, err := parseFlags(args)
		if err != nil {
			return err
		}
		return measure(ctx, p, out)
	}
}

// plan is what to measure.
type plan struct {
	rounds  int
	seconds float64
	size    int
	sync    string
	cells   []cell
	peers   []peer
	profile string
	verbose bool
}

func parseFlags(args []string) (plan, error) {
	var p plan
	flags := flag.NewFlagSet("outbox", flag.ContinueOnError)
	flags.IntVar(&p.rounds, "rounds", 3, "how often everything is measured")
	flags.Float64Var(&p.seconds, "seconds", 0.6, "how long a measurement takes, more or less")
	flags.IntVar(&p.size, "size", 256, "bytes of data in a message")
	flags.StringVar(&p.sync, "sync", syncAlways, `the server's sync_interval: "always" or "default" (2 minutes)`)
	flags.StringVar(&p.profile, "profile", "", "write a CPU profile of each measurement into this folder")
	flags.BoolVar(&p.verbose, "v", false, "say on standard error what is measured")
	cells := flags.String("cells", "all", "comma-separated, of: "+strings.Join(harness.Names(allCells()), " "))
	peers := flags.String("peers", "all", "comma-separated, of: "+strings.Join(harness.Names(allPeers()), " "))
	if err := flags.Parse(args); err != nil {
		return p, err
	}
	if flags.NArg() > 0 || p.rounds < 1 || p.seconds <= 0 || p.size < 64 || p.size > 512<<10 || (p.sync != syncAlways && p.sync != syncDefault) {
		flags.Usage()
		return p, fmt.Errorf("cannot run with %q", args)
	}
	same := func(a, b string) bool { return a == b }
	var err error
	if p.cells, err = harness.Choose("-cells", *cells, allCells(), same); err != nil {
		return p, err
	}
	p.peers, err = harness.Choose("-peers", *peers, allPeers(), same)
	return p, err
}

// measure starts the processes, has them work through the plan and writes the report.
func measure(ctx context.Context, p plan, out io.Writer) (err error) {
	began := time.Now()
	servers, err := harness.Start(ctx, roleServers, p.sync)
	if err != nil {
		return err
	}
	defer func() { err = cmp.Or(err, servers.End()) }()
	var at addresses
	if err := servers.Receive(&at, startTimeout); err != nil {
		return fmt.Errorf("start the servers: %w", err)
	}
	workers := make([]*harness.Process, len(p.peers))
	defer func() {
		for _, w := range workers {
			if w != nil {
				err = cmp.Or(err, w.End())
			}
		}
	}()
	var results []result
	for round := range p.rounds {
		for _, c := range p.cells {
			for i := range p.peers {
				i = (i + round) % len(p.peers) // nobody is always the first
				name := p.peers[i].name
				if !p.peers[i].does(c) || c.kind == idle && round > 0 { // what does nothing varies little
					continue
				}
				if workers[i] == nil {
					if workers[i], err = harness.Start(ctx, roleWorker, name, at.NATS, at.Postgres); err != nil {
						return err
					}
				}
				j := job{Cell: c.String(), Size: p.size, Seconds: p.seconds}
				if p.profile != "" {
					j.Profile = fmt.Sprintf("%s/%s-%s-%d.pprof", p.profile, name, c, round)
				}
				var r result
				err := workers[i].Ask(j, &r, jobTimeout)
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if err != nil { // the next one gets a new worker
					r.Err = err.Error()
					_ = workers[i].End()
					workers[i] = nil
				}
				r.Peer, r.Cell, r.Round = name, c.String(), round
				results = append(results, r)
				if p.verbose {
					fmt.Fprintln(os.Stderr, r.line())
				}
			}
		}
	}
	return report(out, p, results, time.Since(began))
}
