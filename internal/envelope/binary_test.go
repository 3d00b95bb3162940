package envelope_test

import (
	"testing"
	"unicode/utf8"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/envelope"
)

// The vectors of the specification (http-protocol-binding.md, section 3.1.3.2, which the NATS binding refers to).
func TestEscape(t *testing.T) {
	t.Parallel()
	for plain, escaped := range map[string]string{
		"Euro € 😀":   "Euro%20%E2%82%AC%20%F0%9F%98%80",
		"":           "",
		"plain~!#":   "plain~!#",
		`say "100%"`: "say%20%22100%25%22",
		"\x7f\t":     "%7F%09",
		"a/b?c=d&e":  "a/b?c=d&e",
	} {
		if got := envelope.Escape(plain); got != escaped {
			t.Errorf("Escape(%q) is %q, want %q", plain, got, escaped)
		}
		if got := envelope.Unescape(escaped); got != plain {
			t.Errorf("Unescape(%q) is %q, want %q", escaped, got, plain)
		}
	}
}

func TestUnescapeIsTolerant(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"%e2%82%ac":           "€",      // the case of the digits does not matter
		"%41bc":               "Abc",    // what need not be escaped may be
		"a+b":                 "a+b",    // a plus is a plus
		"Euro €":              "Euro €", // the SDK does not escape
		"100%":                "100%",
		"100% %20":            "100% %20",
		"%zz":                 "%zz",
		`"Euro %e2%82%ac"`:    "Euro €", // older versions of the bindings quoted
		`"say \"100%25\" \\"`: `say "100%" \`,
		`""`:                  "",
		`"`:                   `"`,
		`"a" and "b"`:         `"a" and "b"`,
		`"a\"`:                `"a\"`,
	} {
		if got := envelope.Unescape(text); got != want {
			t.Errorf("Unescape(%q) is %q, want %q", text, got, want)
		}
	}
}

func FuzzEscape(f *testing.F) {
	f.Add("Euro € 😀")
	f.Add(`"%" %zz`)
	f.Fuzz(func(t *testing.T, s string) {
		escaped := envelope.Escape(s)
		for i := range len(escaped) {
			if c := escaped[i]; c <= ' ' || c >= 0x7f || c == '"' {
				t.Fatalf("Escape(%q) is %q", s, escaped)
			}
		}
		if utf8.ValidString(s) && envelope.Unescape(escaped) != s {
			t.Fatalf("%q is escaped to %q and read as %q", s, escaped, envelope.Unescape(escaped))
		}
		envelope.Unescape(s)
	})
}

func TestHeadersRoundTrip(t *testing.T) {
	t.Parallel()
	for range 500 {
		m := random()
		var names []string
		var back postrider.Message
		envelope.Headers(m, func(name, value string) {
			names = append(names, name)
			if err := envelope.SetHeader(&back, name, envelope.Unescape(envelope.Escape(value))); err != nil {
				t.Errorf("%s %q: %v", name, value, err)
			}
		})
		if len(names) < 4 || names[0] != "specversion" || names[1] != "id" || names[2] != "source" || names[3] != "type" {
			t.Errorf("the headers are %v: the required ones come first", names)
		}
		back.Data = m.Data // travels as the payload
		checkEqual(t, &back, m)
	}
}

func TestSetHeaderRefuses(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, value string }{
		{"specversion", "0.3"},
		{"specversion", ""},
		{"time", "yesterday"},
		{"Ext", "x"},
		{"ext", "\n"},
		{"data", "x"},
		{"", "x"},
		{"id", "\xff"},
		{"subject", envelope.Unescape("%C0%A0")}, // "encoded byte sequences which are invalid in UTF-8 MUST be rejected"
	} {
		if err := envelope.SetHeader(new(postrider.Message), tt.name, tt.value); err == nil {
			t.Errorf("SetHeader(%q, %q) is no error", tt.name, tt.value)
		}
	}
}

func BenchmarkEscape(b *testing.B) {
	for name, s := range map[string]string{"clean": "0190163d-8694-739b-aea5-966c26f8ad91", "escaped": "Euro € 😀"} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				envelope.Unescape(envelope.Escape(s))
			}
		})
	}
}
