package main

import (
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/postrider/postrider/bench/internal/harness"
)

// report writes the tables. The first peer of the plan is what the others are compared with.
func report(out io.Writer, p plan, results []result, took time.Duration) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%d rounds of %v s, sync_interval %s, %d bytes, %d processors, %s, %v in all. Medians; in brackets the median over\n"+
		"the rounds of the ratio of %s to the peer in the same round.\n",
		p.rounds, p.seconds, p.sync, p.size, runtime.GOMAXPROCS(0), runtime.Version(), took.Round(time.Second), p.peers[0].title)
	t := table{p, results}
	t.write(&b, "Messages a second, for bulk, drain, insert, read and sustained; transactions a second for idle", t.rate,
		draining, held, reading, inserting, bulk, sustained, idle)
	t.write(&b, "Milliseconds from COMMIT to a subscriber, p50 / p99", t.delay, latency)
	t.write(&b, "Transactions or handlers a second, and in brackets the ratio to what they take turns with", t.share,
		business, handling, remembered)
	t.write(&b, "A message's bytes of WAL, dead row versions, and how many messages waited when the writers ended", t.traces, sustained)
	t.write(&b, "CPU of the peer's process in µs a message, without PostgreSQL and nats-server", t.cost,
		draining, held, reading, latency, inserting, bulk, sustained)
	t.troubles(&b)
	_, err := io.WriteString(out, b.String())
	return err
}

type table struct {
	plan    plan
	results []result
}

// write writes a table of cells of some kinds with a column for each peer that has a result.
func (t table) write(b *strings.Builder, title string, text func(of, base []result) string, kinds ...kind) {
	var cells []cell
	for _, c := range t.plan.cells {
		if slices.Contains(kinds, c.kind) {
			cells = append(cells, c)
		}
	}
	var peers []peer
	for _, p := range t.plan.peers {
		for _, c := range cells {
			if len(t.of(p, c)) > 0 {
				peers = append(peers, p)
				break
			}
		}
	}
	if len(cells) == 0 {
		return
	}
	fmt.Fprintf(b, "\n%s:\n\n| cell |", title)
	for _, p := range peers {
		fmt.Fprintf(b, " %s |", p.title)
	}
	b.WriteString("\n|---|" + strings.Repeat("---:|", len(peers)) + "\n")
	for _, c := range cells {
		fmt.Fprintf(b, "| %s |", c)
		for _, p := range peers {
			cell := "–"
			if of := t.of(p, c); len(of) > 0 {
				cell = text(of, t.of(t.plan.peers[0], c))
			}
			fmt.Fprintf(b, " %s |", cell)
		}
		b.WriteString("\n")
	}
}

// of returns what a peer did in a cell, without failures.
func (t table) of(p peer, c cell) []result {
	var of []result
	for _, r := range t.results {
		if r.Peer == p.name && r.Cell == c.String() && r.Err == "" {
			of = append(of, r)
		}
	}
	return of
}

func (t table) rate(of, base []result) string {
	metric := func(r result) float64 { return r.Rate }
	cell := harness.Rate(median(of, metric))
	if of[0].Cell == string(idle) {
		return fmt.Sprintf("%.1f", median(of, metric))
	}
	return cell + t.ratio(of, base, metric)
}

func (t table) delay(of, base []result) string {
	p50 := func(r result) float64 { return r.P50.Seconds() * 1000 }
	p99 := func(r result) float64 { return r.P99.Seconds() * 1000 }
	return fmt.Sprintf("%.2f%s / %.2f%s", median(of, p50), t.ratio(of, base, p50), median(of, p99), t.ratio(of, base, p99))
}

func (table) share(of, _ []result) string {
	return fmt.Sprintf("%s (%.2f)", harness.Rate(median(of, func(r result) float64 { return r.Rate })),
		median(of, func(r result) float64 { return r.Rate / r.Base }))
}

func (table) traces(of, _ []result) string {
	return fmt.Sprintf("%.0f, %.3f, %.0f", median(of, func(r result) float64 { return r.WAL }),
		median(of, func(r result) float64 { return r.Dead }), median(of, func(r result) float64 { return float64(r.Backlog) }))
}

func (t table) cost(of, _ []result) string {
	return fmt.Sprintf("%.1f", median(of, func(r result) float64 { return float64(r.CPU) / float64(time.Microsecond) }))
}

// ratio is how many times the first peer's figure is that of another.
func (t table) ratio(of, base []result, metric func(result) float64) string {
	var ratios []float64
	for _, r := range of {
		for _, b := range base {
			if r.Round == b.Round && r.Peer != b.Peer && metric(r) > 0 {
				ratios = append(ratios, metric(b)/metric(r))
			}
		}
	}
	if len(ratios) == 0 {
		return ""
	}
	return fmt.Sprintf(" (%.2f)", harness.Middle(ratios))
}

// troubles lists what should not have happened.
func (t table) troubles(b *strings.Builder) {
	var lines []string
	for _, r := range t.results {
		if what := harness.Troubles(r.Messages, r.Lost, r.Again, r.Disorder, r.Err); what != "" {
			lines = append(lines, fmt.Sprintf("- %s, %s, round %d: %s\n", r.Peer, r.Cell, r.Round+1, what))
		}
	}
	if len(lines) == 0 {
		b.WriteString("\nNothing was lost, stored twice or stored out of order.\n")
		return
	}
	b.WriteString("\nLost, twice, out of order, failed:\n\n" + strings.Join(lines, ""))
}

// median returns the middle of a figure.
func median(of []result, metric func(result) float64) float64 {
	values := make([]float64, len(of))
	for i, r := range of {
		values[i] = metric(r)
	}
	return harness.Middle(values)
}
