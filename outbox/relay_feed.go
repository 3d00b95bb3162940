package outbox

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"time"

	"github.com/jackc/pgx/v5"
)

// Reading by logical replication. A slot is made, beside the reading of the tables, once they are read to the end. What was
// committed before its beginning sees the snapshot that it exports, what is committed later comes through the feed, in the order of
// the commits. So the last thing to be read from the tables is what that snapshot sees and the cursor does not; and rows of the feed
// that the cursor sees, since the tables were read on while the slot was being made, are passed over.
//
// The cursor is a snapshot all the same. One is taken from time to time, and after it the end of the WAL. When the feed has come
// by there, all that the snapshot sees has been handed to the sender: the commit record of a transaction is written before any
// snapshot sees it. With that it becomes the cursor, as at the end of a scan of the tables, and the rules for the floors
// are the same. So the successor needs not know from where the rows came.

// feeding is the part of a term that has to do with logical replication.
type feeding struct {
	opened chan opened // when a feed is there, or is not to be had; nil: none is being opened

	feed  *feed // nil: the tables are read
	began time.Time

	seen *snapshot // the slot's, until the tables are read up to it
	gap  *cursor   // where that reading is, nil: it has not begun

	check *check    // the snapshot that is to be the next cursor
	told  time.Time // when the server was told how far we are

	failures int
	retry    time.Time // no earlier is it tried again
	problem  string    // the last that was logged
}

type opened struct {
	feed *feed
	err  error
}

// check is a snapshot whose rows are coming.
type check struct {
	scan cursor
	end  lsn   // the end of the WAL, after it was taken
	upTo int64 // the highest number, too
}

// came is the feed's news, nil if there is none.
func (f *feeding) came() <-chan struct{} {
	if f.feed == nil {
		return nil
	}
	return f.feed.came
}

// seekFeed opens a feed in the background, if one is wanted and it is time.
func (t *term) seekFeed() error {
	f := &t.feeding
	if t.r.cfg.Logical.Mode == LogicalOff || f.opened != nil || f.feed != nil || t.paused || time.Now().Before(f.retry) {
		return nil
	}
	if problem, err := t.r.feedProblem(t.ctx, t.conn); err != nil {
		return err
	} else if problem != nil {
		t.noFeed(problem)
		return nil
	}
	result := make(chan opened, 1)
	f.opened = result
	go func() {
		ctx, cancel := context.WithTimeout(t.ctx, 3*slotWait)
		defer cancel()
		feed, err := t.r.openFeed(ctx, true)
		result <- opened{feed, err}
	}()
	return nil
}

// noFeed notes why there is none.
func (t *term) noFeed(problem error) {
	f := &t.feeding
	if time.Since(f.began) > feedRetryMax {
		f.failures = 0
	}
	f.retry = time.Now().Add(min(feedRetry<<min(f.failures, 10), feedRetryMax))
	f.failures++
	if text := problem.Error(); text != f.problem {
		f.problem = text
		level := slog.LevelInfo
		if t.r.cfg.Logical.Mode == LogicalOn {
			level = slog.LevelWarn
			t.r.fail(fmt.Errorf("no logical replication: %w", problem))
		}
		t.r.log.Log(t.ctx, level, "no logical replication, the tables are read", "error", problem)
	}
}

// startFeed takes a feed into use.
func (t *term) startFeed(o opened) {
	f := &t.feeding
	f.opened = nil
	if o.err == nil && t.paused {
		o.feed.close()
		o.err = errFeedPaused
	}
	if o.err != nil {
		t.noFeed(o.err)
		return
	}
	seen, err := t.importSnapshot(o.feed.snapshot)
	if err == nil {
		err = o.feed.start()
	}
	if err != nil {
		o.feed.close()
		t.noFeed(err)
		return // if it was the term's own connection that failed, the next read says so
	}
	f.feed, f.began, f.seen, f.problem = o.feed, time.Now(), &seen, ""
	t.r.logical.Store(true)
	t.r.log.InfoContext(t.ctx, "messages come by logical replication", "slot", f.feed.slot)
}

// importSnapshot returns what the slot's snapshot sees. It fails on any other server or database than that of the tables.
func (t *term) importSnapshot(name string) (seen snapshot, err error) {
	err = pgx.BeginTxFunc(t.ctx, t.conn, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(t.ctx, "set transaction snapshot '"+name+"'"); err != nil {
			return err
		}
		var text string
		if err := tx.QueryRow(t.ctx, `select pg_current_snapshot()::text`).Scan(&text); err != nil {
			return err
		}
		seen, err = parseSnapshot(text)
		return err
	})
	return seen, err
}

// leaveFeed goes back to the tables, from the cursor of what was handed to the sender on.
func (t *term) leaveFeed(why error) {
	t.endFeed()
	t.noFeed(why)
	poke(t.r.outbox.wake)
}

