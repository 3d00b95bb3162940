package devstack

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// PgBouncer is a private PgBouncer in transaction mode in front of a PostgreSQL, for tests of what must work through one.
type PgBouncer struct {
	// URL is where clients connect; the databases are those of the server.
	URL string

	folder *folder
	server *exec.Cmd
	exited chan struct{}
}

// pgBouncerConfig has few server connections, so that transactions of one client come to many of them. The server's password in
// plain text is what it needs to answer the server's challenge.
const pgBouncerConfig = `[databases]
* = host=%s port=%d
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = scram-sha-256
auth_file = %s
pool_mode = transaction
default_pool_size = 3
max_client_conn = 500
pidfile = %s
`

// StartPgBouncer starts a PgBouncer in front of the PostgreSQL at an address with a password, and returns when it answers. The
// program must be installed (Debian: apt-get install pgbouncer).
func StartPgBouncer(ctx context.Context, postgresURL string) (*PgBouncer, error) {
	program, err := findPgBouncer()
	if err != nil {
		return nil, err
	}
	target, err := pgx.ParseConfig(postgresURL)
	if err != nil {
		return nil, fmt.Errorf("devstack: pgbouncer: %w", err)
	}
	account, err := postgresAccount() // it refuses to run as root, too
	if err != nil {
		return nil, fmt.Errorf("devstack: pgbouncer: %w", err)
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	dir, err := newFolder("", "postrider-pgbouncer-", false, account)
	if err != nil {
		return nil, fmt.Errorf("devstack: pgbouncer: %w", err)
	}
	p := &PgBouncer{folder: dir, exited: make(chan struct{})}
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword(target.User, target.Password), Host: loopback(port),
		Path: target.Database, RawQuery: "sslmode=disable",
	}
	p.URL = u.String()
	if err := p.launch(program, account, target, port); err != nil {
		return nil, errors.Join(fmt.Errorf("devstack: pgbouncer: %w", err), dir.close())
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	ctx, stop := untilExit(ctx, p.exited)
	defer stop(nil)
	if err := waitReady(ctx, p.URL, true); err != nil {
		log, _ := os.ReadFile(filepath.Join(dir.path, "log"))
		return nil, errors.Join(fmt.Errorf("devstack: start pgbouncer: %w\n%s", err, log), p.Close())
	}
	return p, nil
}

func findPgBouncer() (string, error) {
	for _, name := range []string{"pgbouncer", "/usr/sbin/pgbouncer"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", errors.New("devstack: no pgbouncer on this machine: apt-get install pgbouncer")
}

func (p *PgBouncer) launch(program string, account *account, target *pgx.ConnConfig, port int) error {
	path := func(name string) string { return filepath.Join(p.folder.path, name) }
	quote := func(s string) string { return `"` + strings.ReplaceAll(s, `"`, `""`) + `"` }
	data := path("data") // where the folder's guard looks for whom to end
	if err := os.Mkdir(data, 0o700); err != nil {
		return err
	}
	if err := account.own(data); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"users": quote(target.User) + " " + quote(target.Password) + "\n",
		"config": fmt.Sprintf(pgBouncerConfig, target.Host, target.Port, port, path("users"),
			filepath.Join(data, "postmaster.pid")),
	} {
		if err := os.WriteFile(path(name), []byte(text), 0o600); err != nil {
			return err
		}
		if err := account.own(path(name)); err != nil {
			return err
		}
	}
	log, err := os.Create(path("log"))
	if err != nil {
		return err
	}
	defer log.Close()
	p.server = exec.Command(program, path("config"))
	p.server.Dir, p.server.SysProcAttr = p.folder.path, account.process()
	p.server.Stdout, p.server.Stderr = log, log
	if err := p.server.Start(); err != nil {
		return fmt.Errorf("%s on port %d: %w", program, port, err)
	}
	go func() {
		_ = p.server.Wait() // why it ended is in its log
		close(p.exited)
	}()
	return nil
}

// Close ends it, with all connections through it.
func (p *PgBouncer) Close() error {
	_ = p.server.Process.Signal(syscall.SIGTERM) // it may have ended by itself
	select {
	case <-p.exited:
	case <-time.After(stopTimeout):
		_ = p.server.Process.Kill()
		<-p.exited
	}
	return p.folder.close()
}
