package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"
)

// report prints what happened and returns false if anything is wrong.
func report(w io.Writer, t *tally, b *books, checks []check, took time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	ended := t.completed + t.compensated
	fmt.Fprintf(w, "\norders       %d lines: %d completed, %d compensated, %d repeated, %d rejected in %.2f s, %.0f orders/s\n",
		t.lines, t.completed, t.compensated, t.again, len(t.bad), took.Seconds(), float64(ended)/took.Seconds())
	printWhy(w, b.Orders.Why)
	printList(w, "rejected", t.bad)
	printList(w, "unfinished", t.lost)

	var all Traffic
	for _, s := range []Traffic{b.Orders.Traffic, b.Stock.Traffic, b.Payments.Traffic, b.Shipping.Traffic} {
		all.add(s)
	}
	fmt.Fprintf(w, "messages     %d published, %d handled, %d retries, %d duplicates ignored, %d dead letters\n",
		all.Published, all.Handled, all.Retried, all.Duplicates, all.DeadLettered)
	slices.Sort(t.calls)
	fmt.Fprintf(w, "calls        %d orders placed: p50 %v, p99 %v; %d calls made again\n",
		len(t.calls), quantile(t.calls, 50), quantile(t.calls, 99), t.repeated)

	fmt.Fprintln(w, "books")
	for _, c := range checks {
		mark := "ok   "
		if !c.ok {
			mark = "WRONG"
		}
		fmt.Fprintf(w, "  %s  %-56s %s\n", mark, c.what, c.seen)
	}
	good := balanced(checks) && len(t.lost) == 0
	if good {
		fmt.Fprintln(w, "The books balance.")
	} else {
		fmt.Fprintln(w, "THE BOOKS DO NOT BALANCE.")
	}
	return good && len(t.bad) == 0
}

// shown is how many lines of a list are printed.
const shown = 8

// printWhy prints the causes of compensations, the most frequent first.
func printWhy(w io.Writer, why map[string]int) {
	causes := slices.SortedFunc(maps.Keys(why), func(a, b string) int {
		return cmp.Or(why[b]-why[a], cmp.Compare(a, b))
	})
	rest := 0
	for i, cause := range causes {
		if i < shown {
			fmt.Fprintf(w, "  %5d x  %s\n", why[cause], cause)
		} else {
			rest += why[cause]
		}
	}
	if rest > 0 {
		fmt.Fprintf(w, "  %5d x  for %d other reasons\n", rest, len(causes)-shown)
	}
}

// printList prints what is wrong with lines, in their order.
func printList(w io.Writer, what string, list []complaint) {
	slices.SortFunc(list, func(a, b complaint) int { return cmp.Compare(a.line, b.line) })
	for i, c := range list {
		if i == shown {
			fmt.Fprintf(w, "  and %d more\n", len(list)-shown)
			return
		}
		fmt.Fprintf(w, "  %s: %s\n", what, c)
	}
}

// quantile returns the value below which q of 100 values lie, of a sorted list.
func quantile(sorted []time.Duration, q int) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[(len(sorted)-1)*q/100].Round(10 * time.Microsecond)
}
