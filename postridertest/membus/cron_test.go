package membus

import (
	"reflect"
	"testing"
	"time"

	"github.com/postrider/postrider/bus"
)

func TestSpecs(t *testing.T) {
	t.Parallel()
	at := func(s string) time.Time {
		v, err := time.Parse(time.RFC3339, s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	for _, tt := range []struct {
		spec, zone, after string
		want              []string
	}{
		{"@every 90s", "", "2026-01-01T00:00:00Z", []string{"2026-01-01T00:01:30Z", "2026-01-01T00:03:00Z"}},
		{"* * * * * *", "", "2026-12-31T23:59:59Z", []string{"2027-01-01T00:00:00Z", "2027-01-01T00:00:01Z"}},
		{"0 30 8 * * mon-fri", "", "2026-01-02T08:30:00Z", []string{"2026-01-05T08:30:00Z", "2026-01-06T08:30:00Z"}},
		{"5,50-52 */20 0 29 FEB ?", "", "2026-01-01T00:00:00Z", []string{
			"2028-02-29T00:00:05Z", "2028-02-29T00:00:50Z", "2028-02-29T00:00:51Z", "2028-02-29T00:00:52Z", "2028-02-29T00:20:05Z",
		}},
		{"0 0 12/6 1 * *", "", "2026-01-01T13:00:00Z", []string{"2026-01-01T18:00:00Z", "2026-02-01T12:00:00Z"}},
		{"0 0 0 13 * fri", "", "2026-03-10T00:00:00Z", []string{"2026-03-13T00:00:00Z", "2026-03-20T00:00:00Z"}}, // either
		{"@hourly", "", "2026-01-01T00:00:00Z", []string{"2026-01-01T01:00:00Z"}},
		{"@daily", "Asia/Kolkata", "2026-01-01T00:00:00Z", []string{"2026-01-01T18:30:00Z"}},
		{"@weekly", "", "2026-01-01T00:00:00Z", []string{"2026-01-04T00:00:00Z"}},
		{"@monthly", "", "2026-01-01T00:00:00Z", []string{"2026-02-01T00:00:00Z"}},
		{"@yearly", "", "2026-01-01T00:00:00Z", []string{"2027-01-01T00:00:00Z"}},
		// Clocks put forward: the hour that is missing has no half past; at midnight the day begins at one.
		{"0 30 2 * * *", "Europe/Warsaw", "2026-03-28T12:00:00Z", []string{"2026-03-30T00:30:00Z"}},
		{"0 0 1 * * *", "America/Sao_Paulo", "2018-11-03T12:00:00Z", []string{"2018-11-04T03:00:00Z", "2018-11-05T03:00:00Z"}},
		// Clocks put back: the hour that comes twice counts twice.
		{"0 30 2 * * *", "Europe/Warsaw", "2026-10-24T12:00:00Z", []string{"2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z"}},
	} {
		next, err := parseSpec(tt.spec, tt.zone)
		if err != nil {
			t.Errorf("%s: %v", tt.spec, err)
			continue
		}
		after := at(tt.after)
		for _, want := range tt.want {
			if after = next(after); !after.Equal(at(want)) {
				t.Errorf("%s: next is %v, want %v", tt.spec, after.UTC(), want)
				break
			}
		}
	}
}

func FuzzSpec(f *testing.F) {
	for _, spec := range []string{"@every 1s", "0 30 8 * * mon-fri", "*/7 1-5/2 ? 29 feb *", "@weekly"} {
		f.Add(spec, "Europe/Warsaw", int64(1_700_000_000))
	}
	f.Fuzz(func(t *testing.T, spec, zone string, seconds int64) {
		next, err := parseSpec(spec, zone)
		if err != nil {
			return
		}
		after := time.Unix(seconds%(1<<33), 0)
		if got := next(after); !got.IsZero() && !got.After(after) {
			t.Errorf("%q after %v comes at %v", spec, after, got)
		}
	})
}

// A filter that gains a field must not be ignored here.
func TestSelectsKnowsEveryField(t *testing.T) {
	t.Parallel()
	known := map[string]bool{"Group": true, "Topic": true, "Code": true, "Cause": true, "Fingerprint": true, "From": true, "To": true}
	for field := range reflect.TypeFor[bus.LetterFilter]().Fields() {
		if !known[field.Name] {
			t.Errorf("selects does not know LetterFilter.%s", field.Name)
		}
	}
}
