package main

import (
	"fmt"
	"io"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// report writes the tables. The first peer of the plan is what the others are compared with.
func report(out io.Writer, p plan, results []result, took time.Duration) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%d rounds of %v s, sync_interval %s, %d processors, %s, %v in all. Medians; in brackets the median over the\n"+
		"rounds of the ratio to %s in the same round.\n",
		p.rounds, p.seconds, p.sync, runtime.GOMAXPROCS(0), runtime.Version(), took.Round(time.Second), p.peers[0].title)
	t := table{p, results}
	t.write(&b, "Messages a second; for latency p50 / p99 in milliseconds, where less is better", t.speed)
	t.write(&b, "Allocations and client CPU in µs, for one message", t.cost)
	if slices.ContainsFunc(results, func(r result) bool { return r.Heap > 0 }) {
		t.write(&b, "Heap in use beyond what was before it began, in MiB, the median of many looks", t.heap)
	}
	t.troubles(&b)
	_, err := io.WriteString(out, b.String())
	return err
}

type table struct {
	plan    plan
	results []result
}

func (t table) write(b *strings.Builder, title string, text func(of, base []result) string) {
	fmt.Fprintf(b, "\n%s:\n\n| cell | bytes |", title)
	for _, p := range t.plan.peers {
		fmt.Fprintf(b, " %s |", p.title)
	}
	b.WriteString("\n|---|---:|" + strings.Repeat("---:|", len(t.plan.peers)) + "\n")
	for _, c := range t.plan.cells {
		for _, size := range t.plan.sizes {
			fmt.Fprintf(b, "| %s | %d |", c, size)
			base := t.of(t.plan.peers[0], c, size)
			for _, p := range t.plan.peers {
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
	metric, text := func(r result) float64 { return r.Rate }, rate
	if of[0].P50 > 0 {
		metric = func(r result) float64 { return r.P50.Seconds() * 1000 }
		p99 := median(of, func(r result) float64 { return r.P99.Seconds() * 1000 })
		text = func(p50 float64) string { return fmt.Sprintf("%.2f / %.2f", p50, p99) }
	}
	cell := text(median(of, metric))
	if ratio, ok := ratio(of, base, metric); ok && of[0].Peer != t.plan.peers[0].name {
		cell += fmt.Sprintf(" (%.2f)", ratio)
	}
	return cell
}

func (t table) cost(of, _ []result) string {
	allocs := median(of, func(r result) float64 { return r.Allocs })
	cpu := median(of, func(r result) float64 { return float64(r.CPU) / float64(time.Microsecond) })
	return fmt.Sprintf("%.1f, %.1f", allocs, cpu)
}

func (t table) heap(of, _ []result) string {
	return fmt.Sprintf("%.1f", median(of, func(r result) float64 { return r.Heap / (1 << 20) }))
}

// troubles lists what should not have happened.
func (t table) troubles(b *strings.Builder) {
	var lines []string
	for _, r := range t.results {
		var what []string
		for _, w := range []struct {
			n    int64
			text string
		}{{r.Lost, "lost"}, {r.Again, "twice"}, {r.Disorder, "out of order"}} {
			if w.n > 0 {
				what = append(what, fmt.Sprintf("%d of %d %s", w.n, r.Messages, w.text))
			}
		}
		if r.Err != "" {
			what = append(what, strings.ReplaceAll(r.Err, "\n", "; "))
		}
		if len(what) > 0 {
			lines = append(lines, fmt.Sprintf("- %s, %s, %d bytes, round %d: %s\n",
				r.Peer, r.Cell, r.Size, r.Round+1, strings.Join(what, ", ")))
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
	return middle(values)
}

func middle(values []float64) float64 {
	slices.Sort(values)
	n := len(values)
	return (values[(n-1)/2] + values[n/2]) / 2
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
	return middle(ratios), true
}

// rate writes a rate with three digits.
func rate(n float64) string {
	switch {
	case n >= 100_000:
		return strconv.FormatFloat(n/1000, 'f', 0, 64) + " k"
	case n >= 1000:
		return strconv.FormatFloat(n/1000, 'f', 1, 64) + " k"
	default:
		return strconv.FormatFloat(n, 'f', 0, 64)
	}
}
