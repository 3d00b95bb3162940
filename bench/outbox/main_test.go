package main

import (
	"strings"
	"testing"
	"time"

	"github.com/postrider/postrider/internal/devstack"
)

// TestEveryCell runs each cell with each peer for a moment: nothing fails, nothing is lost, nothing comes twice.
func TestEveryCell(t *testing.T) {
	stack, err := devstack.Start(t.Context(), devstack.Config{
		NATS: devstack.NATSConfig{InMemory: true}, Postgres: devstack.PostgresConfig{Private: true, InMemory: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := stack.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, p := range allPeers() {
		w, err := newWorker(t.Context(), p, stack.NATSURL, stack.PostgresURL)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range allCells() {
			if !p.does(c) || c.kind == idle && p.name != "postrider" {
				continue
			}
			r, err := w.do(t.Context(), job{Cell: c.String(), Size: 128, Seconds: 0.05})
			if p.name == "watermill" && c.kind == held { // it waits for the other transaction
				continue
			}
			r.Peer, r.Cell = p.name, c.String()
			if err != nil {
				t.Errorf("%s %s: %v", p, c, err)
			}
			if r.Messages == 0 || r.Rate == 0 && r.P50 == 0 || r.Lost > 0 || r.Twice > 0 || r.Disorder > 0 {
				t.Error(r)
			}
		}
		w.close()
	}
}

func TestReport(t *testing.T) {
	t.Parallel()
	p, err := parseFlags([]string{"-cells", "drain,latency,tx-1", "-peers", "postrider,river"})
	if err != nil {
		t.Fatal(err)
	}
	rs := []result{
		{Peer: "postrider", Cell: "drain", Size: 256, Messages: 10, Rate: 4000},
		{Peer: "river", Cell: "drain", Size: 256, Messages: 10, Rate: 1000, Lost: 2},
		{Peer: "postrider", Cell: "drain", Size: 256, Round: 1, Messages: 10, Rate: 6000},
		{Peer: "river", Cell: "drain", Size: 256, Round: 1, Messages: 10, Rate: 1000},
		{Peer: "postrider", Cell: "latency", Size: 256, P50: time.Millisecond, P99: 2 * time.Millisecond},
		{Peer: "river", Cell: "latency", Size: 256, P50: 2 * time.Millisecond, P99: 8 * time.Millisecond},
		{Peer: "postrider", Cell: "tx-1", Size: 256, Rate: 900, Base: 1000},
		{Peer: "river", Cell: "tx-1", Size: 256, Err: "it broke"},
	}
	var b strings.Builder
	if err := report(&b, p, rs); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| drain | 5.0 k | 1.0 k (5.00) |",
		"| latency | 1.00 / 2.00 | 2.00 (0.50) / 8.00 (0.25) |",
		"| tx-1 | 900 (0.90) |",
		"- river, drain, 256 bytes, round 1: 2 of 10 lost",
		"- river, tx-1, 256 bytes, round 1: it broke",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the report lacks %q:\n%s", want, b.String())
		}
	}
}

func TestFlags(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"-cells", "drian"}, {"-peers", "rivers"}, {"-sync", "never"}, {"-size", "8"}, {"x"}} {
		if _, err := parseFlags(args); err == nil {
			t.Errorf("%q was taken", args)
		}
	}
}
