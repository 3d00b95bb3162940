package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider/bench/internal/harness"
	"github.com/postrider/postrider/internal/devstack"
)

// The roles that this program starts itself in.
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

// addresses are those of the servers.
type addresses struct{ NATS, Postgres string }

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
	err = json.NewEncoder(out).Encode(addresses{stack.NATSURL, stack.PostgresURL})
	_, _ = io.Copy(io.Discard, in)
	return errors.Join(err, stack.Close())
}

// work is the role of a worker: one peer, which does the jobs that come in, until there are no more.
func work(ctx context.Context, name, natsURL, postgresURL string, in io.Reader, out io.Writer) error {
	i := slices.IndexFunc(allPeers(), func(p peer) bool { return p.name == name })
	if i < 0 {
		return fmt.Errorf("there is no peer %q", name)
	}
	w, err := newWorker(ctx, allPeers()[i], addresses{natsURL, postgresURL})
	if err != nil {
		return err
	}
	defer w.close()
	return harness.Answer(in, out, func(j job) result {
		r, err := w.do(ctx, j)
		if err != nil {
			r.Err = err.Error()
		}
		return r
	})
}

type worker struct {
	peer  peer
	url   string        // of the database that is nobody's
	admin *pgxpool.Pool // on it
	nc    *nats.Conn
	js    jetstream.JetStream
}

func newWorker(ctx context.Context, p peer, at addresses) (*worker, error) {
	w := &worker{peer: p, url: at.Postgres}
	var err error
	if w.admin, err = pgxpool.New(ctx, at.Postgres); err != nil {
		return nil, err
	}
	if w.nc, err = nats.Connect(at.NATS); err != nil {
		w.admin.Close()
		return nil, err
	}
	w.js, err = jetstream.New(w.nc)
	return w, err
}

func (w *worker) close() {
	w.nc.Close()
	w.admin.Close()
}

// do does one job with a new database and a new stream, which are deleted afterwards.
func (w *worker) do(ctx context.Context, j job) (_ result, err error) {
	ctx, cancel := context.WithTimeout(ctx, jobTimeout*3/4)
	defer cancel()
	i := slices.IndexFunc(allCells(), func(c cell) bool { return c.String() == j.Cell })
	if i < 0 {
		return result{}, fmt.Errorf("there is no cell %q", j.Cell)
	}
	r := &cellRun{cell: allCells()[i], job: j, admin: w.admin, pad: strings.Repeat("x", max(0, j.Size-len(`{"number":,"pad":""}`)-6))}
	if r.stream, err = createStream(ctx, w.js); err != nil {
		return result{}, err
	}
	defer func() { err = errors.Join(err, w.js.DeleteStream(context.WithoutCancel(ctx), streamName)) }()

	r.database = fmt.Sprintf("bench_%s_%d", strings.ReplaceAll(w.peer.name, "-", "_"), time.Now().UnixNano())
	if _, err = w.admin.Exec(ctx, "create database "+r.database+" template template0"); err != nil {
		return result{}, err
	}
	defer func() {
		_, dropErr := w.admin.Exec(context.WithoutCancel(ctx), "drop database "+r.database+" with (force)")
		err = errors.Join(err, dropErr)
	}()
	address, err := url.Parse(w.url)
	if err != nil {
		return result{}, err
	}
	address.Path = "/" + r.database
	cfg, err := pgxpool.ParseConfig(address.String())
	if err != nil {
		return result{}, err
	}
	cfg.MaxConns = 2 * writers
	if r.pool, err = pgxpool.NewWithConfig(ctx, cfg); err != nil {
		return result{}, err
	}
	defer r.pool.Close()

	// A connection of its own, so that what the harness asks the server does not stand behind what is published.
	nc, err := nats.Connect(w.nc.ConnectedUrl())
	if err != nil {
		return result{}, err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return result{}, err
	}
	if r.session, err = w.peer.open(ctx, site{pool: r.pool, nc: nc, js: js}); err != nil {
		return result{}, fmt.Errorf("open: %w", err)
	}
	return r.run(ctx)
}

// meter measures what the process spends.
type meter struct {
	profile *os.File
	cpu     time.Duration
}

func startMeter(j job) (*meter, error) {
	var m meter
	if j.Profile != "" {
		if err := os.MkdirAll(filepath.Dir(j.Profile), 0o750); err != nil {
			return nil, err
		}
		var err error
		if m.profile, err = os.Create(j.Profile); err != nil {
			return nil, err
		}
		if err := pprof.StartCPUProfile(m.profile); err != nil {
			return nil, err
		}
	}
	m.cpu = harness.CPUTime()
	return &m, nil
}

// stop returns what n messages cost.
func (m *meter) stop(n int64) (time.Duration, error) {
	cpu := harness.CPUTime() - m.cpu
	if m.profile != nil {
		pprof.StopCPUProfile()
		if err := m.profile.Close(); err != nil {
			return 0, err
		}
	}
	if n == 0 {
		return 0, errors.New("nothing was done in time")
	}
	return cpu / time.Duration(n), nil
}
