package outbox_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/outbox"
)

// Some tests run relays in processes of their own: this test binary, started with processEnv. There a trap waits at a
// point of the relay's work.
const processEnv = "POSTRIDER_TEST_RELAY"

// Points of a relay's work.
const (
	beforePublish = "before publish"
	halfPublished = "half published"
	afterPublish  = "after publish"
	beforeCursor  = "before the cursor is written"
	afterCursor   = "after the cursor is written"
	beforeEmpty   = "before a slot is truncated"
	afterEmpty    = "after a slot is truncated"
	anyMoment     = "at any moment"
)

// processConfig is what such a process is told.
type processConfig struct {
	NATS, Postgres string
	TTL, Retain    time.Duration
	BatchSize      int

	// The trap. At the point "" it never snaps.
	Point string
	Nth   int  // time that the point is reached; milliseconds of leading for anyMoment
	Hold  bool // waits there to be told to go on; else the process dies, as by kill -9
}

// relayProcess is the main function of such a process. It ends with the process that started it.
func relayProcess(config string) error {
	var cfg processConfig
	if err := json.Unmarshal([]byte(config), &cfg); err != nil {
		return err
	}
	told := make(chan string, 10)
	go func() {
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			told <- in.Text()
		}
		os.Exit(1)
	}()
	t := &trap{point: cfg.Point, nth: cfg.Nth, snap: func() {
		if cfg.Hold {
			fmt.Println("holds")
			<-told
			return
		}
		if self, err := os.FindProcess(os.Getpid()); err == nil {
			_ = self.Kill()
		}
		select {}
	}}
	ctx := context.Background()
	nc, err := nats.Connect(cfg.NATS, nats.MaxReconnects(-1), nats.ReconnectWait(10*time.Millisecond))
	if err != nil {
		return err
	}
	b, err := bus.New(nc, bus.Config{Source: "//shop/orders", Streams: []bus.Stream{{Name: "ORDERS", Topics: []string{"orders.>"}}}})
	if err != nil {
		return err
	}
	t.next = b
	poolCfg, err := pgxpool.ParseConfig(cfg.Postgres)
	if err != nil {
		return err
	}
	poolCfg.ConnConfig.Tracer = t
	pool, err := pgxpool.NewWithConfig(ctx, poolCfg)
	if err != nil {
		return err
	}
	ob, err := outbox.New(outbox.Config{Source: "//shop/orders"})
	if err != nil {
		return err
	}
	relay, err := outbox.NewRelay(pool, t, outbox.RelayConfig{
		Outbox: ob, LeaseTTL: cfg.TTL, Retain: cfg.Retain, BatchSize: cfg.BatchSize, PollInterval: 20 * time.Millisecond,
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)).With("pid", os.Getpid()),
	})
	if err != nil {
		return err
	}
	go func() {
		leads := false
		for range time.Tick(time.Millisecond) {
			if relay.Stats().Leading == leads {
				continue
			}
			if leads = !leads; !leads {
				fmt.Println("follows")
				continue
			}
			fmt.Println("leads")
			if cfg.Point == anyMoment {
				time.AfterFunc(time.Duration(cfg.Nth)*time.Millisecond, t.snap)
			}
		}
	}()
	fmt.Println("started")
	return relay.Run(ctx)
}

// trap is a relay's publisher and looks over its queries. It snaps once, when the relay comes to a point for the nth time.
type trap struct {
	point string
	nth   int
	snap  func()
	next  postrider.Publisher

	mu      sync.Mutex
	reached int
}

func (t *trap) reach(point string) {
	t.mu.Lock()
	here := point == t.point
	if here {
		t.reached++
	}
	here = here && t.reached == t.nth
	t.mu.Unlock()
	if here {
		t.snap()
	}
}

func (t *trap) Publish(ctx context.Context, msgs ...*postrider.Message) error {
	t.reach(beforePublish)
	if half := len(msgs) / 2; t.point == halfPublished && half > 0 {
		if err := t.next.Publish(ctx, msgs[:half]...); err == nil {
			t.reach(halfPublished)
		}
	}
	err := t.next.Publish(ctx, msgs...)
	t.reach(afterPublish)
	return err
}

func (t *trap) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	switch sql := strings.TrimSpace(data.SQL); {
	case strings.Contains(sql, "prev = $4::text::pg_snapshot"):
		t.reach(beforeCursor)
		return context.WithValue(ctx, t, afterCursor)
	case strings.HasPrefix(sql, "truncate "):
		t.reach(beforeEmpty)
		return context.WithValue(ctx, t, afterEmpty)
	default:
		return ctx
	}
}

func (t *trap) TraceQueryEnd(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryEndData) {
	if point, ok := ctx.Value(t).(string); ok {
		t.reach(point)
	}
}

// number is a setting of a long run, from the environment.
func number(t testing.TB, env string, normally int) int {
	t.Helper()
	text := os.Getenv(env)
	if text == "" {
		return normally
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s: %v", env, err)
	}
	return n
}

// process is such a process as its test sees it.
type process struct {
	testing.TB
	*exec.Cmd

	in   io.Writer
	said chan string   // its lines
	died chan struct{} // closed when it is gone
}

func startProcess(t testing.TB, cfg processConfig) *process {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{TB: t, Cmd: exec.Command(exe), said: make(chan string, 1000), died: make(chan struct{})}
	p.Env = append(os.Environ(), processEnv+"="+string(config))
	p.Stderr = t.Output()
	if p.in, err = p.StdinPipe(); err != nil { // which closes with this process
		t.Fatal(err)
	}
	out, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			p.said <- lines.Text()
		}
		_ = p.Wait()
		close(p.died)
	}()
	t.Cleanup(func() { _ = p.Process.Kill(); <-p.died })
	p.await("started")
	return p
}

// await waits until the process says something.
func (p *process) await(line string) {
	p.Helper()
	timeout := time.After(time.Minute)
	for {
		select {
		case said := <-p.said:
			if said == line {
				return
			}
		case <-p.died:
			p.Fatalf("the relay's process ended before it said %q", line)
		case <-timeout:
			p.Fatalf("the relay's process did not say %q", line)
		}
	}
}
