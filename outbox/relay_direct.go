package outbox

import (
	"bytes"
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
)

// The direct way. What a DB has committed on the pool of the relay that leads, in its own process, the relay need not read: the
// writer hands it over with the numbers that it got. It is sent at once if every lower number is accounted for, that is
// handed to the sender before, or known to belong to a transaction that has ended without it; so nothing is overtaken, of no
// writer whatever it is, and whoever comes later has a higher number. If one is not, a look at the tables follows, as ever.
//
// The cursor does not move by it. The rows come again with a later look, which passes them over; after a crash in between they
// are duplicates by their ids.

const (
	// directMax is how many messages wait for the relay at most, and are passed over later at most. Beyond it they come by a look.
	directMax = 512

	// directLook is from a message that went directly to the look that moves the cursor behind it.
	directLook = 10 * time.Millisecond

	// A page of a message or two costs twice as much a message as one of what a look finds under load. So the direct way is for
	// moderate rates: a page each directEvery, directBurst of them at once, and beyond that none for directRest.
	directEvery = time.Millisecond
	directBurst = 8
	directRest  = 20 * time.Millisecond
)

// throttle holds the direct way to its rate.
type throttle struct {
	full  time.Time // when all of the burst is to be had again
	until time.Time // nothing goes before
}

func (h *throttle) resting(now time.Time) bool { return now.Before(h.until) }

// page notes one.
func (h *throttle) page(now time.Time) {
	if h.full.Before(now) {
		h.full = now
	}
	if h.full = h.full.Add(directEvery); h.full.Sub(now) > directBurst*directEvery {
		h.until = now.Add(directRest)
	}
}

// direct is the way from the DBs of one pool to the relay that leads on it.
type direct struct {
	came chan struct{}

	mu     sync.Mutex
	rows   []committed
	closed bool // the relay does not lead any more
}

// committed is a row that is known to be committed.
type committed struct {
	id               int64
	topic            string
	attributes, data []byte
}

// directTo returns the way to the relay that leads on a pool in this process, nil if there is none.
func (o *Outbox) directTo(pool *pgxpool.Pool) *direct {
	d, _ := o.directs.Load(pool)
	to, _ := d.(*direct)
	return to
}

// numbered reads the answer of a statement with returning: the numbers, none if the outbox is paused.
func numbered(answer pgx.Rows, err error) ([]int64, error) {
	if err != nil {
		return nil, err
	}
	var ids []int64
	var id int64
	var paused bool
	_, err = pgx.ForEachRow(answer, []any{&id, &paused}, func() error {
		if !paused {
			ids = append(ids, id)
		}
		return nil
	})
	return ids, err
}

// hand hands over rows that have been committed, and returns false if it cannot. ids are their numbers as they were returned. The
// rows are kept.
func (d *direct) hand(r rows, ids []int64) bool {
	if d == nil || len(ids) != len(r.topics) || !slices.IsSorted(ids) { // a trigger, perhaps
		return false
	}
	d.mu.Lock()
	fits := !d.closed && len(d.rows)+len(ids) <= directMax
	if fits {
		for i, id := range ids {
			d.rows = append(d.rows, committed{id, r.topics[i], r.attributes[i], r.data[i]})
		}
	}
	d.mu.Unlock()
	if fits {
		poke(d.came)
	}
	return fits
}

// openDirect lets DBs hand over their rows until the way is closed again. What is left on it then needs a look.
func (t *term) openDirect() (closeIt func()) {
	o, d := t.r.outbox, t.direct
	o.directs.Store(t.r.pool, d)
	return func() {
		o.directs.CompareAndDelete(t.r.pool, d)
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.closed = true; len(d.rows) > 0 {
			poke(o.committed)
		}
	}
}

func (d *direct) take() []committed {
	d.mu.Lock()
	defer d.mu.Unlock()
	rows := d.rows
	d.rows = nil
	return rows
}

// own copies what belongs to the caller of Publish.
func (r *rows) own() {
	for i := range r.data {
		r.data[i] = bytes.Clone(r.data[i])
	}
}

// account is which numbers are accounted for: all up to dense, and those beyond.
type account struct {
	dense  int64
	beyond map[int64]bool
	forgot int64 // up to here some of those beyond may not be known
}

