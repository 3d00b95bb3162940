package harness

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
)

// The roles that a program starts itself in.
const (
	roleServers = "servers"
	roleWorker  = "worker"
)

// Values of the flag -sync.
const (
	syncAlways  = "always"
	syncDefault = "default"
)

const (
	startTimeout = time.Minute
	jobTimeout   = 2 * time.Minute
)

// Program is one of this module's programs, in the three roles that it has: the one that a person starts, and the two that
// it starts itself.
type Program struct {
	Name    string
	Serve   func(ctx context.Context, always bool, in io.Reader, out io.Writer) error // until in ends: see Serve
	Work    func(ctx context.Context, peer string, servers []string, in io.Reader, out io.Writer) error
	Measure func(ctx context.Context, args []string, out io.Writer) error
}

// Main runs the program and ends the process with its exit code if it fails.
func (p Program) Main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := p.run(ctx, os.Args[1:])
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, p.Name+":", err)
		os.Exit(1)
	}
}

func (p Program) run(ctx context.Context, args []string) error {
	switch {
	case len(args) == 2 && args[0] == roleServers:
		return p.Serve(ctx, args[1] == syncAlways, os.Stdin, os.Stdout)
	case len(args) > 2 && args[0] == roleWorker:
		return p.Work(ctx, args[1], args[2:], os.Stdin, os.Stdout)
	default:
		return p.Measure(ctx, args, os.Stdout)
	}
}

// Plan is what to measure: cells of type C, which a table has lines of, with peers of type P, which it has columns of.
type Plan[C, P fmt.Stringer] struct {
	Rounds  int
	Seconds float64 // a measurement takes, more or less
	Sizes   []int   // of what is published, in bytes
	Sync    string
	Cells   []C
	Peers   []P
	Profile string
	Verbose bool

	began time.Time
}

// Parse fills in the plan. Cells are what -cells chooses by default, and more are those that it must name; flags may have some
// of the program's own.
func (p *Plan[C, P]) Parse(flags *flag.FlagSet, args []string, cells, more []C, peers []P) error {
	named := append(append([]C(nil), cells...), more...)
	flags.IntVar(&p.Rounds, "rounds", 3, "how often everything is measured")
	flags.Float64Var(&p.Seconds, "seconds", 0.6, "how long a measurement takes, more or less")
	flags.StringVar(&p.Sync, "sync", syncAlways, `the server's sync_interval: "always" or "default" (2 minutes)`)
	flags.StringVar(&p.Profile, "profile", "", "write a CPU profile of each measurement into this folder")
	flags.BoolVar(&p.Verbose, "v", false, "say on standard error what is measured")
	someCells := flags.String("cells", "", "comma-separated, of: "+strings.Join(Names(named), " ")+
		"; a name without its number stands for all of them (default all"+unless(more)+")")
	somePeers := flags.String("peers", "", "comma-separated, of: "+strings.Join(Names(peers), " ")+" (default all)")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 || p.Rounds < 1 || p.Seconds <= 0 || (p.Sync != syncAlways && p.Sync != syncDefault) {
		flags.Usage()
		return fmt.Errorf("cannot run with %q", args)
	}
	p.Cells, p.Peers = cells, peers
	var err error
	if *someCells != "" {
		p.Cells, err = choose("-cells", *someCells, named)
	}
	if err == nil && *somePeers != "" {
		p.Peers, err = choose("-peers", *somePeers, peers)
	}
	return err
}

func unless[C fmt.Stringer](more []C) string {
	if len(more) == 0 {
		return ""
	}
	return " but " + strings.Join(Names(more), " ")
}

// Job is what a worker is asked to do.
type Job struct {
	Cell    string
	Size    int
	Seconds float64
	Profile string // where the CPU profile goes, if anywhere
}

// Duration is how long to measure.
func (j Job) Duration() time.Duration { return time.Duration(j.Seconds * float64(time.Second)) }

// Measure starts the processes and has the workers do each cell that their peer takes part in. Within a round every cell
// visits all peers one after the other.
func (p *Plan[C, P]) Measure(ctx context.Context, takesPart func(peer P, cell C, round int) bool) (results []Result, err error) {
	p.began = time.Now()
	servers, err := start(ctx, roleServers, p.Sync)
	if err != nil {
		return nil, err
	}
	defer func() { err = cmp.Or(err, servers.end()) }()
	var addresses []string
	if err := servers.receive(&addresses, startTimeout); err != nil {
		return nil, fmt.Errorf("start the %s: %w", roleServers, err)
	}
	workers := make([]*process, len(p.Peers))
	defer func() {
		for _, w := range workers {
			if w != nil {
				err = cmp.Or(err, w.end())
			}
		}
	}()
	for round := range p.Rounds {
		for _, c := range p.Cells {
			for _, size := range p.Sizes {
				for i := range p.Peers {
					i = (i + round) % len(p.Peers) // nobody is always the first
					if !takesPart(p.Peers[i], c, round) {
						continue
					}
					name := p.Peers[i].String()
					if workers[i] == nil {
						if workers[i], err = start(ctx, roleWorker, append([]string{name}, addresses...)...); err != nil {
							return nil, err
						}
					}
					j := Job{Cell: c.String(), Size: size, Seconds: p.Seconds}
					if p.Profile != "" {
						j.Profile = fmt.Sprintf("%s/%s-%s-%d-%d.pprof", p.Profile, name, c, size, round)
					}
					var r Result
					err := workers[i].ask(j, &r, jobTimeout)
					if ctx.Err() != nil {
						return nil, ctx.Err()
					}
					if err != nil { // the next one gets a new worker
						r.Err = err.Error()
						_ = workers[i].end()
						workers[i] = nil
					}
					r.Peer, r.Cell, r.Size, r.Round = name, c.String(), size, round
					results = append(results, r)
					if p.Verbose {
						fmt.Fprintln(os.Stderr, r)
					}
				}
			}
		}
	}
	return results, nil
}
