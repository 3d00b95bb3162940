package fingerprint

import (
	"testing"

	"github.com/postrider/postrider"
)

func TestFingerprintGroupsTheSameFault(t *testing.T) {
	t.Parallel()
	for want, texts := range map[string][]string{
		"order # costs nothing": {"order o-17 costs nothing", "order 0190b2c4-7d5e-7c3a-9e1f-aabbccddeeff costs nothing", "order 9 costs nothing"},
		"dial tcp #: connect: refused": {
			"dial tcp 10.0.0.1:4222: connect: refused", "dial tcp 127.0.0.1:80: connect: refused", "dial tcp 7: connect: refused",
		},
		"no such reader ?, tried # times":  {`no such reader "Zoë", tried 3 times`, "no such reader 'x y', tried 4 times", "no such reader `a \"b\"`, tried 5 times"},
		`json: ? at #`:                     {`json: "a \"quoted\" b" at 2026-01-02T03:04:05.06Z`, `json: "" at 2026-01-02T03:04:05Z`},
		"the user's order # can't be sent": {"the user's order 1 can't be sent", "the user's order 22 can't be sent"},
		`an open "quote, #`:                {`an open "quote, 1`, `an open "quote, 1.5s`},
		"größer als # %, ±#.":              {"größer als 100 %, ±5.", "größer als 7 %, ±1,5."},
		"":                                 {""},
	} {
		for _, text := range texts {
			if got := normalise(text); got != want {
				t.Errorf("%q becomes %q, want %q", text, got, want)
			}
			if Of(postrider.NotFound, text) != Of(postrider.NotFound, texts[0]) {
				t.Errorf("%q and %q have different fingerprints", text, texts[0])
			}
		}
	}
	base := Of(postrider.NotFound, "no such reader")
	if Of(postrider.Internal, "no such reader") == base || Of(postrider.NotFound, "no such writer") == base {
		t.Error("different faults have one fingerprint")
	}
	// Stored in letters: another value splits the groups of those that are there.
	if got := Of(postrider.NotFound, `no order "o-17" (3 tries)`); got != "f0eb293ee4fb31f2" {
		t.Errorf("fingerprint is %s", got)
	}
}

func FuzzNormalise(f *testing.F) {
	for _, s := range []string{`a "b" 1.5`, "it's 'x' `y`", "\xff\"", "1:2:3.", "'\n'"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if once := normalise(s); normalise(once+" 17") != normalise(once+" 4") {
			t.Errorf("%q: a number at the end makes a difference", s)
		}
	})
}
