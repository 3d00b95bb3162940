// Package harness is what the two programs of this module share: processes that talk in JSON, figures of the process, lists
// of names to choose from, and medians.
package harness

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Names returns the names of all, for a text.
func Names[T fmt.Stringer](all []T) []string {
	texts := make([]string, len(all))
	for i, n := range all {
		texts[i] = n.String()
	}
	return texts
}

// Choose returns those of all that a comma-separated list names, in the order of all; "all" is all of them.
func Choose[T fmt.Stringer](option, list string, all []T, matches func(name, want string) bool) ([]T, error) {
	if list == "all" {
		return all, nil
	}
	chosen := make([]bool, len(all))
	for want := range strings.SplitSeq(list, ",") {
		found := false
		for i, n := range all {
			if matches(n.String(), want) {
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

// CPUTime is the time that this process has spent, in its own code and in the kernel.
func CPUTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// Troubles says what should not have happened with n messages, "" if all was well.
func Troubles(n, lost, again, disorder int64, err string) string {
	var what []string
	for _, w := range []struct {
		n    int64
		text string
	}{{lost, "lost"}, {again, "twice"}, {disorder, "out of order"}} {
		if w.n > 0 {
			what = append(what, fmt.Sprintf("%d of %d %s", w.n, n, w.text))
		}
	}
	if err != "" {
		what = append(what, strings.ReplaceAll(err, "\n", "; "))
	}
	return strings.Join(what, ", ")
}
