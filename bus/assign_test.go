package bus

import (
	"fmt"
	"testing"
)

// TestAssign looks at the shares of up to 20 members: even, complete, and mostly the same after one has gone.
func TestAssign(t *testing.T) {
	t.Parallel()
	const n = 64
	for count := 1; count <= 20; count++ {
		var all []string
		for i := range count {
			all = append(all, fmt.Sprintf("member-%02d", i))
		}
		owners := func(present []string) map[int]string {
			owner := map[int]string{}
			for _, m := range present {
				mine := assign(present, n, m)
				if fair := (n + len(present) - 1) / len(present); len(mine) > fair {
					t.Errorf("of %d members %s has %d partitions, want at most %d", len(present), m, len(mine), fair)
				}
				for p := range mine {
					if owner[p] != "" {
						t.Errorf("of %d members %s and %s have partition %d", len(present), owner[p], m, p)
					}
					owner[p] = m
				}
			}
			if len(owner) != n {
				t.Errorf("%d members have %d of %d partitions", len(present), len(owner), n)
			}
			return owner
		}
		before := owners(all)
		if count == 1 {
			continue
		}
		moved := 0
		for p, now := range owners(all[1:]) {
			if before[p] != now {
				moved++
			}
		}
		t.Logf("%d members, one goes: %d of %d partitions move", count, moved, n)
		if count > 3 && moved > n/2 {
			t.Errorf("of %d partitions %d moved when one of %d members went", n, moved, count)
		}
	}
}
