package postridertest

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider/internal/devstack"
)

func TestNATSIsTheTestsOwn(t *testing.T) {
	t.Parallel()
	for range 2 {
		js := stream(t, NATS(t))
		names := js.StreamNames(t.Context())
		for name := range names.Name() {
			t.Errorf("stream %s on a new server", name)
		}
		addStream(t, js)
	}
}

func TestNATSRestart(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	srv := NewNATS(t)
	nc := srv.Connect()
	js := stream(t, nc)
	addStream(t, js)
	if _, err := js.Publish(ctx, "s", nil); err != nil {
		t.Fatal(err)
	}

	srv.Stop()
	Eventually(t, func() error {
		if nc.IsConnected() {
			return errors.New("still connected to a stopped server")
		}
		return nil
	})
	srv.Start()

	Eventually(t, func() error {
		_, err := js.Publish(ctx, "s", nil)
		return err
	})
	s, err := js.Stream(ctx, "S")
	if err != nil {
		t.Fatal(err)
	}
	if got := s.CachedInfo().State.Msgs; got != 2 {
		t.Errorf("%d messages after the restart, want the one from before and the one from after", got)
	}
}

func TestPostgresIsTheTestsOwn(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	a, b := Postgres(t), Postgres(t)
	if _, err := a.Exec(ctx, `create table here ()`); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Exec(ctx, `create table here ()`); err != nil {
		t.Errorf("the second database is not empty: %v", err)
	}
	if _, err := pgx.Connect(ctx, a.Config().ConnString()); err != nil {
		t.Errorf("a connection of the test's own: %v", err)
	}
}

func TestPostgresDropsTheDatabase(t *testing.T) {
	t.Parallel()
	var name string
	t.Run("user", func(t *testing.T) {
		pool := Postgres(t)
		name = pool.Config().ConnConfig.Database
		// A connection that the test forgets must not keep the database.
		conn, err := pgx.Connect(context.WithoutCancel(t.Context()), pool.Config().ConnString())
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.Ping(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	var there bool
	if err := Postgres(t).QueryRow(t.Context(), `select exists (select from pg_database where datname = $1)`, name).Scan(&there); err != nil {
		t.Fatal(err)
	}
	if name == "" || there {
		t.Errorf("database %q is left: %v", name, there)
	}
}

func TestPostgresRestart(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	srv := NewPostgres(t)
	pool := srv.Pool()
	if _, err := pool.Exec(ctx, `create table kept ()`); err != nil {
		t.Fatal(err)
	}
	for _, stop := range []func(){srv.Stop, srv.Kill} {
		stop()
		if _, err := pool.Exec(ctx, `select from kept`); err == nil {
			t.Error("a stopped server answers")
		}
		srv.Start()
		Eventually(t, func() error {
			_, err := pool.Exec(ctx, `select from kept`)
			return err
		})
	}
}

func TestPostgresFromEnvironment(t *testing.T) { // not parallel: it sets the environment
	srv := NewPostgres(t)
	t.Setenv(devstack.PostgresURLEnv, srv.URL)
	var s sharedPostgres
	got, err := s.start()
	if err != nil {
		t.Fatal(err)
	}
	if got.URL != srv.URL {
		t.Errorf("shared server at %s, want the given one", got.URL)
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	if err := srv.Pool().Ping(t.Context()); err != nil {
		t.Errorf("the given server does not answer after close: %v", err)
	}
}

func TestWithDatabase(t *testing.T) {
	t.Parallel()
	for _, address := range []string{
		"postgres://me:p%40ss@db.example:5433/old?sslmode=disable",
		"host=db.example port=5433 user=me password=p@ss dbname=old sslmode=disable",
	} {
		cfg, err := pgx.ParseConfig(withDatabase(address, "new"))
		if err != nil {
			t.Fatal(err)
		}
		if cfg.Database != "new" || cfg.Host != "db.example" || cfg.Port != 5433 || cfg.User != "me" || cfg.Password != "p@ss" {
			t.Errorf("%s: got %s at %s:%d as %s", address, cfg.Database, cfg.Host, cfg.Port, cfg.User)
		}
	}
}

func TestMissingServer(t *testing.T) { // not parallel: it sets the environment
	for ci, want := range map[string]string{"true": "fatal", "": "skip"} {
		t.Setenv("CI", ci)
		fake := &fakeTB{TB: t}
		missing(fake, errors.New("no server"))
		if fake.outcome != want || !strings.Contains(fake.said, "no server") {
			t.Errorf("CI=%q: %s %q, want %s and the reason", ci, fake.outcome, fake.said, want)
		}
	}
}

func stream(t *testing.T, nc *nats.Conn) jetstream.JetStream {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return js
}

func addStream(t *testing.T, js jetstream.JetStream) {
	t.Helper()
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}}); err != nil {
		t.Fatal(err)
	}
}
