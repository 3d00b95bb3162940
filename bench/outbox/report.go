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
	b.WriteString(p.Conditions() + "of " + p.Peers[0].title + " to the peer in the same round.\n")
	t := table{p, results}
	t.write(&b, "Messages a second, for bulk, drain, insert, read and sustained; transactions a second for idle", t.rate,
		draining, held, reading, inserting, bulk, sustained, idle)
	t.write(&b, "Milliseconds from COMMIT to a subscriber, p50 / p99", t.delay, latency)
	t.write(&b, "Transactions or handlers a second, and in brackets the ratio to what they take turns with", t.share,
		business, handling, remembered)
	t.write(&b, "A message's bytes of WAL, dead row versions, and how many messages waited when the writers ended", t.traces, sustained)
	t.write(&b, "CPU of the peer's process in µs a message, without PostgreSQL and nats-server", t.cost,
		draining, held, reading, latency, inserting, bulk, sustained)
	b.WriteString(harness.Troubles(results))
	_, err := io.WriteString(out, b.String())
	return err
}

type table struct {
	plan    *plan
	results []result
}

// write writes a table of cells of some kinds with a column for each peer that has a result.
func (t table) write(b *strings.Builder, title string, text func(of, base []result) string, kinds ...kind) {
	size := t.plan.Sizes[0]
	var cells []cell
	for _, c := range t.plan.Cells {
		if slices.Contains(kinds, c.kind) {
			cells = append(cells, c)
		}
	}
	var peers []peer
	for _, p := range t.plan.Peers {
		for _, c := range cells {
			if len(harness.Of(t.results, p, c, size)) > 0 {
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
			if of := harness.Of(t.results, p, c, size); len(of) > 0 {
				cell = text(of, harness.Of(t.results, t.plan.Peers[0], c, size))
			}
			fmt.Fprintf(b, " %s |", cell)
		}
		b.WriteString("\n")
	}
}

func (t table) rate(of, base []result) string {
	metric := func(r result) float64 { return r.Rate }
	cell := harness.Rate(harness.Median(of, metric))
	if of[0].Cell == string(idle) {
		return fmt.Sprintf("%.1f", harness.Median(of, metric))
	}
	return cell + t.ratio(of, base, metric)
}

func (t table) delay(of, base []result) string {
	p50 := func(r result) float64 { return r.P50.Seconds() * 1000 }
	p99 := func(r result) float64 { return r.P99.Seconds() * 1000 }
	return fmt.Sprintf("%.2f%s / %.2f%s", harness.Median(of, p50), t.ratio(of, base, p50), harness.Median(of, p99), t.ratio(of, base, p99))
}

func (table) share(of, _ []result) string {
	return fmt.Sprintf("%s (%.2f)", harness.Rate(harness.Median(of, func(r result) float64 { return r.Rate })),
		harness.Median(of, func(r result) float64 { return r.Rate / r.Base }))
}

func (table) traces(of, _ []result) string {
	return fmt.Sprintf("%.0f, %.3f, %.0f", harness.Median(of, func(r result) float64 { return r.WAL }),
		harness.Median(of, func(r result) float64 { return r.Dead }), harness.Median(of, func(r result) float64 { return float64(r.Backlog) }))
}

func (t table) cost(of, _ []result) string {
	return fmt.Sprintf("%.1f", harness.Median(of, func(r result) float64 { return float64(r.CPU) / float64(time.Microsecond) }))
}

// ratio is how many times the first peer's figure is that of another.
func (t table) ratio(of, base []result, figure func(result) float64) string {
	ratio, ok := harness.Ratio(base, of, figure)
	if !ok || of[0].Peer == t.plan.Peers[0].name {
		return ""
	}
	return fmt.Sprintf(" (%.2f)", ratio)
}
