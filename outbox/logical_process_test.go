//go:build unix

package outbox_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// A relay whose process dies or stands still keeps no slot, and loses no message.
func TestLogicalProcesses(t *testing.T) {
	t.Parallel()
	server := logicalServer(t)
	for name, test := range map[string]func(*testing.T, *pgxpool.Pool, outbox.RelayConfig){
		"killed": testLogicalKilledProcess,
		"frozen": testLogicalFrozenProcess,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool, cfg := logicalSetup(t, server)
			test(t, pool, cfg)
		})
	}
}

// killedEnv makes TestLogicalProcess the process that is killed; its value is the address of its database.
const killedEnv = "POSTRIDER_LOGICAL_RELAY"

// lines tells the ids of what it accepts.
type lines struct{}

func (lines) Publish(_ context.Context, msgs ...*postrider.Message) error {
	var b strings.Builder
	for _, m := range msgs {
		b.WriteString(m.ID + "\n")
	}
	_, err := os.Stdout.WriteString(b.String())
	return err
}

func TestLogicalProcess(t *testing.T) {
	url := os.Getenv(killedEnv)
	if url == "" {
		t.Skip("is run by TestLogicalProcesses")
	}
	pool, err := pgxpool.New(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	ob, err := outbox.New(outbox.Config{Source: "//shop/orders"})
	if err != nil {
		t.Fatal(err)
	}
	cfg := quick(ob)
	cfg.Logical.Mode = outbox.LogicalOn
	relay, err := outbox.NewRelay(pool, lines{}, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := relay.Run(t.Context()); err != nil { // until killed
		t.Fatal(err)
	}
}

// logicalProcess is a relay by logical replication in a process of its own, which tells the ids that it sends.
func logicalProcess(t *testing.T, pool *pgxpool.Pool) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^TestLogicalProcess$")
	cmd.Env = append(os.Environ(), killedEnv+"="+databaseURL(pool))
	cmd.Stderr = t.Output()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	wantSlots(t, pool, 1)
	return cmd, bufio.NewScanner(out)
}

// A process that stands still holds its slot for ten seconds, not longer, and what it has not sent its successor sends.
func testLogicalFrozenProcess(t *testing.T, pool *pgxpool.Pool, cfg outbox.RelayConfig) {
	t.Helper()
	cmd, said := logicalProcess(t, pool)
	msgs := messages(20)
	publish(t, pool, cfg.Outbox, msgs[0])
	if !said.Scan() || said.Text() != "0" {
		t.Fatalf("the relay said %q", said.Text())
	}
	frozen := slot(t, pool)
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	publish(t, pool, cfg.Outbox, msgs[1:10]...)
	b := &broker{}
	start(t, pool, b, cfg)
	postridertest.Eventually(t, func() error {
		if got := b.ids(); len(got) == 0 || got[len(got)-1] != "9" {
			return fmt.Errorf("accepted %q", got)
		}
		return nil
	})
	wantRows(t, pool, `pg_replication_slots where slot_name = '`+frozen+`'`, 0)
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil { // it lives and waits
		t.Fatal(err)
	}
	publish(t, pool, cfg.Outbox, msgs[10:]...)
	postridertest.Eventually(t, func() error {
		if got := b.ids(); got[len(got)-1] != "19" {
			return fmt.Errorf("accepted %q", got)
		}
		return nil
	})
}

// kill -9 in the middle of the feed.
func testLogicalKilledProcess(t *testing.T, pool *pgxpool.Pool, cfg outbox.RelayConfig) {
	t.Helper()
	cmd, scan := logicalProcess(t, pool)
	ctx, cancel := context.WithCancel(t.Context())
	published := make(chan []string)
	go func() {
		var all []string
		for ctx.Err() == nil {
			m := message(fmt.Sprint(len(all)), "")
			err := pgx.BeginFunc(context.WithoutCancel(ctx), pool, func(tx pgx.Tx) error {
				return cfg.Outbox.In(tx).Publish(context.WithoutCancel(ctx), m)
			})
			if err != nil {
				t.Error(err)
				break
			}
			all = append(all, m.ID)
		}
		published <- all
	}()
	var told []string
	for scan.Scan() {
		if told = append(told, scan.Text()); len(told) == 200 {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = cmd.Wait() // says that it was killed
	wantSlots(t, pool, 0)
	b := &broker{}
	relay, _ := start(t, pool, b, cfg)
	wantLogical(t, relay, true)
	cancel()
	want := <-published
	postridertest.Eventually(t, func() error {
		got := map[string]bool{}
		for _, id := range append(b.ids(), told...) {
			got[id] = true
		}
		if i := slices.IndexFunc(want, func(id string) bool { return !got[id] }); i >= 0 {
			return fmt.Errorf("message %s of %d is not sent", want[i], len(want))
		}
		return nil
	})
}
