// Package harness is what the two programs of this module share: flags, processes that talk in JSON and measure in turns, figures
// of the process, and what tables are made of.
package harness

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Names returns the names of all, for a text.
func Names[T fmt.Stringer](all []T) []string {
	texts := make([]string, len(all))
	for i, n := range all {
		texts[i] = n.String()
	}
	return texts
}

// choose returns those of all that a comma-separated list names, in the order of all. A name without its number stands for
// all numbers: drain is drain-1 and drain-16.
func choose[T fmt.Stringer](option, list string, all []T) ([]T, error) {
	chosen := make([]bool, len(all))
	for want := range strings.SplitSeq(list, ",") {
		found := false
		for i, n := range all {
			number, numbered := strings.CutPrefix(n.String(), want+"-")
			if n.String() == want || numbered && strings.Trim(number, "0123456789") == "" {
				chosen[i], found = true, true
			}
		}
		if !found {
			return nil, fmt.Errorf("%s: there is no %q: have %s", option, want, strings.Join(Names(all), " "))
		}
	}
	var some []T
	for i, n := range all {
		if chosen[i] {
			some = append(some, n)
		}
	}
	return some, nil
}

// Middle returns the middle value, or the mean of the two. It sorts the values.
func Middle(values []float64) float64 {
	slices.Sort(values)
	n := len(values)
	return (values[(n-1)/2] + values[n/2]) / 2
}

// Rate writes a rate with three digits.
func Rate(n float64) string {
	switch {
	case n >= 100_000:
		return strconv.FormatFloat(n/1000, 'f', 0, 64) + " k"
	case n >= 1000:
		return strconv.FormatFloat(n/1000, 'f', 1, 64) + " k"
	default:
		return strconv.FormatFloat(n, 'f', 0, 64)
	}
}
