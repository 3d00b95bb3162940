package outbox_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider/internal/devstack"
)

// Some tests run nats-server in a process of its own, this test binary started with brokerEnv: so that it can be killed in the middle
// of its work, and its memory is not ours.
const brokerEnv = "POSTRIDER_TEST_BROKER"

// brokerConfig is what such a process is told.
type brokerConfig struct {
	Dir  string // keeps the streams
	Port int    // 0: a free one
}

// brokerProcess is the main function of such a process. It ends with the process that started it.
func brokerProcess(config string) error {
	var cfg brokerConfig
	if err := json.Unmarshal([]byte(config), &cfg); err != nil {
		return err
	}
	srv, err := devstack.StartNATS(context.Background(), devstack.NATSConfig{StoreDir: cfg.Dir, Port: cfg.Port})
	if err != nil {
		return err
	}
	fmt.Println(srv.URL)
	_, _ = io.Copy(io.Discard, os.Stdin)
	return srv.Close()
}

// natsProcess is a nats-server with sync_interval: always in a process of its own.
type natsProcess struct {
	testing.TB

	URL string
	cfg brokerConfig
	cmd *exec.Cmd // nil: it does not run
}

func newNATSProcess(t testing.TB) *natsProcess {
	t.Helper()
	n := &natsProcess{TB: t, cfg: brokerConfig{Dir: t.TempDir()}}
	t.Cleanup(n.kill)
	n.start()
	return n
}

// start starts it, with the streams and the port that it had.
func (n *natsProcess) start() {
	n.Helper()
	exe, err := os.Executable()
	if err != nil {
		n.Fatal(err)
	}
	config, err := json.Marshal(n.cfg)
	if err != nil {
		n.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), brokerEnv+"="+string(config))
	cmd.Stderr = n.Output()
	if _, err := cmd.StdinPipe(); err != nil { // which closes with this process
		n.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		n.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		n.Fatal(err)
	}
	n.cmd = cmd
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		n.Fatalf("nats-server did not start: %v", err)
	}
	n.URL = line[:len(line)-1]
	if _, err := fmt.Sscanf(n.URL, "nats://127.0.0.1:%d", &n.cfg.Port); err != nil {
		n.Fatalf("%s: %v", n.URL, err)
	}
}

// kill ends it as kill -9 does.
func (n *natsProcess) kill() {
	if n.cmd != nil {
		_ = n.cmd.Process.Kill()
		_ = n.cmd.Wait() // says that it was killed
		n.cmd = nil
	}
}

func (n *natsProcess) connect() *nats.Conn {
	n.Helper()
	nc, err := nats.Connect(n.URL, nats.Name(n.Name()), nats.MaxReconnects(-1), nats.ReconnectWait(10*time.Millisecond))
	if err != nil {
		n.Fatal(err)
	}
	n.Cleanup(nc.Close)
	return nc
}
