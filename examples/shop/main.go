// Command shop is the demo of Postrider: a shop of four services that carries orders through stock, payments and
// shipping with events, commands and a saga, and proves at the end that nothing was lost or done twice. README.md beside
// this file is the guide.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/devstack"
	"github.com/postrider/postrider/rpc"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// options are the command line.
type options struct {
	orders, products, customers string
	stockFactor                 int64
	nats, postgres              string
	service                     string
	health, chaos, verbose      bool
	seed                        uint64
	parallel                    int
	timeout                     time.Duration
}

func parseOptions(args []string, stderr io.Writer) (*options, error) {
	o := &options{}
	f := flag.NewFlagSet("shop", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.orders, "orders", "", "JSON lines of orders, - for standard input (default: a small sample)")
	f.StringVar(&o.products, "products", "", "JSON lines of products, to go with -orders")
	f.StringVar(&o.customers, "customers", "", "JSON lines of customers, to go with -orders; may be left out")
	f.Int64Var(&o.stockFactor, "stock-factor", 1, "multiply the stock of each product")
	f.StringVar(&o.nats, "nats", "", "address of a nats-server with JetStream (default: one is started)")
	f.StringVar(&o.postgres, "postgres", "", "address of a PostgreSQL database (default: one is started)")
	f.StringVar(&o.service, "service", "", "run only this: orders, stock, payments, shipping, or loader (default: all)")
	f.BoolVar(&o.health, "health", false, "ask the service named by -service if it is well, and exit with 0 or 1")
	f.BoolVar(&o.chaos, "chaos", false, "kill services, cut connections and double messages meanwhile")
	f.Uint64Var(&o.seed, "seed", 0, "seed of -chaos (default: a new one, which is printed)")
	f.IntVar(&o.parallel, "parallel", 64, "orders under way at a time")
	f.DurationVar(&o.timeout, "timeout", 2*time.Minute, "how long to wait for one order, or for the services")
	f.BoolVar(&o.verbose, "v", false, "log what the services log")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	return o, o.check(f.Args())
}

func (o *options) check(rest []string) error {
	services := append(serviceNames(), "loader", "")
	switch {
	case len(rest) > 0:
		return fmt.Errorf("unknown argument %q: there are only flags", rest[0])
	case !slices.Contains(services, o.service):
		return fmt.Errorf("-service %q: want one of %q", o.service, services[:len(services)-1])
	case o.health && (o.service == "" || o.service == "loader" || o.nats == ""):
		return errors.New("-health needs -service and -nats")
	case o.service == "loader" && o.nats == "":
		return errors.New("-service loader needs -nats, where the services are")
	case o.service != "" && o.service != "loader" && !o.health && (o.nats == "" || o.postgres == ""):
		return errors.New("-service needs -nats and -postgres, since the services must meet")
	case (o.orders == "") != (o.products == ""):
		return errors.New("-orders and -products go together")
	case o.stockFactor < 1 || o.stockFactor > 1_000_000:
		return fmt.Errorf("-stock-factor %d: want 1 to 1000000", o.stockFactor)
	case o.parallel < 1 || o.parallel > 10_000:
		return fmt.Errorf("-parallel %d: want 1 to 10000", o.parallel)
	case o.chaos && o.service != "":
		return errors.New("-chaos is for all services in one process")
	default:
		return nil
	}
}

func serviceNames() []string { return []string{"orders", "stock", "payments", "shipping"} }

// run is the program. It returns the exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	o, err := parseOptions(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintln(stderr, "shop:", err)
		return 2
	}
	at := servers{nats: o.nats, postgres: o.postgres, log: o.logger(stderr)}
	good := true
	switch o.service {
	case "":
		good, err = o.runAll(ctx, at, stdin, stdout)
	case "loader":
		good, err = o.load(ctx, at, nil, stdin, stdout)
	default:
		if o.health {
			err = o.ping(ctx)
		} else {
			err = (&host{name: o.service, build: builders()[o.service], at: at}).Run(ctx)
		}
	}
	if err != nil {
		fmt.Fprintln(stderr, "shop:", err)
	}
	if err != nil || !good {
		return 1
	}
	return 0
}

