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
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/postrider/postrider/bench/internal/harness"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Stdin, os.Stdout)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run is the program in its three roles: the one that a person starts, and the two that it starts itself.
func run(ctx context.Context, args []string, in io.Reader, out io.Writer) error {
	switch {
	case len(args) == 2 && args[0] == roleServer:
		return serve(ctx, args[1] == syncAlways, in, out)
	case len(args) == 3 && args[0] == roleWorker:
		return work(ctx, args[1], args[2], in, out)
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
	sync    string
	cells   []cell
	sizes   []int
	peers   []peer
	profile string
	verbose bool
}

func parseFlags(args []string) (plan, error) {
	var p plan
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.IntVar(&p.rounds, "rounds", 3, "how often everything is measured")
	flags.Float64Var(&p.seconds, "seconds", 0.7, "how long a measurement takes")
	flags.StringVar(&p.sync, "sync", syncAlways, `the server's sync_interval: "always" or "default" (2 minutes)`)
	flags.StringVar(&p.profile, "profile", "", "write a CPU profile of each measurement into this folder")
	flags.BoolVar(&p.verbose, "v", false, "say on standard error what is measured")
	cellNames := flags.String("cells", "all", "comma-separated beginnings of cells: "+strings.Join(harness.Names(namedCells()), " "))
	peerNames := flags.String("peers", "all", "comma-separated, of: "+strings.Join(harness.Names(allPeers()), " "))
	sizes := flags.String("sizes", "1024", "comma-separated sizes of the payload in bytes")
	if err := flags.Parse(args); err != nil {
		return p, err
	}
	if flags.NArg() > 0 || p.rounds < 1 || p.seconds <= 0 || (p.sync != syncAlways && p.sync != syncDefault) {
		flags.Usage()
		return p, fmt.Errorf("cannot run with %q", args)
	}
	for size := range strings.SplitSeq(*sizes, ",") {
		n, err := strconv.Atoi(size)
		if err != nil || n < stampSize || n > 512<<10 {
			return p, fmt.Errorf("-sizes: %q: want %d to %d bytes", size, stampSize, 512<<10)
		}
		p.sizes = append(p.sizes, n)
	}
	var err error
	p.cells = allCells()
	if *cellNames != "all" {
		p.cells, err = harness.Choose("-cells", *cellNames, namedCells(), strings.HasPrefix)
	}
	if err != nil {
		return p, err
	}
	p.peers, err = harness.Choose("-peers", *peerNames, allPeers(), func(a, b string) bool { return a == b })
	return p, err
}

// measure starts the processes, has them work through the plan and writes the report.
func measure(ctx context.Context, p plan, out io.Writer) (err error) {
	began := time.Now()
	srv, err := harness.Start(ctx, roleServer, p.sync)
	if err != nil {
		return err
	}
	defer func() { err = cmp.Or(err, srv.End()) }()
	var url string
	if err := srv.Receive(&url, startTimeout); err != nil {
		return fmt.Errorf("start the server: %w", err)
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
			for _, size := range p.sizes {
				for i := range p.peers {
					i = (i + round) % len(p.peers) // nobody is always the first
					name := p.peers[i].name
					if slices.Contains(p.peers[i].lacks, c.kind) {
						continue
					}
					if workers[i] == nil {
						if workers[i], err = harness.Start(ctx, roleWorker, name, url); err != nil {
							return err
						}
					}
					j := job{Cell: c.String(), Size: size, Seconds: p.seconds, Profile: p.profileFile(name, c, size, round)}
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
					r.Peer, r.Cell, r.Size, r.Round = name, c.String(), size, round
					results = append(results, r)
					if p.verbose {
						fmt.Fprintln(os.Stderr, r.line())
					}
				}
			}
		}
	}
	return report(out, p, results, time.Since(began))
}

func (p plan) profileFile(peer string, c cell, size, round int) string {
	if p.profile == "" {
		return ""
	}
	return fmt.Sprintf("%s/%s-%s-%d-%d.pprof", p.profile, peer, c, size, round)
}