// add notes a row that was handed to the sender. Those beyond a number that is missing are forgotten when they are too many:
// settle makes up for it.
func (a *account) add(id int64) {
	switch {
	case id == a.dense+1:
		a.dense++
		a.rise()
	case id > a.dense:
		if a.beyond == nil || len(a.beyond) >= 8*directMax {
			for id := range a.beyond {
				a.forgot = max(a.forgot, id)
			}
			a.beyond = map[int64]bool{}
		}
		a.beyond[id] = true
	}
}

// settle notes that whatever has a number up to some was handed over before, or never will be.
func (a *account) settle(upTo int64) {
	if upTo <= a.dense {
		return
	}
	a.dense = upTo
	for id := range a.beyond {
		if id <= upTo {
			delete(a.beyond, id)
		}
	}
	a.rise()
}

func (a *account) rise() {
	for a.beyond[a.dense+1] {
		a.dense++
		delete(a.beyond, a.dense)
	}
}

// solid is the number up to which all rows are seen by the cursor's first snapshot, or were rolled back: the transactions that it
// does not see have higher ones.
func (c cursor) solid() int64 {
	low := c.floor
	for _, floor := range c.floors {
		low = min(low, floor)
	}
	return low
}

// sendDirect sends what DBs have handed over, and reports whether no look at the tables is needed for it. What comes while a page is
// being published waits for the end of that and goes together.
func (t *term) sendDirect() bool {
	now := time.Now()
	off := t.feeding.feed != nil || t.paused || t.throttle.resting(now)
	if t.inFlight > 0 && !off {
		return true
	}
	rows := t.direct.take()
	if len(rows) == 0 {
		return true
	}
	if off || len(t.early) > directMax {
		return false
	}
	slices.SortFunc(rows, func(a, b committed) int { return cmp.Compare(a.id, b.id) })
	p := page{after: t.reading, since: now.UnixNano()}
	a := &t.account
	next, all := a.dense+1, true
	for _, r := range rows {
		for a.beyond[next] {
			next++
		}
		if r.id < next || a.beyond[r.id] { // a look was faster
			continue
		}
		if all = r.id == next && r.id > a.forgot; !all {
			break
		}
		next++
		p.rows = append(p.rows, t.row(r.id, now, r.topic, r.attributes, r.data))
	}
	if len(p.rows) > 0 {
		t.throttle.page(now)
		t.hand(p)
		for _, r := range p.rows {
			t.early[r.id] = r.msg
		}
	}
	return all
}

// passOver removes the rows from a page that went directly. A row that only has the number of one of them stays: the writer
// may have been connected to another server than the relay, while one took the other's place.
func (t *term) passOver(p *page) {
	if len(t.early) == 0 {
		return
	}
	n := len(p.rows)
	p.rows = slices.DeleteFunc(p.rows, t.wasEarly)
	p.direct = n - len(p.rows)
}

// wasEarly reports whether a row that was read went directly, and forgets it.
func (t *term) wasEarly(r row) bool {
	m, ok := t.early[r.id]
	delete(t.early, r.id)
	return ok && same(m, r.msg)
}

func same(a, b *postrider.Message) bool {
	return a.ID == b.ID && a.Source == b.Source && a.Topic == b.Topic
}

// seal moves the cursor behind what went directly, at the end of a term, as far as nothing else stands in between.
func (t *term) seal() error {
	if len(t.early) == 0 {
		return nil
	}
	c := t.done
	if c.scan == nil {
		s, err := t.probe()
		if err != nil {
			return err
		}
		var news bool
		if c, news = c.begin(s, t.highest, t.floor); !news {
			return nil
		}
	}
	p, full, err := t.fetch(c)
	if err != nil {
		return err
	}
	n := 0
	for n < len(p.rows) && t.wasEarly(p.rows[n]) {
		n++
	}
	switch {
	case n == len(p.rows) && !full:
		t.done = c.finish()
	case n > 0:
		t.done = c.advance(p.rows[n-1].id)
	}
	if t.tail != nil {
		t.tail.settled++ // so that the last mark is made of this cursor
		t.tail.accepted(page{direct: n})
	}
	return nil
}
