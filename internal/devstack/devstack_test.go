package devstack

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
)

func TestStart(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	begin := time.Now()
	stack, err := Start(ctx, Config{Postgres: PostgresConfig{Private: true}})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("both servers up in %v", time.Since(begin))

	nc, err := nats.Connect(stack.NATSURL)
	if err != nil {
		t.Fatal(err)
	}
	js, err := nc.JetStream()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.AccountInfo(); err != nil {
		t.Fatalf("JetStream: %v", err)
	}
	nc.Close()

	conn, err := pgx.Connect(ctx, stack.PostgresURL)
	if err != nil {
		t.Fatal(err)
	}
	if got := setting(t, conn, "fsync"); got != "on" {
		t.Errorf("fsync = %s, want on", got)
	}
	if got := setting(t, conn, "server_encoding"); got != "UTF8" {
		t.Errorf("server_encoding = %s, want UTF8", got)
	}
	if err := conn.Close(ctx); err != nil {
		t.Fatal(err)
	}

	folders := []string{stack.NATS.folder.path, stack.Postgres.folder.path}
	if err := stack.Close(); err != nil {
		t.Fatal(err)
	}
	for _, dir := range folders {
		if err := gone(dir); err != nil {
			t.Error(err)
		}
	}
	for _, u := range []string{stack.NATSURL, stack.PostgresURL} {
		if err := refuses(u); err != nil {
			t.Error(err)
		}
	}
}

// A failure of one server must not leave the other behind.
func TestStartFailsWhole(t *testing.T) {
	t.Parallel()
	port := busyPort(t)
	tmp := sharedDir(t)
	for name, cfg := range map[string]Config{
		"nats": {
			NATS:     NATSConfig{Port: port},
			Postgres: PostgresConfig{Private: true, Dir: filepath.Join(tmp, "pg")},
		},
		"postgres": {
			NATS:     NATSConfig{StoreDir: filepath.Join(tmp, "nats")},
			Postgres: PostgresConfig{Private: true, Port: port},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			stack, err := Start(t.Context(), cfg)
			if err == nil {
				stack.Close()
				t.Fatal("started on a port that is taken")
			}
			t.Log(err)
			if _, err := os.Stat(filepath.Join(tmp, "pg", "data", "postmaster.pid")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("PostgreSQL was left running: %v", err)
			}
		})
	}
}

// sharedDir is a temporary folder that the user who runs PostgreSQL may write to as well, as he may to /tmp.
func sharedDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "devstack-test-") //nolint:usetesting // t.TempDir is inside a folder that is closed to others
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777|fs.ModeSticky); err != nil {
		t.Fatal(err)
	}
	return dir
}

// busyPort is a port of 127.0.0.1 that somebody listens on.
func busyPort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().(*net.TCPAddr).Port
}

func gone(path string) error {
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is still there (%v)", path, err)
	}
	return nil
}

func refuses(serverURL string) error {
	u, err := url.Parse(serverURL)
	if err != nil {
		return err
	}
	conn, err := net.Dial("tcp", u.Host)
	if err == nil {
		conn.Close()
		return fmt.Errorf("%s still accepts connections", u.Host)
	}
	return nil
}

func setting(t *testing.T, conn *pgx.Conn, name string) string {
	t.Helper()
	var value string
	if err := conn.QueryRow(t.Context(), `select current_setting($1)`, name).Scan(&value); err != nil {
		t.Fatal(err)
	}
	return value
}
