package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/postrider/postrider/bench/internal/harness"
)

// report writes the tables. The first peer of the plan is what the others are compared with.
func report(out io.Writer, p *plan, results []result) error {
	var b strings.Builder
	b.WriteString(p.Conditions() + "to " + p.Peers[0].title + " in the same round.\n")
	t := table{p, results}
	t.write(&b, "Messages a second; for latency p50 / p99 in milliseconds, where less is better", t.speed, p.Peers[0], p.Peers)
	if i := slices.IndexFunc(p.Peers, func(p peer) bool { return p.name == "cqrs" }); i > 0 {
		t.write(&b, "The same as ratios to "+p.Peers[i].title, t.relative, p.Peers[i], p.Peers[:i])
	}
	t.write(&b, "Allocations and client CPU in µs, for one message", t.cost, p.Peers[0], p.Peers)
	if slices.ContainsFunc(results, func(r result) bool { return r.Heap > 0 }) {
		t.write(&b, "Heap in use beyond what was before it began, in MiB, the median of many looks", t.heap, p.Peers[0], p.Peers)
	}
	b.WriteString(harness.Troubles(results))
	_, err := io.WriteString(out, b.String())
	return err
}

type table struct {
	plan    *plan
	results []result
}

// write writes a table with a column for each peer; text compares what it did in a cell with what another one did.
func (t table) write(b *strings.Builder, title string, text func(of, base []result) string, against peer, peers []peer) {
	fmt.Fprintf(b, "\n%s:\n\n| cell | bytes |", title)
	for _, p := range peers {
		fmt.Fprintf(b, " %s |", p.title)
	}
	b.WriteString("\n|---|---:|" + strings.Repeat("---:|", len(peers)) + "\n")
	for _, c := range t.plan.Cells {
		for _, size := range t.plan.Sizes {
			fmt.Fprintf(b, "| %s | %d |", c, size)
			base := harness.Of(t.results, against, c, size)
			for _, p := range peers {
				cell := "–"
				if of := harness.Of(t.results, p, c, size); len(of) > 0 {
					cell = text(of, base)
				}
				fmt.Fprintf(b, " %s |", cell)
			}
			b.WriteString("\n")
		}
	}
}

func (t table) speed(of, base []result) string {
	cell := harness.Rate(harness.Median(of, speedOf(of)))
	if of[0].P50 > 0 {
		p99 := harness.Median(of, func(r result) float64 { return r.P99.Seconds() * 1000 })
		cell = fmt.Sprintf("%.2f / %.2f", harness.Median(of, speedOf(of)), p99)
	}
	return t.compared(cell, of, base, speedOf(of))
}

// compared puts the ratio behind what is not compared with itself.
func (t table) compared(cell string, of, base []result, metric func(result) float64) string {
	if ratio, ok := harness.Ratio(of, base, metric); ok && of[0].Peer != t.plan.Peers[0].name {
		cell += fmt.Sprintf(" (%.2f)", ratio)
	}
	return cell
}

// relative is the ratio alone.
func (table) relative(of, base []result) string {
	if ratio, ok := harness.Ratio(of, base, speedOf(of)); ok {
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
	allocs := harness.Median(of, func(r result) float64 { return r.Allocs })
	cpu := func(r result) float64 { return float64(r.CPU) / float64(time.Microsecond) }
	return t.compared(fmt.Sprintf("%.1f, %.1f", allocs, harness.Median(of, cpu)), of, base, cpu)
}

func (table) heap(of, _ []result) string {
	return fmt.Sprintf("%.1f", harness.Median(of, func(r result) float64 { return r.Heap / (1 << 20) }))
}
