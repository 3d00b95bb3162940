package devstack

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
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

// Both servers must end with the process even when it has no chance to end them.
func TestKilledProcess(t *testing.T) {
	t.Parallel()
	tmp := sharedDir(t)
	cmd, out := startChild(t, tmp)
	var report childReport
	if err := json.NewDecoder(out).Decode(&report); err != nil {
		t.Fatalf("child: %v", err)
	}
	for _, dir := range report.Folders {
		if gone(dir) == nil || filepath.Dir(dir) != tmp {
			t.Fatalf("the child's folder %s is not in %s", dir, tmp)
		}
	}
	kill(t, cmd)

	eventually(t, func() error {
		return errors.Join(refuses(report.NATSURL), refuses(report.PostgresURL), ended(report.Postmaster), empty(tmp))
	})
}

// The same in the middle of the start, when initdb may be running and no server is up yet.
func TestKilledWhileStarting(t *testing.T) {
	t.Parallel()
	// What is there at the moment of the kill: folders only, a cluster in the making, a starting server.
	for _, seen := range []string{"postrider-postgres-*", "postrider-postgres-*/data/base", "postrider-postgres-*/postgres.log"} {
		t.Run(filepath.Base(seen), func(t *testing.T) {
			t.Parallel()
			tmp := sharedDir(t)
			cmd, _ := startChild(t, tmp)
			eventually(t, func() error {
				if found, _ := filepath.Glob(filepath.Join(tmp, seen)); len(found) == 0 {
					return fmt.Errorf("%s did not appear", seen)
				}
				return nil
			})
			kill(t, cmd)
			eventually(t, func() error { return empty(tmp) })
		})
	}
}

// startChild starts this test binary as the process to kill, with its temporary folders in tmp.
func startChild(t *testing.T, tmp string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childEnv+"=1", "TMPDIR="+tmp)
	cmd.Stderr = t.Output()
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	out := bufio.NewReader(pipe)
	if line, err := out.ReadString('\n'); err != nil || line != "starting\n" {
		t.Fatalf("child said %q, %v", line, err)
	}
	return cmd, out
}

func kill(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // says that it was killed
}

// sharedDir is a temporary folder that the user who runs PostgreSQL may write to as well, as he may to /tmp.
func sharedDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "devstack-test-") // t.TempDir is inside a folder that is closed to others
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

func empty(dir string) error {
	entries, err := os.ReadDir(dir)
	if err == nil && len(entries) > 0 {
		err = fmt.Errorf("%s still holds %v", dir, entries)
	}
	return err
}

// ended reports a process that runs. One that is dead but not yet reaped by its new parent counts as ended.
func ended(pid int) error {
	if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)); err == nil && strings.Contains(string(stat), "State:\tZ") {
		return nil
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("process %d still runs (%v)", pid, err)
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
