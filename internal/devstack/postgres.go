package devstack

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// PostgresURLEnv is the environment variable with the address of a PostgreSQL to use instead of a private one.
const PostgresURLEnv = "POSTRIDER_POSTGRES_URL"

// PostgresConfig configures [StartPostgres]. The zero value uses the server at POSTRIDER_POSTGRES_URL, or else starts a
// private one on a free port, with temporary data that is as durable as PostgreSQL's defaults make it.
type PostgresConfig struct {
	// URL is a server that runs already; its role must be allowed to create databases. It is checked, nothing is started,
	// and of the fields below none is used. Default: POSTRIDER_POSTGRES_URL.
	URL string

	// Private starts a server of our own even if POSTRIDER_POSTGRES_URL is set, for who wants to stop and start it.
	Private bool

	// Dir keeps the cluster after Close, and is where it starts from if it holds one. Default: a temporary folder that goes
	// with the server.
	Dir string

	// Port to listen on, at 127.0.0.1. Default: a free one.
	Port int

	// InMemory switches fsync off and puts a temporary cluster into memory where the system offers that with 2 GiB to spare.
	// For tests: it survives a crash of PostgreSQL, not one of the machine.
	InMemory bool

	// Settings are more server settings, such as "wal_level": "logical".
	Settings map[string]string

	// Logger tells about a download, which may take a minute. Nil is silent.
	Logger *slog.Logger

	binaries binaries // what tests change to have a machine without PostgreSQL
}

// Postgres is a PostgreSQL, private or given by URL. Its methods are safe for concurrent use.
type Postgres struct {
	// URL is where clients connect, with the name and the password of a role that may create databases. It stays the same
	// over Stop and Start.
	URL string

	cfg     PostgresConfig
	folder  *folder // nil: the server was given by URL
	bin     string
	account *account
	secret  string // the superuser's password

	mu     sync.Mutex
	server *exec.Cmd // nil: stopped
	exited chan struct{}
}

const (
	startTimeout = 30 * time.Second
	stopTimeout  = 10 * time.Second
)

// StartPostgres starts a PostgreSQL, or checks the one that is given, and returns when it answers. Without one the error names
// the three ways to have one.
func StartPostgres(ctx context.Context, cfg PostgresConfig) (*Postgres, error) {
	if cfg.URL != "" {
		return existingPostgres(ctx, cfg.URL, "PostgresConfig.URL")
	}
	if url := os.Getenv(PostgresURLEnv); url != "" && !cfg.Private {
		return existingPostgres(ctx, url, PostgresURLEnv)
	}

	account, err := postgresAccount()
	if err != nil {
		return nil, noPostgres(err)
	}
	bin, err := cfg.binaries.find(ctx, account, cmp.Or(cfg.Logger, slog.New(slog.DiscardHandler)))
	if err != nil {
		return nil, noPostgres(err)
	}
	dir, err := newFolder(cfg.Dir, "postrider-postgres-", cfg.InMemory, account)
	if err != nil {
		return nil, fmt.Errorf("devstack: postgres cluster: %w", err)
	}
	p := &Postgres{cfg: cfg, folder: dir, bin: bin, account: account}
	if err := p.create(ctx); err != nil {
		return nil, errors.Join(err, dir.close())
	}
	if err := p.startOnFreePort(ctx); err != nil {
		return nil, errors.Join(err, dir.close())
	}
	return p, nil
}

// noPostgres says what to do when there is none to be had.
func noPostgres(cause error) error {
	return fmt.Errorf(`devstack: no PostgreSQL to be had: %w
There are three ways out:
  1. set %s to a PostgreSQL that runs, postgres://user:password@host:5432/database, whose user may create databases;
  2. install PostgreSQL (apt-get install postgresql, brew install postgresql), so that its initdb and postgres are found;
  3. let this machine download it, once, about 10 MB: it needs to reach the internet, directly or by HTTPS_PROXY`, cause, PostgresURLEnv)
}

func existingPostgres(ctx context.Context, url, from string) (*Postgres, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	if err := waitReady(ctx, url, false); err != nil {
		return nil, fmt.Errorf("devstack: connect to the PostgreSQL given by %s: %w", from, err)
	}
	return &Postgres{URL: url}, nil
}

func (p *Postgres) startOnFreePort(ctx context.Context) error {
	if p.cfg.Port != 0 {
		return p.Start(ctx)
	}
	var err error
	for range portTries {
		if p.cfg.Port, err = freePort(); err != nil {
			return err
		}
		if err = p.Start(ctx); err == nil || !strings.Contains(err.Error(), "Address already in use") {
			return err
		}
	}
	return err
}

// Start starts a stopped server again, on the same port and with the data it had. After Kill it recovers from its log first.
func (p *Postgres) Start(ctx context.Context) error {
	if p.folder == nil {
		return fmt.Errorf("devstack: start postgres: %w", errNotOurs)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.server != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()

	p.URL = fmt.Sprintf("postgres://%s:%s@%s/postgres?sslmode=disable", superuser, p.secret, loopback(p.cfg.Port))
	if err := p.launch(); err != nil {
		return fmt.Errorf("devstack: start postgres: %w", err)
	}
	ctx, stop := untilExit(ctx, p.exited)
	defer stop(nil)
	if err := waitReady(ctx, p.URL, true); err != nil {
		logged := p.logTail()
		p.end(syscall.SIGQUIT)
		return fmt.Errorf("devstack: start postgres on %s: %w%s", loopback(p.cfg.Port), err, logged)
	}
	return nil
}

// Stop ends the server in order (fast shutdown: open transactions are rolled back) and keeps its port and data for Start.
func (p *Postgres) Stop() error { return p.stop(syscall.SIGINT) }

// Kill ends the server at once, without a checkpoint, as a crash would: the next Start recovers from the log.
func (p *Postgres) Kill() error { return p.stop(syscall.SIGQUIT) }

func (p *Postgres) stop(sig syscall.Signal) error {
	if p.folder == nil {
		return fmt.Errorf("devstack: stop postgres: %w", errNotOurs)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.end(sig)
	return nil
}

// Close ends the server and removes its data, unless Dir was given. A server given by URL goes on.
func (p *Postgres) Close() error {
	if p.folder == nil {
		return nil
	}
	sig := syscall.SIGINT
	if p.folder.temp {
		sig = syscall.SIGQUIT // nobody reads this data again: no checkpoint
	}
	return errors.Join(p.stop(sig), p.folder.close())
}

// data is the cluster's directory. The guard of the folder knows it too.
func (p *Postgres) data() string { return filepath.Join(p.folder.path, "data") }
