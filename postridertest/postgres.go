package postridertest

import (
	"context"
	"crypto/rand"
	"errors"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider/internal/devstack"
)

// maxConns bounds a test's pool. The server takes 200 connections, shared by the tests that run at once.
const maxConns = 16

// Postgres returns a pool on an empty database of the test's own, dropped when the test ends. All tests of the process share
// one server, started by the first of them: a private one without fsync, or the one at POSTRIDER_POSTGRES_URL, whose user must
// be allowed to create databases. The pool's Config().ConnString() is the address for further connections.
func Postgres(t testing.TB) *pgxpool.Pool {
	t.Helper()
	server, err := shared.start()
	if err != nil {
		missing(t, err)
	}
	name := "postrider_test_" + strings.ToLower(rand.Text())
	// template0, since template1 may be in use by somebody else on a server that is not ours.
	if err := execute(t.Context(), server.URL, `create database `+name+` template template0`); err != nil {
		t.Fatalf("postridertest: create a database: %v", err)
	}
	t.Cleanup(func() {
		// force: a pool that the test forgot to close is no reason to keep the database.
		if err := execute(context.WithoutCancel(t.Context()), server.URL, `drop database `+name+` with (force)`); err != nil {
			t.Errorf("postridertest: drop the database: %v", err)
		}
	})
	return newPool(t, withDatabase(server.URL, name))
}

// PostgresServer is a private PostgreSQL of one test, which may stop and start it. Its methods are for the test's goroutine: they
// fail the test when they fail.
type PostgresServer struct {
	// URL is where clients connect, as a superuser. It stays the same over Stop and Start.
	URL string

	t   testing.TB
	srv *devstack.Postgres
}

// NewPostgres starts a PostgreSQL for this test alone, which takes about a second; a test that does not stop the server is
// better served by [Postgres]. It ends with the test. Fsync is off, which no crash of the server itself can tell.
func NewPostgres(t testing.TB) *PostgresServer {
	t.Helper()
	srv, err := devstack.StartPostgres(t.Context(), devstack.PostgresConfig{Private: true, InMemory: true})
	if err != nil {
		missing(t, err)
	}
	t.Cleanup(func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	})
	return &PostgresServer{URL: srv.URL, t: t, srv: srv}
}

// Pool returns a new pool on the server's database, closed when the test ends.
func (s *PostgresServer) Pool() *pgxpool.Pool {
	s.t.Helper()
	return newPool(s.t, s.URL)
}

// Stop ends the server in order: connections break, open transactions are rolled back. The data is kept for Start.
func (s *PostgresServer) Stop() {
	s.t.Helper()
	if err := s.srv.Stop(); err != nil {
		s.t.Fatal(err)
	}
}

// Kill ends the server at once, as a crash would. What was committed is there after Start.
func (s *PostgresServer) Kill() {
	s.t.Helper()
	if err := s.srv.Kill(); err != nil {
		s.t.Fatal(err)
	}
}

// Start starts a stopped server again, on the same port and with the data it had, and returns when it answers.
func (s *PostgresServer) Start() {
	s.t.Helper()
	if err := s.srv.Start(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
}

// PgBouncer returns a pool on the same database as another one, through a PgBouncer of the test's own in transaction mode, which
// takes about a tenth of a second. The mode is how pgx sends statements: PgBouncer before 1.21 bears neither its default nor
// QueryExecModeDescribeExec. Without the program the test is skipped, or fails where CI is "true".
func PgBouncer(t testing.TB, direct *pgxpool.Pool, mode pgx.QueryExecMode) *pgxpool.Pool {
	t.Helper()
	bouncer, err := devstack.StartPgBouncer(t.Context(), direct.Config().ConnString())
	if err != nil {
		missing(t, err)
	}
	t.Cleanup(func() {
		if err := bouncer.Close(); err != nil {
			t.Error(err)
		}
	})
	cfg, err := pgxpool.ParseConfig(bouncer.URL)
	if err != nil {
		t.Fatal(err)
	}
	cfg.MaxConns, cfg.ConnConfig.DefaultQueryExecMode = maxConns, mode
	pool, err := pgxpool.NewWithConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

// newPool connects to the address and closes the pool when the test ends.
func newPool(t testing.TB, address string) *pgxpool.Pool {
	t.Helper()
	cfg, err := pgxpool.ParseConfig(address)
	if err != nil {
		t.Fatal(err)
	}
	cfg.MaxConns = maxConns
	pool, err := pgxpool.NewWithConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

// withDatabase returns the address, in either of PostgreSQL's two notations, with another database.
func withDatabase(address, name string) string {
	u, err := url.Parse(address)
	if err != nil || u.Scheme == "" {
		return address + " dbname=" + name // keyword=value: the last one counts
	}
	u.Path = "/" + name
	return u.String()
}

func execute(ctx context.Context, address, sql string) error {
	conn, err := pgx.Connect(ctx, address)
	if err != nil {
		return err
	}
	_, err = conn.Exec(ctx, sql)
	return errors.Join(err, conn.Close(ctx))
}

// shared is the PostgreSQL that the tests of this process share. It is a package variable because testing gives no other place
// to what outlives a test.
var shared sharedPostgres

type sharedPostgres struct {
	mu     sync.Mutex
	server *devstack.Postgres
	err    error
}

// startLimit leaves time for a download.
const startLimit = 3 * time.Minute

// start returns the server, started by the first call. A failure is final: the machine will not change during the tests.
func (s *sharedPostgres) start() (*devstack.Postgres, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.server == nil && s.err == nil {
		// Not the test's context: the server outlives the test that happens to be first.
		ctx, cancel := context.WithTimeout(context.Background(), startLimit)
		defer cancel()
		s.server, s.err = devstack.StartPostgres(ctx, devstack.PostgresConfig{InMemory: true})
	}
	return s.server, s.err
}

func (s *sharedPostgres) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.server == nil {
		return nil
	}
	return s.server.Close()
}
