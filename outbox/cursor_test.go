package outbox

import (
	"reflect"
	"testing"
)

func mustSnapshot(t *testing.T, text string) snapshot {
	t.Helper()
	s, err := parseSnapshot(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// The floors over a few scans, by the rules in the comment of cursor.
func TestCursorFloors(t *testing.T) {
	t.Parallel()
	c := cursor{prev: mustSnapshot(t, "1:1:")}
	scanned := func(text string, highest, floor, wantFrom int64) {
		t.Helper()
		next, news := c.begin(mustSnapshot(t, text), highest, floor)
		if !news || next.scan.last != wantFrom {
			t.Fatalf("scan of %s: news %v, from %+v, want from %d", text, news, next.scan, wantFrom)
		}
		c = next.advance(highest).finish()
	}
	idle := func(text string, highest int64) {
		t.Helper()
		if _, news := c.begin(mustSnapshot(t, text), highest, highest); news {
			t.Fatalf("news in %s, with %d drawn, after %+v", text, highest, c)
		}
	}
	scanned("10:20:10,15", 100, 0, 0) // all of 10 and 15 is above 0
	scanned("10:25:10,22", 120, 100, 0)
	if want := map[uint64]int64{10: 0, 22: 0}; c.floor != 100 || !reflect.DeepEqual(c.floors, want) {
		t.Fatalf("floor %d, floors %v, want 100 and %v", c.floor, c.floors, want)
	}
	scanned("10:30:10,26", 130, 120, 0) // 22 ended, whose rows may be anywhere above 0
	if want := map[uint64]int64{10: 0, 26: 100}; c.floor != 120 || !reflect.DeepEqual(c.floors, want) {
		t.Fatalf("floor %d, floors %v, want 120 and %v", c.floor, c.floors, want)
	}
	scanned("10:31:10", 130, 130, 100) // 26 ended
	idle("10:31:10", 130)
	idle("10:40:10,35", 130) // other transactions write, nobody draws a number
	scanned("41:41:", 130, 130, 0)
	idle("50:50:", 130)
	idle("41:41:", 140) // numbers were drawn, and nothing has committed since
}

func TestCursorIsStoredWhole(t *testing.T) {
	t.Parallel()
	c := cursor{prev: mustSnapshot(t, "10:20:10,15"), floor: 7, floors: map[uint64]int64{10: 1, 15: 7}}
	inScan, news := c.begin(mustSnapshot(t, "15:30:15"), 99, 50)
	if !news {
		t.Fatal("no news")
	}
	inScan = inScan.advance(60)
	for _, c := range []cursor{c, inScan} {
		got, err := c.store().load()
		if err != nil {
			t.Fatal(err)
		}
		if c.scan != nil {
			s := *c.scan
			s.floor = c.floor // is not stored, see load
			c.scan = &s
		}
		if !reflect.DeepEqual(got, c) {
			t.Errorf("stored and loaded: %+v %+v, want %+v %+v", got, got.scan, c, c.scan)
		}
	}
}

func FuzzParseSnapshot(f *testing.F) {
	for _, s := range []string{"1:1:", "10:20:10,15", "18446744073709551615:18446744073709551615:", "5", "1:x:", "1:9:4,3", "1:9:,"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseSnapshot(text)
		if err != nil {
			return
		}
		if s.text != text || len(s.ended(snapshot{})) != len(s.xip) || len(s.ended(s)) != 0 {
			t.Errorf("%q: %+v", text, s)
		}
	})
}
