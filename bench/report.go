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
	fmt.Fprintf(&b, "%d rounds of %v s, sync_interval %s, %d processors, %s, %v in all. Medians; in brackets the median over the\n"+
		"rounds of the ratio to %s in the same round.\n",
		p.rounds, p.seconds, p.sync, runtime.GOMAXPROCS(0), runtime.Version(), took.Round(time.Second), p.peers[0].title)
	t := table{p, results}
	t.write(&b, "Messages a second; for latency p50 / p99 in milliseconds, where less is better", t.speed, p.peers[0], p.peers)
	if i := slices.IndexFunc(p.peers, func(p peer) bool { return p.name == "cqrs" }); i > 0 {
		t.write(&b, "The same as ratios to "+p.peers[i].title, t.relative, p.peers[i], p.peers[:i])
	}
	t.write(&b, "Allocations and client CPU in µs, for one message", t.cost, p.peers[0], p.peers)
	if slices.ContainsFunc(results, func(r result) bool { return r.Heap > 0 }) {
		t.write(&b, "Heap in use beyond what was before it began, in MiB, the median of many looks", t.heap, p.peers[0], p.peers)
	}
	t.troubles(&b)
	_, err := io.WriteString(out, b.String())
	return err
}

type table struct {
	plan    plan
	results []result
}

// write writes a table with a column for each peer; text compares what it did in a cell with what another one did.
func (t table) write(b *strings.Builder, title string, text func(of, base []result) string, against peer, peers []peer) {
	fmt.Fprintf(b, "\n%s:\n\n| cell | bytes |", title)
	for _, p := range peers {
		fmt.Fprintf(b, " %s |", p.title)
	}
	b.WriteString("\n|---|---:|" + strings.Repeat("---:|", len(peers)) + "\n")
	for _, c := range t.plan.cells {
		for _, size := range t.plan.sizes {
			fmt.Fprintf(b, "| %s | %d |", c, size)
			base := t.of(against, c, size)
			for _, p := range peers {
				cell := "–"
				if of := t.of(p, c, size); len(of) > 0 {
					cell = text(of, base)
				}
				fmt.Fprintf(b, " %s |", cell)
			}
			b.WriteString("\n")
		}
	}
}

// of returns what a peer did in a cell, without failures.
func (t table) of(p peer, c cell, size int) []result {
	var of []result
	for _, r := range t.results {
		if r.Peer == p.name && r.Cell == c.String() && r.Size == size && r.Err == "" {
			of = append(of, r)
		}
	}
	return of
}

func (t table) speed(of, base []result) string {
	cell := harness.Rate(median(of, speedOf(of)))
	if of[0].P50 > 0 {
		p99 := median(of, func(r result) float64 { return r.P99.Seconds() * 1000 })
		cell = fmt.Sprintf("%.2f / %.2f", median(of, speedOf(of)), p99)
	}
	return t.compared(cell, of, base, speedOf(of))
}

// compared puts the ratio behind what is not compared with itself.
func (t table) compared(cell string, of, base []result, metric func(result) float64) string {
	if ratio, ok := ratio(of, base, metric); ok && of[0].Peer != t.plan.peers[0].name {
		cell += fmt.Sprintf(" (%.2f)", ratio)
	}
	return cell
}

// relative is the ratio alone.
func (table) relative(of, base []result) string {
	if ratio, ok := ratio(of, base, speedOf(of)); ok {
		return fmt.Sprintf("%.2f", ratio)
	}
	return "–"
}

// speedOf returns what is compared of results: the rate, or for latency the median in milliseconds.
func speedOf(of []result) func(result) float64 {
	if of[0].P50 > 0 {
		return func(r result) float64 { return r.P50.Seconds() * 1000 }
	}
	return func(r result) float64 { return r.Rate }
}

func (t table) cost(of, base []result) string {
	allocs := median(of, func(r result) float64 { return r.Allocs })
	cpu := func(r result) float64 { return float64(r.CPU) / float64(time.Microsecond) }
	return t.compared(fmt.Sprintf("%.1f, %.1f", allocs, median(of, cpu)), of, base, cpu)
}

func (t table) heap(of, _ []result) string {
	return fmt.Sprintf("%.1f", median(of, func(r result) float64 { return r.Heap / (1 << 20) }))
}

// troubles lists what should not have happened.
func (t table) troubles(b *strings.Builder) {
	var lines []string
	for _, r := range t.results {
		if what := harness.Troubles(r.Messages, r.Lost, r.Again, r.Disorder, r.Err); what != "" {
			lines = append(lines, fmt.Sprintf("- %s, %s, %d bytes, round %d: %s\n",
				r.Peer, r.Cell, r.Size, r.Round+1, what))
		}
	}
	if len(lines) == 0 {
		b.WriteString("\nNothing was lost, stored or handled twice, or handled out of order.\n")
		return
	}
	b.WriteString("\nLost, twice, out of order, failed:\n\n" + strings.Join(lines, ""))
}

// median returns the middle value, or the mean of the two.
func median(of []result, metric func(result) float64) float64 {
	values := make([]float64, len(of))
	for i, r := range of {
		values[i] = metric(r)
	}
	return harness.Middle(values)
}

// ratio returns the median of the ratios within a round.
func ratio(of, base []result, metric func(result) float64) (float64, bool) {
	var ratios []float64
	for _, r := range of {
		for _, b := range base {
			if r.Round == b.Round && metric(b) > 0 {
				ratios = append(ratios, metric(r)/metric(b))
			}
		}
	}
	if len(ratios) == 0 {
		return 0, false
	}
	return harness.Middle(ratios), true
}