// endFeed drops the slot.
func (t *term) endFeed() {
	f := &t.feeding
	if f.feed != nil {
		f.feed.close()
	}
	f.feed, f.seen, f.gap, f.check = nil, nil, nil, nil
	t.r.logical.Store(false)
}

// closeFeed ends also one that is being opened. The term's context has ended.
func (t *term) closeFeed() {
	t.endFeed()
	if t.feeding.opened != nil {
		if o := <-t.feeding.opened; o.err == nil {
			o.feed.close()
		}
	}
}

// follow hands what the feed has to the sender.
func (t *term) follow() error {
	for t.feeding.feed != nil && !t.paused && t.inFlight < readAhead {
		moved, err := t.readFeed()
		if err != nil || !moved {
			return err
		}
	}
	return nil
}

// readFeed hands over one page, first of what is still to be read from the tables.
func (t *term) readFeed() (bool, error) {
	f := &t.feeding
	switch {
	case t.reading.scan != nil: // a scan is finished as it was begun
		_, err := t.read()
		return true, err
	case f.seen != nil:
		return true, t.readGap()
	}
	rows, end, err := f.feed.batch()
	if err != nil { // the cursor does not cover the last rows: they come from the tables
		t.leaveFeed(err)
		return false, nil
	}
	p := page{after: t.reading}
	for _, s := range rows {
		if t.reading.prev.sees(s.xid) {
			continue
		}
		if len(p.rows) == 0 {
			p.since = s.at.Add(t.skew).UnixNano()
		}
		p.rows = append(p.rows, t.row(s.id, s.at, s.topic, s.attributes, s.data))
		p.upTo = max(p.upTo, s.id)
	}
	passed := f.check != nil && end >= f.check.end
	if passed {
		p.after, p.upTo = f.check.scan.finish(), max(p.upTo, f.check.upTo)
		f.check = nil
	}
	if len(p.rows) == 0 && !passed {
		return len(rows) > 0, nil
	}
	t.hand(p)
	return true, nil
}

// readGap reads what the slot's snapshot sees and the cursor does not, which stays where it is.
func (t *term) readGap() error {
	f := &t.feeding
	if f.gap == nil {
		c, news := t.reading.begin(*f.seen, math.MaxInt64, t.floor)
		if !news {
			f.seen = nil
			return nil
		}
		f.gap = &c
		t.kept.beginScan()
	}
	p, full, err := t.fetch(*f.gap)
	if err == nil {
		err = t.noteKept(&p, full)
	}
	if err != nil {
		return err
	}
	if full {
		c := f.gap.advance(p.rows[len(p.rows)-1].id)
		f.gap = &c
	} else {
		f.gap, f.seen = nil, nil
	}
	if len(p.rows) > 0 {
		p.after, p.upTo = t.reading, p.rows[len(p.rows)-1].id
		t.hand(p)
	}
	return nil
}

// checkFeed looks at the database in place of a poll: the next cursor, and if the slot and the publication are in order. It returns
// when to look again.
func (t *term) checkFeed() (time.Duration, error) {
	f := &t.feeding
	var end int64
	var retained *int64
	var publication string
	s, err := t.look(t.conn.QueryRow(t.ctx, t.r.feedQueries.probe, f.feed.slot), &end, &retained, &publication)
	if err != nil {
		return 0, err
	}
	idle := min(t.r.cfg.PollInterval, feedStatus)
	switch limit := t.r.cfg.Logical.MaxRetained; {
	case t.paused:
		t.leaveFeed(errFeedPaused)
	case retained == nil:
		t.leaveFeed(errFeedGone)
	case *retained > limit:
		t.leaveFeed(fmt.Errorf("the slot keeps %d bytes of WAL, MaxRetained is %d", *retained, limit))
	case publication != f.feed.publication: // in this snapshot: what it hides is not visible in an earlier one
		t.leaveFeed(errFeedChanged)
	case f.feed.stuck() > feedStuck:
		t.leaveFeed(errFeedStuck)
	case f.check == nil && f.seen == nil && t.reading.scan == nil:
		c, news := t.reading.begin(s, t.highest, t.floor)
		if !news {
			return idle, nil
		}
		f.check = &check{scan: c, end: lsn(end), upTo: t.highest}
		t.tellFeed()
	}
	return min(idle, writeInterval), nil
}

// keepFeed tells the server from time to time how far we are, which keeps the connection too.
func (t *term) keepFeed() {
	if f := &t.feeding; f.feed != nil && (f.check != nil || time.Since(f.told) >= feedStatus) {
		t.tellFeed()
	}
}

// tellFeed asks the server for an answer too, if there is a snapshot to be passed.
func (t *term) tellFeed() {
	f := &t.feeding
	f.told = time.Now()
	if err := f.feed.status(f.check != nil); err != nil {
		t.leaveFeed(err)
	}
}
