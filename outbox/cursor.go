package outbox

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// snapshot is a pg_snapshot: it sees the transactions below xmax that are not in xip. It is immutable.
type snapshot struct {
	text string   // as PostgreSQL writes it
	xmax uint64   // the latest transaction that had ended, plus one
	xip  []uint64 // those below xmax that were open, ascending
}

// parseSnapshot reads "xmin:xmax:xip,xip".
func parseSnapshot(text string) (snapshot, error) {
	bad := fmt.Errorf("malformed pg_snapshot %q", text)
	parts := strings.Split(text, ":")
	if len(parts) != 3 {
		return snapshot{}, bad
	}
	s := snapshot{text: text}
	var err error
	if s.xmax, err = strconv.ParseUint(parts[1], 10, 64); err != nil {
		return snapshot{}, bad
	}
	if parts[2] == "" {
		return s, nil
	}
	for x := range strings.SplitSeq(parts[2], ",") {
		xid, err := strconv.ParseUint(x, 10, 64)
		if err != nil {
			return snapshot{}, bad
		}
		s.xip = append(s.xip, xid)
	}
	if !slices.IsSorted(s.xip) {
		return snapshot{}, bad
	}
	return s, nil
}

// ended returns the transactions that are open in s and have ended in the later snapshot.
func (s snapshot) ended(later snapshot) []uint64 {
	var ended []uint64
	for _, x := range s.xip {
		if _, open := slices.BinarySearch(later.xip, x); !open {
			ended = append(ended, x)
		}
	}
	return ended
}

// sees reports whether the transaction had ended when s was taken.
func (s snapshot) sees(xid uint64) bool {
	_, open := slices.BinarySearch(s.xip, xid)
	return xid < s.xmax && !open
}

// cursor is how far the outbox is read: all rows that prev sees, and of those that cur sees too the ones up to last.
//
// The floors say where the rows begin that prev does not see, so that a scan need not start at the beginning of the ring.
// A transaction has its xid before it draws an id. So if a number was read from the sequence before some
// transaction took its xid, and that transaction has ended before a snapshot, then every transaction from the
// snapshot's xmax on took its xid later still, and its ids are higher than the number. The relay's own cursor writes are
// such transactions. The number may not be read merely before the snapshot: xmax is the latest transaction that has
// ended plus one, and one that is open may have an xid above it and a low id already.
//
// A cursor is a value; what it refers to is never changed.
type cursor struct {
	prev   snapshot
	floor  int64            // transactions from prev.xmax on have ids above it
	floors map[uint64]int64 // for each transaction in prev.xip, the same

	scan *scan // nil: between two scans
}

// scan is the reading of what one snapshot sees and the one before it did not.
type scan struct {
	cur   snapshot
	ended []uint64 // transactions open in prev that have ended in cur
	last  int64    // ids up to here are read
	floor int64    // the cursor's floor after the scan
}

// begin starts the scan of what s sees, or returns false if there is nothing to be seen: s is the snapshot that was read
// last, or no open transaction has ended and no number above the floor was drawn, highest being the last one. floor is a
// number read before a cursor write that had committed when s was taken.
func (c cursor) begin(s snapshot, highest, floor int64) (cursor, bool) {
	if s.text == c.prev.text { // no transaction with an xid has ended since
		return c, false
	}
	ended := c.prev.ended(s)
	if len(ended) == 0 && highest <= c.floor {
		return c, false
	}
	low := c.floor
	for _, x := range ended {
		low = min(low, c.floors[x])
	}
	c.scan = &scan{cur: s, ended: ended, last: low, floor: max(floor, c.floor)}
	return c, true
}

// advance notes that a page up to id is read.
func (c cursor) advance(id int64) cursor {
	s := *c.scan
	s.last = id
	c.scan = &s
	return c
}

// finish ends the scan: its snapshot becomes prev. A transaction that is open in it is bounded by its old floor, or by that
// of the old xmax if it is new.
func (c cursor) finish() cursor {
	floors := make(map[uint64]int64, len(c.scan.cur.xip))
	for _, x := range c.scan.cur.xip {
		if old, open := c.floors[x]; open {
			floors[x] = old
		} else {
			floors[x] = c.floor
		}
	}
	return cursor{prev: c.scan.cur, floor: c.scan.floor, floors: floors}
}

// stored is a cursor as the relay's row holds it.
type stored struct {
	prev, cur   string
	last, floor int64
	floors      map[uint64]int64
}

func (c cursor) store() stored {
	s := stored{prev: c.prev.text, floor: c.floor, floors: c.floors}
	if s.floors == nil {
		s.floors = map[uint64]int64{}
	}
	if c.scan != nil {
		s.cur, s.last = c.scan.cur.text, c.scan.last
	}
	return s
}

// load is the inverse of store. The floor after a scan that goes on is not stored; the old one is lower and holds as well.
func (s stored) load() (cursor, error) {
	prev, err := parseSnapshot(s.prev)
	if err != nil {
		return cursor{}, err
	}
	c := cursor{prev: prev, floor: s.floor, floors: s.floors}
	if s.cur == "" {
		return c, nil
	}
	cur, err := parseSnapshot(s.cur)
	if err != nil {
		return cursor{}, err
	}
	c.scan = &scan{cur: cur, ended: prev.ended(cur), last: s.last, floor: s.floor}
	return c, nil
}
