package main

import (
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider/bench/internal/harness"
	"github.com/postrider/postrider/internal/devstack"
)

// TestEveryCell runs each cell with each peer for a moment: nothing fails, nothing is lost, nothing comes twice.
func TestEveryCell(t *testing.T) {
	t.Parallel()
	for _, p := range allPeers() {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			srv, err := devstack.StartNATS(t.Context(), devstack.NATSConfig{InMemory: true})
			if err != nil {
				t.Fatal(err)
			}
			nc, err := nats.Connect(srv.URL)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				nc.Close()
				if err := srv.Close(); err != nil {
					t.Error(err)
				}
			})
			js, err := jetstream.New(nc)
			if err != nil {
				t.Fatal(err)
			}
			w := worker{peer: p, url: srv.URL, js: js}
			for _, c := range append(allCells(), memoryCells()[0]) {
				if slices.Contains(p.lacks, c.kind) {
					continue
				}
				r, err := w.do(t.Context(), job{Cell: c.String(), Size: 128, Seconds: 0.05})
				if err != nil {
					t.Errorf("%s: %v", c, err)
				}
				if r.Messages == 0 || r.Rate == 0 || r.Lost > 0 || r.Twice > 0 || r.Disorder > 0 {
					t.Error(r)
				}
				if c.kind == latency && (r.P50 <= 0 || r.P99 < r.P50) {
					t.Errorf("%s: p50 is %v, p99 is %v", c, r.P50, r.P99)
				}
			}
		})
	}
}

// TestTally checks that the harness sees what it is there to see.
func TestTally(t *testing.T) {
	t.Parallel()
	if _, err := parseFlags([]string{"-cells", "publish", "-sizes", "8"}); err == nil {
		t.Error("a payload without room for the stamp was taken")
	}
	r := newTally(64)
	r.seen = make([]atomic.Uint32, 2*keys)
	v := r.blank()
	for _, n := range []int64{1, 1 + keys, 1, 0} {
		r.stampAs(v, n)
		if err := r.handleKeyed(v); err != nil {
			t.Fatal(err)
		}
	}
	if r.handled.Load() != 3 || r.again.Load() != 1 || r.disorder.Load() != 1 {
		t.Errorf("handled %d, again %d, out of order %d: want 3, 1, 1", r.handled.Load(), r.again.Load(), r.disorder.Load())
	}
	r.stampAs(v, 2*keys)
	if r.handle(v) == nil {
		t.Error("a message that was not published was taken")
	}
}

func TestReport(t *testing.T) {
	t.Parallel()
	p, err := parseFlags([]string{"-cells", "publish-1,latency", "-peers", "plain,postrider,cqrs"})
	if err != nil {
		t.Fatal(err)
	}
	one := func(peer, cell string, round int, speed float64) result {
		return result{Peer: peer, Cell: cell, Size: 1024, Round: round, Messages: 10, Rate: speed, Allocs: 20, CPU: 3500}
	}
	rs := []result{
		one("plain", "publish-1", 0, 1000), one("postrider", "publish-1", 0, 2000), // 2
		one("plain", "publish-1", 1, 3000), one("postrider", "publish-1", 1, 9000), // 3
		one("plain", "publish-1", 2, 4000), one("postrider", "publish-1", 2, 4000), // 1
		one("cqrs", "publish-1", 0, 500), // a quarter
		{Peer: "postrider", Cell: "latency", Size: 1024, Err: "it broke"},
	}
	rs[1].Lost = 4
	var b strings.Builder
	if err := report(&b, p, rs); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| publish-1 | 1024 | 3.0 k | 4.0 k (2.00) | 500 (0.50) |",
		"| publish-1 | 1024 | 2.00 | 4.00 |",
		"| publish-1 | 1024 | 20.0, 3.5 | 20.0, 3.5 (1.00) | 20.0, 3.5 (1.00) |",
		"| latency | 1024 | – | – | – |",
		"- postrider, publish-1, 1024 bytes, round 1: 4 of 10 lost",
		"- postrider, latency, 1024 bytes, round 1: it broke",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the report lacks %q:\n%s", want, b.String())
		}
	}
	if m := harness.Middle([]float64{4, 1, 3, 2}); math.Abs(m-2.5) > 1e-9 {
		t.Errorf("median of 1 to 4 is %v, want 2.5", m)
	}
}
