package harness

import (
	"context"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider/internal/devstack"
)

// TestJobWithoutStoreIsDoneAgain has a server that cannot create a stream: a file is where its folder goes.
func TestJobWithoutStoreIsDoneAgain(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	srv, err := devstack.StartNATS(t.Context(), devstack.NATSConfig{StoreDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	nc, err := nats.Connect(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	create := func(ctx context.Context, name string) error {
		_, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: name, Subjects: []string{name}})
		return err
	}
	if err := create(t.Context(), "FIRST"); err != nil {
		t.Fatal(err)
	}
	folders, err := filepath.Glob(filepath.Join(dir, "jetstream", "*", "streams"))
	if err != nil || len(folders) != 1 {
		t.Fatalf("the server's folders are %q, %v", folders, err)
	}
	tries, obstacles := 0, 0
	job := func(ctx context.Context, _ Job) (Result, error) {
		if tries++; tries <= obstacles { // the server removes what it stumbles over
			if err := os.WriteFile(filepath.Join(folders[0], "BENCH"), nil, 0o600); err != nil {
				t.Error(err)
			}
		}
		return Result{Messages: int64(tries)}, create(ctx, "BENCH")
	}
	obstacles = 2
	if r := attempt(t.Context(), Job{}, job); tries != 2 || r.Err == "" || r.Again == "" {
		t.Errorf("a job that never had a store: %d tries, %v", tries, r)
	}
	tries, obstacles = 0, 1
	r := attempt(t.Context(), Job{}, job)
	if tries != 2 || r.Err != "" || r.Again == "" || r.Messages != 2 {
		t.Errorf("a job that had a store the second time: %d tries, %v", tries, r)
	}
	tries = 0
	r = attempt(t.Context(), Job{}, func(context.Context, Job) (Result, error) {
		tries++
		return Result{}, errors.New("the peer's own fault")
	})
	if tries != 1 || r.Err == "" || r.Again != "" {
		t.Errorf("a job that failed otherwise: %d tries, %v", tries, r)
	}
}

type name string

func (n name) String() string { return string(n) }

func TestFlags(t *testing.T) {
	t.Parallel()
	parse := func(args ...string) (*Plan[name, name], error) {
		flags := flag.NewFlagSet("test", flag.ContinueOnError)
		flags.SetOutput(io.Discard)
		var p Plan[name, name]
		return &p, p.Parse(flags, args, []name{"drain-1", "drain-16", "drain-held", "idle"}, []name{"memory-10"}, []name{"river", "river-default"})
	}
	for _, c := range []struct {
		args         []string
		cells, peers []name
	}{
		{nil, []name{"drain-1", "drain-16", "drain-held", "idle"}, []name{"river", "river-default"}},
		{[]string{"-cells", "drain", "-peers", "river"}, []name{"drain-1", "drain-16"}, []name{"river"}},
		{[]string{"-cells", "memory,drain-1"}, []name{"drain-1", "memory-10"}, []name{"river", "river-default"}},
	} {
		p, err := parse(c.args...)
		if err != nil || !slices.Equal(p.Cells, c.cells) || !slices.Equal(p.Peers, c.peers) {
			t.Errorf("%q: %v, %v, %v", c.args, p.Cells, p.Peers, err)
		}
	}
	for _, args := range [][]string{{"-cells", "drian"}, {"-peers", "rivers"}, {"-sync", "never"}, {"-rounds", "0"}, {"x"}} {
		if _, err := parse(args...); err == nil {
			t.Errorf("%q was taken", args)
		}
	}
}
