package harness

import (
	"fmt"
	"runtime"
	"strings"
	"time"
)

// Result is what came of a job. What a program does not measure is 0.
type Result struct {
	Peer, Cell  string
	Size, Round int

	Err      string        `json:",omitempty"`
	Again    string        `json:",omitempty"` // why it was done a second time: this is what came of that
	Messages int64         // or transactions
	Rate     float64       // a second
	Base     float64       `json:",omitempty"` // the rate of the same work without messages
	P50, P99 time.Duration // of latencies
	Allocs   float64       // a message
	CPU      time.Duration // of the worker's process, a message
	Heap     float64       `json:",omitempty"` // bytes in use, beyond those before it began
	WAL      float64       `json:",omitempty"` // bytes a message, with all that belongs to it
	Dead     float64       `json:",omitempty"` // dead row versions a message
	Backlog  int64         `json:",omitempty"` // messages that were left when the writers ended
	Lost     int64         // acknowledged or committed and not there, or acknowledged to the server and not handled
	Twice    int64         // stored or handled twice
	Disorder int64         // stored or handled before an earlier one of the same key
}

func (r Result) String() string {
	text := fmt.Sprintf("%d %-14s %-14s %6d  ", r.Round, r.Peer, r.Cell, r.Size)
	if r.Again != "" {
		text += "(done again: " + r.Again + ") "
	}
	if r.Err != "" {
		return text + r.Err
	}
	text += fmt.Sprintf("%9.0f/s  n %7d  allocs %5.1f  cpu %v", r.Rate, r.Messages, r.Allocs, r.CPU)
	for _, f := range []struct {
		is   bool
		text string
	}{
		{r.Base > 0, fmt.Sprintf("base %.0f/s", r.Base)},
		{r.P50 > 0, fmt.Sprintf("p50 %v p99 %v", r.P50, r.P99)},
		{r.Heap > 0, fmt.Sprintf("heap %.1f MiB", r.Heap/(1<<20))},
		{r.WAL > 0, fmt.Sprintf("wal %.0f dead %.3f backlog %d", r.WAL, r.Dead, r.Backlog)},
		{r.Lost+r.Twice+r.Disorder > 0, fmt.Sprintf("lost %d twice %d disorder %d", r.Lost, r.Twice, r.Disorder)},
	} {
		if f.is {
			text += "  " + f.text
		}
	}
	return text
}

// Of returns what a peer did in a cell, without failures.
func Of(results []Result, peer, cell fmt.Stringer, size int) []Result {
	var of []Result
	for _, r := range results {
		if r.Peer == peer.String() && r.Cell == cell.String() && r.Size == size && r.Err == "" {
			of = append(of, r)
		}
	}
	return of
}

// Median returns the middle of a figure.
func Median(of []Result, figure func(Result) float64) float64 {
	values := make([]float64, len(of))
	for i, r := range of {
		values[i] = figure(r)
	}
	return Middle(values)
}

// Ratio returns the median of the ratios within a round, and false if there are none.
func Ratio(of, to []Result, figure func(Result) float64) (float64, bool) {
	var ratios []float64
	for _, a := range of {
		for _, b := range to {
			if a.Round == b.Round && figure(b) > 0 {
				ratios = append(ratios, figure(a)/figure(b))
			}
		}
	}
	if len(ratios) == 0 {
		return 0, false
	}
	return Middle(ratios), true
}

// Conditions says what was measured, for the head of a report.
func (p *Plan[C, P]) Conditions() string {
	return fmt.Sprintf("%d rounds of %v s, sync_interval %s, %d processors, %s, %v in all. Medians; in brackets the median over the\n"+
		"rounds of the ratio ", p.Rounds, p.Seconds, p.Sync, runtime.GOMAXPROCS(0), runtime.Version(), time.Since(p.began).Round(time.Second))
}

// Troubles says what should not have happened, and what was done again.
func Troubles(results []Result) string {
	var wrong, again []string
	for _, r := range results {
		where := fmt.Sprintf("- %s, %s, %d bytes, round %d: ", r.Peer, r.Cell, r.Size, r.Round+1)
		if what := r.troubles(); what != "" {
			wrong = append(wrong, where+what+"\n")
		}
		if r.Again != "" {
			again = append(again, where+r.Again+"\n")
		}
	}
	text := "\nNothing was lost, stored or handled twice, or out of order.\n"
	if len(wrong) > 0 {
		text = "\nLost, twice, out of order, failed:\n\n" + strings.Join(wrong, "")
	}
	if len(again) > 0 {
		text += "\nDone again, because the server had failed:\n\n" + strings.Join(again, "")
	}
	return text
}

func (r Result) troubles() string {
	var what []string
	for _, w := range []struct {
		n    int64
		text string
	}{{r.Lost, "lost"}, {r.Twice, "twice"}, {r.Disorder, "out of order"}} {
		if w.n > 0 {
			what = append(what, fmt.Sprintf("%d of %d %s", w.n, r.Messages, w.text))
		}
	}
	if r.Err != "" {
		what = append(what, strings.ReplaceAll(r.Err, "\n", "; "))
	}
	return strings.Join(what, ", ")
}
