package devstack

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const superuser = "postgres"

// create makes the cluster, if the folder does not hold one. Loopback is not private on a shared machine, so a random
// password guards it; it is kept beside the data for a later process.
func (p *Postgres) create(ctx context.Context) error {
	file := filepath.Join(p.folder.path, "password")
	if _, err := os.Stat(filepath.Join(p.data(), "PG_VERSION")); err == nil {
		secret, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("devstack: the cluster in %s is not ours: %w", p.folder.path, err)
		}
		p.secret = string(secret)
		return nil
	}

	p.secret = rand.Text()
	if err := os.WriteFile(file, []byte(p.secret), 0o600); err != nil {
		return fmt.Errorf("devstack: postgres password: %w", err)
	}
	if err := p.account.own(file); err != nil {
		return fmt.Errorf("devstack: postgres password: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	// The cluster is new: until a server has run on it there is nothing that a sync would save.
	cmd := exec.CommandContext(ctx, filepath.Join(p.bin, "initdb"), "--pgdata="+p.data(), "--username="+superuser,
		"--pwfile="+file, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync")
	p.prepare(cmd)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("devstack: %s: %w\n%s", cmd.Path, errors.Join(err, ctx.Err()), out)
	}
	return nil
}

// prepare makes cmd run as the cluster's owner, whatever the environment of this process says about PostgreSQL.
func (p *Postgres) prepare(cmd *exec.Cmd) {
	cmd.Dir = p.folder.path
	cmd.SysProcAttr = p.account.process()
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "PG") && !strings.HasPrefix(v, "LC_") && !strings.HasPrefix(v, "LANG") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Env = append(cmd.Env, "LC_ALL=C", "TZ=UTC")
}

// launch starts the postmaster. Its log goes to a file: a pipe to us would block it once we are gone.
func (p *Postgres) launch() error {
	logFile, err := os.Create(p.logPath())
	if err != nil {
		return err
	}
	defer logFile.Close()

	settings := map[string]string{
		"listen_addresses":        "127.0.0.1",
		"port":                    strconv.Itoa(p.cfg.Port),
		"unix_socket_directories": "", // their paths must be short, and TCP is enough
		"max_connections":         "200",
	}
	if p.cfg.InMemory {
		settings["fsync"], settings["full_page_writes"] = "off", "off"
		settings["max_wal_size"] = "256MB"
	}
	maps.Copy(settings, p.cfg.Settings)
	cmd := exec.Command(filepath.Join(p.bin, "postgres"), "-D", p.data())
	for name, value := range settings {
		cmd.Args = append(cmd.Args, "-c", name+"="+value)
	}
	p.prepare(cmd)
	cmd.Stdout, cmd.Stderr = logFile, logFile
	if err := cmd.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait() // why it ended is in its log
		close(exited)
	}()
	p.server, p.exited = cmd, exited
	return nil
}

// end signals the postmaster and waits until it is gone. A shutdown that hangs becomes an immediate one, and that a kill.
func (p *Postgres) end(sig syscall.Signal) {
	if p.server == nil {
		return
	}
	for _, s := range []syscall.Signal{sig, syscall.SIGQUIT, syscall.SIGKILL} {
		_ = p.server.Process.Signal(s) // it may have ended by itself
		t := time.NewTimer(stopTimeout)
		select {
		case <-p.exited:
		case <-t.C:
			continue
		}
		t.Stop()
		break
	}
	// After a crash the pid stays in this file, and may be somebody else's by the time the guard reads it.
	_ = os.Remove(filepath.Join(p.data(), "postmaster.pid"))
	p.server = nil
}

func (p *Postgres) logPath() string { return filepath.Join(p.folder.path, "postgres.log") }

// logTail returns the last lines of the server's log, each on a line of its own.
func (p *Postgres) logTail() string {
	text, err := os.ReadFile(p.logPath())
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return "\n" + strings.Join(lines[max(0, len(lines)-10):], "\n")
}

var errExited = errors.New("the server ended")

// untilExit is ctx, ended also by the end of the server, with errExited as its cause.
func untilExit(ctx context.Context, exited <-chan struct{}) (context.Context, context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-exited:
			cancel(errExited)
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// waitReady returns nil when the server answers a query, and an error when ctx ends. An answer such as a wrong password ends
// the wait for a server that is not ours, for it stays wrong. Our own cannot give one: it comes from somebody who took the
// port, and ours is about to end.
func waitReady(ctx context.Context, url string, ours bool) error {
	cfg, err := pgx.ParseConfig(url)
	if err != nil {
		return err
	}
	var last error
	for {
		conn, err := pgx.ConnectConfig(ctx, cfg)
		if err == nil {
			err = conn.Ping(ctx)
			conn.Close(context.WithoutCancel(ctx))
		}
		if err == nil {
			return nil
		}
		if last == nil || ctx.Err() == nil {
			last = err // the last true answer, rather than that the time is over
		}
		var answer *pgconn.PgError
		if !ours && errors.As(err, &answer) && answer.Code != "57P03" { // cannot_connect_now: starting, or recovering
			return err
		}
		if !pause(ctx) {
			if cause := context.Cause(ctx); errors.Is(cause, errExited) {
				return cause
			}
			return last
		}
	}
}