// logger logs what an operator of a service needs. A demo in one process shows nothing but its report.
func (o *options) logger(w io.Writer) *slog.Logger {
	switch {
	case o.verbose:
		return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
	case o.service != "":
		return slog.New(slog.NewTextHandler(w, nil))
	default:
		return slog.New(slog.DiscardHandler)
	}
}

// runAll starts the servers that are not given and the four services, and puts the orders through.
func (o *options) runAll(ctx context.Context, at servers, stdin io.Reader, stdout io.Writer) (good bool, err error) {
	begin := time.Now()
	stack, err := devstack.Start(ctx, devstack.Config{
		NATS: devstack.NATSConfig{URL: at.nats}, Postgres: devstack.PostgresConfig{URL: at.postgres, Logger: at.log},
	})
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, stack.Close()) }()
	at.nats, at.postgres = stack.NATSURL, stack.PostgresURL
	fmt.Fprintf(stdout, "nats-server and PostgreSQL are up after %.1f s\n", time.Since(begin).Seconds())

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var hosts []*host
	var parts []postrider.Runner
	for _, name := range serviceNames() {
		h := &host{name: name, build: builders()[name], at: at}
		hosts, parts = append(hosts, h), append(parts, h)
	}
	var breaker *chaos
	if o.chaos {
		if o.seed == 0 {
			o.seed = uint64(rand.Uint32())
		}
		breaker = newChaos(o.seed, hosts, at)
		fmt.Fprintf(stdout, "chaos with -seed %d\n", o.seed)
	}
	served := make(chan error, 1)
	go func() {
		err := postrider.Run(ctx, parts...)
		cancel(err)
		served <- err
	}()
	good, err = o.load(ctx, at, breaker, stdin, stdout)
	cancel(nil)
	if serveErr := <-served; serveErr != nil {
		return false, serveErr // the loader's error follows from it
	}
	return good, err
}

// load puts the orders through the services, wherever they run, and checks their books.
func (o *options) load(ctx context.Context, at servers, breaker *chaos, stdin io.Reader, stdout io.Writer) (bool, error) {
	products, customers, err := o.readStock()
	if err != nil {
		return false, err
	}
	in, err := openInput(o.orders, "orders.jsonl", stdin)
	if err != nil {
		return false, err
	}
	defer in.Close()
	nc, err := connect("loader", at.nats)
	if err != nil {
		return false, err
	}
	defer nc.Close()
	client, err := rpc.NewClient(nc, rpc.ClientConfig{Source: "//shop/loader", Prefix: prefix})
	if err != nil {
		return false, err
	}
	defer client.Close()

	waiting, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	for _, name := range serviceNames() {
		if err := await(waiting, nc, name); err != nil {
			return false, err
		}
	}
	l := &loader{
		client: client, parallel: o.parallel, patience: o.timeout, twice: breaker.twice, progress: newProgress(stdout, in.size),
	}
	if breaker != nil {
		l.pace = 20 * time.Millisecond // a small sample must not be over before anything breaks
	}
	if err := l.loadStock(waiting, products, customers, o.stockFactor); err != nil {
		return false, err
	}
	fmt.Fprintf(stdout, "%s are up, placing orders, %d at a time\n", strings.Join(serviceNames(), ", "), o.parallel)
	begin := time.Now()
	err = breaker.during(ctx, func() error { return l.run(ctx, in) })
	took := time.Since(begin)
	l.progress.end()
	if err != nil {
		return false, err
	}
	if breaker != nil {
		fmt.Fprintln(stdout, "chaos", breaker)
	}
	b, checks, err := l.settle(ctx, 30*time.Second)
	if err != nil {
		return false, err
	}
	return report(stdout, &l.tally, b, checks, took), nil
}

// readStock reads the files of products and customers. Orders without customers are fine: nobody has a limit then.
func (o *options) readStock() (products []Product, customers []Customer, err error) {
	if products, err = readAll[Product](o.products, "products.jsonl"); err != nil {
		return nil, nil, err
	}
	if o.customers != "" || o.orders == "" {
		customers, err = readAll[Customer](o.customers, "customers.jsonl")
	}
	return products, customers, err
}

// ping is the health check.
func (o *options) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	nc, err := connect("health", o.nats)
	if err != nil {
		return err
	}
	defer nc.Close()
	return ping(ctx, nc, o.service)
}
