package bus_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

func TestMain(m *testing.M) {
	if sync, ok := os.LookupEnv(serverEnv); ok {
		if err := beServer(sync); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if name := os.Getenv(memberEnv); name != "" {
		if err := member(name); err != nil {
			fmt.Fprintln(os.Stderr, name, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(postridertest.Main(m))
}

// note is what most tests publish.
type note struct {
	N    int    `json:"n"`
	Text string `json:"text,omitempty"`
}

var (
	noted = postrider.NewTopic[note]("notes.written.v1")
	tally = postrider.NewMethod[note, note]("notes.v1/Tally")
)

// newBus makes a bus with a stream for the test's topics.
func newBus(t testing.TB, nc *nats.Conn, change ...func(*bus.Config)) *bus.Bus {
	t.Helper()
	cfg := bus.Config{
		Source: "//test/notes", Group: "tester", Logger: postridertest.Logger(t),
		Streams: []bus.Stream{{Name: "NOTES", Topics: []string{"notes.>", "replies.>"}}},
	}
	for _, c := range change {
		c(&cfg)
	}
	b, err := bus.New(nc, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// run runs parts until the test ends, or until the returned function is called, which returns Run's error.
func run(t testing.TB, parts ...postrider.Runner) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- postrider.Run(ctx, parts...) }()
	stop = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() {
		if err := stop(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) { // a test closes it as a crash would
			t.Errorf("Run: %v", err)
		}
	})
	return stop
}

// seen collects what handlers got.
type seen struct {
	mu   sync.Mutex
	list []note
}

func (s *seen) add(n note) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = append(s.list, n)
}

func (s *seen) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.list)
}

func (s *seen) distinct() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := map[int]bool{}
	for _, n := range s.list {
		m[n.N] = true
	}
	return len(m)
}
