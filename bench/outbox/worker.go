package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider/bench/internal/harness"
)

// work is the role of a worker: one peer, which does the jobs that come in, until there are no more.
func work(ctx context.Context, name string, servers []string, in io.Reader, out io.Writer) error {
	i := slices.IndexFunc(allPeers(), func(p peer) bool { return p.name == name })
	if i < 0 {
		return fmt.Errorf("there is no peer %q", name)
	}
	w, err := newWorker(ctx, allPeers()[i], servers[0], servers[1])
	if err != nil {
		return err
	}
	defer w.close()
	return harness.Work(ctx, in, out, w.do)
}

type worker struct {
	peer  peer
	url   string        // of the database that is nobody's
	admin *pgxpool.Pool // on it
	nc    *nats.Conn
	js    jetstream.JetStream
}

func newWorker(ctx context.Context, p peer, natsURL, postgresURL string) (*worker, error) {
	w := &worker{peer: p, url: postgresURL}
	var err error
	if w.admin, err = pgxpool.New(ctx, postgresURL); err != nil {
		return nil, err
	}
	if w.nc, err = nats.Connect(natsURL); err != nil {
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
	i := slices.IndexFunc(allCells(), func(c cell) bool { return c.String() == j.Cell })
	if i < 0 {
		return result{}, fmt.Errorf("there is no cell %q", j.Cell)
	}
	r := &cellRun{cell: allCells()[i], job: j, admin: w.admin, pad: strings.Repeat("x", max(0, j.Size-len(`{"number":,"pad":""}`)-6))}
	name := harness.StreamName()
	if r.stream, err = createStream(ctx, w.js, name); err != nil {
		return result{}, err
	}
	defer func() { err = errors.Join(err, w.js.DeleteStream(context.WithoutCancel(ctx), name)) }()

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
	if r.session, err = w.peer.open(ctx, site{pool: r.pool, nc: nc, js: js, stream: name}); err != nil {
		return result{}, fmt.Errorf("open: %w", err)
	}
	return r.run(ctx)
}
