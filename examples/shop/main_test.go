package main

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider/postridertest"
)

// asShop makes this test binary the shop itself, for the tests that need processes to kill.
const asShop = "SHOP_TEST_AS_SHOP"

func TestMain(m *testing.M) {
	if os.Getenv(asShop) != "" {
		main()
	}
	os.Exit(postridertest.Main(m))
}

// bench is the servers of one test.
type bench struct {
	*testing.T
	nats *postridertest.NATSServer
	db   *pgxpool.Pool
}

func setup(t *testing.T) *bench {
	t.Helper()
	return &bench{t, postridertest.NewNATS(t), postridertest.Postgres(t)}
}

func (b *bench) servers() []string {
	return []string{"-nats", b.nats.URL, "-postgres", b.db.Config().ConnString()}
}

// shop runs the shop in this process to its end and returns its exit code and what it printed.
func (b *bench) shop(stdin string, args ...string) (code int, out string) {
	b.Helper()
	var both bytes.Buffer
	code = run(b.Context(), append(b.servers(), args...), strings.NewReader(stdin), &both, &both)
	b.Log(both.String())
	return code, both.String()
}

// process starts the shop as a process of its own. It is killed when the test ends.
func (b *bench) process(stdin io.Reader, args ...string) *exec.Cmd {
	b.Helper()
	exe, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.CommandContext(context.WithoutCancel(b.Context()), exe, append(b.servers(), args...)...)
	cmd.Env = append(os.Environ(), asShop+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, b.Output(), b.Output()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { kill(cmd) })
	return cmd
}

// kill ends a process as kill -9 does.
func kill(cmd *exec.Cmd) {
	_ = cmd.Process.Kill() // it may have ended
	_ = cmd.Wait()
}

func wantCode(t *testing.T, got, want int) {
	t.Helper()
	if got != want {
		t.Fatalf("exit code %d, want %d", got, want)
	}
}

func wantText(t *testing.T, out string, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !strings.Contains(out, text) {
			t.Errorf("the output does not say %q", text)
		}
	}
}

// sampleLines are the lines of the sample's orders.
func sampleLines(t *testing.T) []string {
	t.Helper()
	data, err := sample.ReadFile("sample/orders.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		all = append(all, s.Text())
	}
	return all
}
