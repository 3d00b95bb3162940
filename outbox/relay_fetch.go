package outbox

import (
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/envelope"
)

// pageBytes bounds what a page holds in memory. The first message is taken whatever its size.
const pageBytes = 8 << 20

// page is some rows in the order of their numbers.
type page struct {
	rows  []row
	after cursor // once the page is done
	upTo  int64  // numbers up to here are done then, or belong to open transactions
	since int64  // when its first row was written, Unix nanoseconds by our clock; 0: it is empty

	direct int // how many rows more it had, which had gone directly
}

// row is one message of the outbox.
type row struct {
	id    int64
	topic string
	msg   *postrider.Message
	err   error // it cannot be read
	kept  *kept // it was sent before the cursor went back; nil: it is to be sent
}

// sight is what a look at the outbox has found.
type sight int

const (
	nothing sight = iota
	some          // all that could be seen
	more          // a full page
)

// read looks for rows and hands a page to the sender.
func (t *term) read() (sight, error) {
	c := t.reading
	if c.scan == nil || t.paused {
		s, err := t.probe()
		if err != nil || t.paused {
			return nothing, err
		}
		if c.scan == nil {
			var news bool
			if c, news = c.begin(s, t.highest, t.floor); !news {
				return nothing, nil
			}
			t.kept.beginScan()
		}
	}
	p, full, err := t.fetch(c)
	if err == nil {
		err = t.noteKept(&p, full)
	}
	if err != nil {
		return nothing, err
	}
	found := nothing
	if full {
		found = more
		p.upTo = p.rows[len(p.rows)-1].id
		p.after = c.advance(p.upTo)
	} else {
		if len(p.rows) > 0 {
			found = some
		}
		p.upTo = t.highest
		p.after = c.finish()
	}
	t.hand(p)
	return found, nil
}

// hand gives a page to the sender.
func (t *term) hand(p page) {
	t.passOver(&p)
	for _, r := range p.rows {
		t.account.add(r.id)
	}
	t.account.settle(p.after.solid())
	if t.inFlight == 0 {
		t.r.oldest.Store(p.since)
	}
	t.reading, t.behind = p.after, p.since
	t.inFlight++
	t.pages <- p // never blocks: there is room for all that may be in flight
}

// probe takes a snapshot and the highest number, and looks if the outbox is paused.
func (t *term) probe() (snapshot, error) {
	return t.look(t.conn.QueryRow(t.ctx, t.r.outbox.q.probe))
}

// look reads the answer of a probe, and what it has beside.
func (t *term) look(answer pgx.Row, beside ...any) (snapshot, error) {
	var text string
	var highest int64
	var started, now time.Time
	err := answer.Scan(append([]any{&text, &highest, &started, &now, &t.paused}, beside...)...)
	if err != nil {
		return snapshot{}, fmt.Errorf("outbox: take snapshot: %w", err)
	}
	if !started.Equal(t.started) {
		return snapshot{}, errServerRestarted
	}
	t.highest, t.skew = highest, time.Since(now)
	t.measure()
	return parseSnapshot(text)
}

// fetch reads the next page of a scan and reports whether there may be more.
func (t *term) fetch(c cursor) (p page, full bool, err error) {
	ended := make([]string, len(c.scan.ended))
	for i, x := range c.scan.ended {
		ended[i] = strconv.FormatUint(x, 10)
	}
	batch := &pgx.Batch{}
	batch.Queue(t.r.outbox.q.plan)
	batch.Queue(t.r.outbox.q.page, c.scan.last, strconv.FormatUint(c.prev.xmax, 10), ended, c.scan.cur.text, t.limit)
	results := t.conn.SendBatch(t.ctx, batch)
	defer func() {
		if closeErr := results.Close(); err == nil && closeErr != nil {
			err = fmt.Errorf("outbox: read page: %w", closeErr)
		}
	}()
	if _, err := results.Exec(); err != nil {
		return page{}, false, fmt.Errorf("outbox: prepare to read page: %w", err)
	}
	cur, err := results.Query()
	if err != nil {
		return page{}, false, fmt.Errorf("outbox: read page: %w", err)
	}
	defer cur.Close()

	size := 0
	for cur.Next() {
		var id int64
		var at time.Time
		var topic string
		var attributes, data []byte
		if err := cur.Scan(&id, &at, &topic, &attributes, &data); err != nil {
			return page{}, false, fmt.Errorf("outbox: read row: %w", err)
		}
		if len(p.rows) == 0 {
			p.since = at.Add(t.skew).UnixNano()
		}
		p.rows = append(p.rows, t.row(id, at, topic, attributes, data))
		if size += len(attributes) + len(data); size >= pageBytes {
			full = true
			break // closing reads the rest and throws it away, so ask for less from now on
		}
	}
	cur.Close()
	if err := cur.Err(); err != nil {
		return page{}, false, fmt.Errorf("outbox: read page: %w", err)
	}
	if full {
		t.limit = len(p.rows)
		return p, true, nil
	}
	full = len(p.rows) == t.limit
	t.limit = min(2*t.limit, t.r.cfg.BatchSize)
	return p, full, nil
}

// row makes the message of a row.
func (t *term) row(id int64, at time.Time, topic string, attributes, data []byte) row {
	m, err := t.r.outbox.message(t.identity, id, at, topic, attributes, data)
	return row{id: id, topic: topic, msg: m, err: err}
}

// message makes the message of a row. One without attributes, as any SQL client may insert it, gets an id from the
// outbox's identity and its number, the topic as its type and the outbox's source.
func (o *Outbox) message(identity string, id int64, at time.Time, topic string, attributes, data []byte) (*postrider.Message, error) {
	m := &postrider.Message{}
	var err error
	if attributes == nil {
		m.ID, m.Source, m.Type, m.Time = identity+"-"+strconv.FormatInt(id, 10), o.cfg.Source, topic, at
	} else {
		err = envelope.ParseProto(attributes, m)
	}
	m.Topic, m.Data = topic, data
	return m, err
}
