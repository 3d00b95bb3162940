package devstack

import (
	"context"
	"errors"
)

// Config says which servers [Start] starts. The zero value starts both, in temporary folders and on free ports.
type Config struct {
	NATS     NATSConfig
	Postgres PostgresConfig
}

// Stack is a running nats-server and a running PostgreSQL. Its methods are safe for concurrent use.
type Stack struct {
	NATSURL     string // where clients connect, for example nats://127.0.0.1:21423
	PostgresURL string // of a role that may create databases, with its password

	NATS     *NATS
	Postgres *Postgres
}

// Start starts both servers side by side and returns when both answer. It takes one to three seconds, most of it PostgreSQL's
// initdb; where PostgreSQL must be downloaded, as long as that takes. The caller closes the Stack; if the process dies first,
// the servers end all the same.
func Start(ctx context.Context, cfg Config) (*Stack, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	type natsResult struct {
		srv *NATS
		err error
	}
	started := make(chan natsResult, 1)
	go func() {
		srv, err := StartNATS(ctx, cfg.NATS)
		if err != nil {
			cancel() // PostgreSQL takes longer: do not wait for it in vain
		}
		started <- natsResult{srv, err}
	}()
	pg, pgErr := StartPostgres(ctx, cfg.Postgres)
	n := <-started

	switch {
	case n.err != nil:
		if pg != nil {
			return nil, errors.Join(n.err, pg.Close())
		}
		return nil, n.err
	case pgErr != nil:
		return nil, errors.Join(pgErr, n.srv.Close())
	}
	return &Stack{NATSURL: n.srv.URL, PostgresURL: pg.URL, NATS: n.srv, Postgres: pg}, nil
}

// Close stops the servers that Start started and removes their temporary folders. Servers given by URL go on.
func (s *Stack) Close() error {
	return errors.Join(s.NATS.Close(), s.Postgres.Close())
}
