package membus

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// parseSpec returns a function that tells the next time of a schedule after another, for what nats-server 2.15 takes
// (server/scheduler.go and cron.go, after robfig/cron): "@every" and a duration, six fields with the second first, and the
// predefined ones.
func parseSpec(spec, zone string) (func(time.Time) time.Time, error) {
	if every, ok := strings.CutPrefix(spec, "@every "); ok {
		d, err := time.ParseDuration(every)
		switch {
		case err != nil:
			return nil, err
		case d < time.Second:
			return nil, errors.New("an interval is at least 1 s")
		case zone != "":
			return nil, errors.New("an interval has no time zone")
		}
		return func(t time.Time) time.Time { return t.Add(d) }, nil
	}
	location, err := time.LoadLocation(zone) // "" is UTC
	if err != nil {
		return nil, err
	}
	switch spec {
	case "@yearly", "@annually":
		spec = "0 0 0 1 1 *"
	case "@monthly":
		spec = "0 0 0 1 * *"
	case "@weekly":
		spec = "0 0 0 * * 0"
	case "@daily", "@midnight":
		spec = "0 0 0 * * *"
	case "@hourly":
		spec = "0 0 * * * *"
	}
	words := strings.Fields(spec)
	if len(words) != 6 {
		return nil, errors.New("want six fields, the second first, or @every and a duration")
	}
	c := cron{location: location}
	for i, f := range [...]struct {
		set      *field
		min, max int
		names    []string
	}{
		{&c.second, 0, 59, nil},
		{&c.minute, 0, 59, nil},
		{&c.hour, 0, 23, nil},
		{&c.day, 1, 31, nil},
		{&c.month, 1, 12, []string{"", "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"}},
		{&c.weekday, 0, 6, []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}},
	} {
		for expr := range strings.SplitSeq(words[i], ",") {
			if err := f.set.add(expr, f.min, f.max, f.names); err != nil {
				return nil, err
			}
		}
	}
	if c.next(time.Now()).IsZero() {
		return nil, errors.New("it never comes")
	}
	return c.next, nil
}

// field is what one of six fields allows.
type field struct {
	allowed [60]bool
	any     bool
}

// add allows a range: "*", "5", "5-10", each also with a step, "*/15".
func (f *field) add(expr string, least, most int, names []string) error {
	number := func(s string) int {
		if i := slices.Index(names, strings.ToLower(s)); i >= 0 && s != "" {
			return i
		}
		if n, err := strconv.Atoi(s); err == nil {
			return n
		}
		return -1
	}
	part, stepText, stepped := strings.Cut(expr, "/")
	low, high, isRange := strings.Cut(part, "-")
	from, to, step := number(low), number(high), 1
	if !isRange {
		to = from
	}
	if stepped {
		if step = number(stepText); !isRange {
			to = most
		}
	}
	if low == "*" || low == "?" {
		from, to = least, most
		f.any = f.any || step == 1
	}
	if from < least || to > most || from > to || step < 1 {
		return fmt.Errorf("%q is no range of %d to %d", expr, least, most)
	}
	for i := from; i <= to; i += step {
		f.allowed[i] = true
	}
	return nil
}

type cron struct {
	location                                  *time.Location
	second, minute, hour, day, month, weekday field
}

// next returns the first time after t, the zero time if there is none within five years.
func (c *cron) next(t time.Time) time.Time {
	t = t.In(c.location).Truncate(time.Second).Add(time.Second)
	for end := t.AddDate(5, 0, 0); t.Before(end); {
		intoHour := time.Duration(t.Minute())*time.Minute + time.Duration(t.Second())*time.Second
		switch {
		case !c.month.allowed[t.Month()]:
			t = c.midnight(t, t.Month()+1, 1)
		case !c.dayMatches(t):
			t = c.midnight(t, t.Month(), t.Day()+1)
		case !c.hour.allowed[t.Hour()]:
			t = t.Add(time.Hour - intoHour)
		case !c.minute.allowed[t.Minute()]:
			t = t.Add(time.Minute - intoHour%time.Minute)
		case !c.second.allowed[t.Second()]:
			t = t.Add(time.Second)
		default:
			return t
		}
	}
	return time.Time{}
}

// midnight begins a day after t. Where clocks are put forward at midnight there is none, and [time.Date] may go back.
func (c *cron) midnight(t time.Time, month time.Month, day int) time.Time {
	if begin := time.Date(t.Year(), month, day, 0, 0, 0, 0, c.location); begin.After(t) {
		return begin
	}
	return t.Add(time.Hour).Truncate(time.Hour)
}

// dayMatches says if a day is one of the month's and one of the week's; one of either if both are restricted.
func (c *cron) dayMatches(t time.Time) bool {
	day, weekday := c.day.allowed[t.Day()], c.weekday.allowed[t.Weekday()]
	if c.day.any || c.weekday.any {
		return day && weekday
	}
	return day || weekday
}
