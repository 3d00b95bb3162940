//go:build unix

package devstack

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// Both servers must end with the process even when it has no chance to end them.
func TestKilledProcess(t *testing.T) {
	t.Parallel()
	tmp := sharedDir(t)
	cmd, out := startChild(t, tmp, temporary)
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
			cmd, _ := startChild(t, tmp, temporary)
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

// A cluster that is kept loses its server all the same. (Without its folder PostgreSQL would notice by itself, after a while.)
func TestKilledProcessKeepsDir(t *testing.T) {
	t.Parallel()
	tmp, dir := sharedDir(t), filepath.Join(sharedDir(t), "pg")
	cmd, out := startChild(t, tmp, dir)
	var report childReport
	if err := json.NewDecoder(out).Decode(&report); err != nil {
		t.Fatalf("child: %v", err)
	}
	kill(t, cmd)
	eventually(t, func() error {
		return errors.Join(refuses(report.PostgresURL), ended(report.Postmaster), empty(tmp))
	})

	again := startPostgres(t, PostgresConfig{Private: true, Dir: dir})
	connect(t, again.URL)
}

// startChild starts this test binary as the process to kill, with its temporary folders in tmp and its cluster at dir.
func startChild(t *testing.T, tmp, dir string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childEnv+"="+dir, "TMPDIR="+tmp)
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
