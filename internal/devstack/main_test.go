package devstack

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// childEnv makes the test binary the process that is killed: it starts a stack, tells about it, and waits. Its value says where
// the cluster is to be kept, or is "temporary".
const childEnv = "POSTRIDER_DEVSTACK_CHILD"

const temporary = "temporary"

// childReport is what the child tells: where its servers are.
type childReport struct {
	NATSURL, PostgresURL string
	Folders              []string
	Postmaster           int
}

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		child()
		return
	}
	goleak.VerifyTestMain(m)
}

func child() {
	fmt.Println("starting")
	cfg := PostgresConfig{Private: true}
	if dir := os.Getenv(childEnv); dir != temporary {
		cfg.Dir = dir
	}
	stack, err := Start(context.Background(), Config{Postgres: cfg})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	_ = json.NewEncoder(os.Stdout).Encode(childReport{
		NATSURL:     stack.NATSURL,
		PostgresURL: stack.PostgresURL,
		Folders:     []string{stack.NATS.folder.path, stack.Postgres.folder.path},
		Postmaster:  stack.Postgres.server.Process.Pid,
	})
	select {} // until killed
}

// eventually polls until cond returns nil, and fails the test with its last error.
func eventually(t *testing.T, cond func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		err := cond()
		if err == nil {
			return
		}
		if !pause(ctx) {
			t.Fatal(err)
		}
	}
}
