package outbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sort"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
)

// Tailer is an optional interface of the publisher that a relay is given; bus.Bus has it. With it the relay finds out when
// the broker has lost what it had accepted, because it does not sync and lost power, or because a stream was deleted and
// created again, and sends again what the outbox retains of it. What wraps a Tailer must be one to have that.
type Tailer interface {
	postrider.Publisher

	// PublishOnce is Publish without further attempts after one that failed.
	PublishOnce(ctx context.Context, msgs ...*postrider.Message) error

	// Tail returns where the streams of these topics end, by stream: whatever was accepted before the call is up to there. With
	// delayed it tells as well of where messages wait that are to be delivered later (postrider.ExtDeliverAt).
	Tail(ctx context.Context, topics []string, delayed bool) (map[string]string, error)

	// Lost returns the streams that do not hold any more what was up to these tails. What was removed on purpose is not lost.
	Lost(ctx context.Context, tails map[string]string) ([]string, error)

	// Reconnects changes when the connection was lost and made again.
	Reconnects() uint64
}

// Once in a while, and when there is nothing more to send, the relay writes a mark: the cursor with the tails of all
// streams, read after everything that the cursor covers was acknowledged. Whenever the broker may have lost something (a
// term begins, the connection was lost, a publish has failed) nothing is published before the newest mark was found to
// hold. Else the cursor goes back to the newest mark that does: what was lost and what has come since are sent in
// their order, and what the broker still has are duplicates by id. What was sent after the newest mark is in
// doubt then as well, so the cursor goes back to that mark at least.
const (
	markEvery   = time.Second
	tailTimeout = 5 * time.Second // of one look at the broker
	tailEvery   = 5 * time.Second // between two looks while nothing is sent
	oddLimit    = 3               // looks that fail though the broker is there, until the relay goes on without
)

var errTailLost = errors.New("outbox: the broker may have lost what it had accepted: going back to where it is known to be whole")

// tailWatch is what a term knows of the broker's streams.
type tailWatch struct {
	pub  Tailer
	log  *slog.Logger
	jobs chan markJob
	done chan markJob

	mu        sync.Mutex
	tails     map[string]string // of the newest mark
	sent      int               // pages with messages that were accepted in this term ...
	marked    int               // ... and so many of them are behind the newest mark
	doubt     bool              // look before publishing
	reconnect uint64            // Tailer.Reconnects at the last look
	odd       int

	// For the goroutine of lead.
	settled int // pages with messages
	told    int // so many of them are in a mark, or in one that is being made
	topics  map[string]bool
	delayed bool // and where messages wait that were put off
	asked   time.Time
	asking  bool
	failing time.Time // since when no mark could be made
	last    string    // topic seen last
}

// markJob asks for a mark, and is the answer.
type markJob struct {
	cursor  stored
	settled int
	topics  []string
	delayed bool
	tails   map[string]string
	err     error
}

func newTailWatch(pub Tailer, log *slog.Logger, tails map[string]string) *tailWatch {
	return &tailWatch{
		pub: pub, log: log, tails: tails, doubt: true, jobs: make(chan markJob, 1), done: make(chan markJob, 1), topics: map[string]bool{},
	}
}

// look fails with errTailLost if the broker is not known to have all that it accepted. It is called before each attempt to
// publish and before a mark is made, and returns at once if nothing gives reason to doubt.
func (w *tailWatch) look(ctx context.Context) error {
	if w == nil {
		return nil
	}
	reconnect := w.pub.Reconnects()
	w.mu.Lock()
	tails, unmarked := w.tails, w.sent > w.marked
	doubt := w.doubt || reconnect != w.reconnect
	w.mu.Unlock()
	if !doubt {
		return nil
	}
	err := w.holds(ctx, tails)
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case errors.Is(err, errTailLost):
		return err
	case err == nil && unmarked:
		return errTailLost
	case err != nil && !errors.Is(err, postrider.Unavailable) && ctx.Err() == nil:
		if w.odd++; w.odd < oddLimit {
			return err
		}
		w.log.WarnContext(ctx, "cannot see if the broker still has what it accepted, going on", "error", err)
	case err != nil:
		return err
	}
	w.doubt, w.reconnect, w.odd = false, reconnect, 0
	return nil
}

func (w *tailWatch) holds(ctx context.Context, tails map[string]string) error {
	if len(tails) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, tailTimeout)
	defer cancel()
	lost, err := w.pub.Lost(ctx, tails)
	if err == nil && len(lost) > 0 {
		slices.Sort(lost)
		w.log.WarnContext(ctx, "the broker has lost what it had accepted", "streams", lost)
		err = errTailLost
	}
	return err
}

// published takes the result of an attempt: one that did not reach the broker gives reason to doubt.
func (w *tailWatch) published(err error) {
	if w != nil && (errors.Is(err, postrider.Unavailable) || errors.Is(err, postrider.DeadlineExceeded)) {
		w.mu.Lock()
		w.doubt = true
		w.mu.Unlock()
	}
}

// accepted notes that a page is with the broker.
func (w *tailWatch) accepted(p page) {
	if w != nil && len(p.rows)+p.direct > 0 {
		w.mu.Lock()
		w.sent++
		w.mu.Unlock()
	}
}

// run reads tails for those who ask, and looks at the streams now and then while nobody does. It ends with the jobs.
func (w *tailWatch) run(ctx context.Context, lost func()) {
	ticker := time.NewTicker(tailEvery)
	defer ticker.Stop()
	for {
		select {
		case job, open := <-w.jobs:
			if !open {
				return
			}
			job.tails, job.err = w.read(ctx, job)
			if errors.Is(job.err, errTailLost) {
				lost()
			}
			w.done <- job
		case <-ticker.C:
			w.mu.Lock()
			tails := w.tails
			w.mu.Unlock()
			if errors.Is(w.look(ctx), errTailLost) || errors.Is(w.holds(ctx, tails), errTailLost) {
				lost()
			}
		}
	}
}

// read reads tails of a broker that was not away since it accepted what they are to stand for: else they may be the ends
// of streams that have lost it.
func (w *tailWatch) read(ctx context.Context, job markJob) (map[string]string, error) {
	if err := w.look(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, tailTimeout)
	defer cancel()
	tails, err := w.pub.Tail(ctx, job.topics, job.delayed)
	reconnect := w.pub.Reconnects()
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil && reconnect != w.reconnect {
		err = postrider.Errorf(postrider.Unavailable, "outbox: the connection was lost while the ends of streams were read")
	}
	return tails, err
}

// note takes a page that is settled. Where nothing was accepted there may be no stream.
func (w *tailWatch) note(res result) {
	if w == nil || len(res.page.rows)+res.page.direct == 0 {
		return
	}
	w.settled++
	dead := map[int64]bool{}
	for _, d := range res.dead {
		dead[d.row.id] = true
	}
	for _, row := range res.page.rows {
		if dead[row.id] {
			continue
		}
		if row.topic != w.last {
			w.last, w.topics[row.topic] = row.topic, true
		}
		w.delayed = w.delayed || row.delayed()
	}
}

// job is the next mark, if there is anything new.
func (w *tailWatch) job(done cursor) (job markJob, news bool) {
	if w.settled == w.told {
		return job, false
	}
	w.told = w.settled
	job = markJob{cursor: done.store(), settled: w.settled, topics: slices.Sorted(maps.Keys(w.topics)), delayed: w.delayed}
	w.topics, w.last, w.delayed = map[string]bool{}, "", false
	return job, true
}

// askForMark has a mark made if one is due.
func (t *term) askForMark() {
	w := t.tail
	if w == nil || w.asking || time.Since(w.asked) < markEvery {
		return
	}
	if job, news := w.job(t.done); news {
		w.asking, w.asked = true, time.Now()
		w.jobs <- job
	}
}

// marks is where answers come from, nil if there are none.
func (t *term) marks() <-chan markJob {
	if t.tail == nil {
		return nil
	}
	return t.tail.done
}

// mark writes a mark. Where the broker takes messages but does not tell its tails for a while, a mark without tails stands
// for all of them, lest everything since the last one be sent again with each term.
func (t *term) mark(ctx context.Context, job markJob) error {
	w := t.tail
	w.asking = false
	tails := maps.Clone(w.tails) // nobody else changes it
	switch {
	case job.err == nil:
		w.failing = time.Time{}
		maps.Copy(tails, job.tails)
	case w.failing.IsZero() || time.Since(w.failing) < 2*tailTimeout || errors.Is(job.err, postrider.Unavailable):
		if w.failing.IsZero() {
			w.failing = time.Now()
		}
		for _, topic := range job.topics {
			w.topics[topic] = true
		}
		w.told, w.delayed = -1, w.delayed || job.delayed
		return nil
	default:
		t.r.log.WarnContext(ctx, "cannot see where the broker's streams end: what it loses from now on will not be noticed", "error", job.err)
		tails, w.failing = map[string]string{}, time.Time{}
	}
	if err := t.writeMark(ctx, job.cursor, tails); err != nil {
		return err
	}
	w.mu.Lock()
	w.tails, w.marked = tails, job.settled
	w.mu.Unlock()
	return nil
}

// lastMark makes the mark of a term that ends in order, so that the next one need not go back.
func (t *term) lastMark(ctx context.Context) error {
	w := t.tail
	if w == nil {
		return nil
	}
	select {
	case job := <-w.done:
		if err := t.mark(ctx, job); err != nil {
			return err
		}
	default:
	}
	job, news := w.job(t.done)
	if !news {
		return nil
	}
	if job.tails, job.err = w.read(ctx, job); job.err != nil {
		return job.err
	}
	return t.mark(ctx, job)
}

// writeMark adds a mark and removes those of which the outbox retains nothing any more.
func (t *term) writeMark(ctx context.Context, s stored, tails map[string]string) error {
	floors, err := json.Marshal(s.floors)
	if err != nil { // numbers: cannot happen
		return err
	}
	text, err := json.Marshal(tails)
	if err != nil { // strings
		return err
	}
	keep := int64(3 * t.r.cfg.Retain / markEvery)
	if keep <= 0 || keep > 3600 {
		keep = 3600
	}
	tag, err := t.conn.Exec(ctx, t.r.outbox.q.mark, t.fence, t.owner, s.prev, s.cur, s.last, s.floor, string(floors), string(text), keep)
	if err == nil && tag.RowsAffected() == 0 {
		err = errLeaseLost
	}
	if err != nil {
		return fmt.Errorf("outbox: write mark: %w", err)
	}
	return nil
}

// storedMark is a mark as its row holds it.
type storedMark struct {
	n     int64
	at    time.Time
	tails map[string]string
	stored
}

// goBack puts the cursor back to the newest mark, or, with search, to the newest one that holds; if none does, to the
// beginning of all that is retained. It says if the cursor was elsewhere, and returns the tails of the mark, and what need
// not be sent again all the same.
func (t *term) goBack(ctx context.Context, pub Tailer, now stored, search bool) (tails map[string]string, moved bool, k *kept, err error) {
	q, limit := &t.r.outbox.q, 1
	if search {
		limit = 10_000
	}
	rows, err := t.conn.Query(ctx, q.marks, limit)
	if err != nil {
		return nil, false, nil, fmt.Errorf("outbox: read marks: %w", err)
	}
	marks, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (m storedMark, err error) {
		err = row.Scan(&m.n, &m.at, &m.tails, &m.prev, &m.cur, &m.last, &m.floor, &m.floors)
		return m, err
	})
	if err != nil {
		return nil, false, nil, fmt.Errorf("outbox: read marks: %w", err)
	}
	if len(marks) == 0 { // a new outbox, or nothing of the ring holds
		return map[string]string{}, false, nil, t.writeMark(ctx, now, map[string]string{})
	}
	i := 0
	if search {
		var failed error
		i = sort.Search(len(marks), func(i int) bool { // newer marks hold less
			lost, err := pub.Lost(ctx, marks[i].tails)
			failed = errors.Join(failed, err)
			return len(lost) == 0
		})
		if failed == nil && i > 0 {
			k, failed = t.keptBy(ctx, pub, marks[0])
		}
		if failed != nil {
			return nil, false, nil, fmt.Errorf("outbox: look for what the broker still has: %w", failed)
		}
	}
	if i == 0 && marks[i].prev == now.prev && marks[i].cur == now.cur && marks[i].last == now.last {
		return marks[i].tails, false, nil, nil
	}
	var to int64
	what := slog.String("from", "the beginning")
	if i < len(marks) {
		to, what = marks[i].n, slog.Time("from", marks[i].at)
	}
	level := slog.LevelInfo
	if i > 0 {
		level = slog.LevelWarn
	}
	t.r.log.LogAttrs(ctx, level, "messages that the broker may not have are sent again", what)
	err = pgx.BeginTxFunc(ctx, t.conn, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error {
		sql, args := q.toMark, []any{t.fence, t.owner, to}
		if to == 0 {
			sql, args = q.adoptCursor, args[:2]
		}
		tag, err := tx.Exec(ctx, sql, args...)
		if err == nil && tag.RowsAffected() == 0 {
			return errLeaseLost
		}
		if err == nil {
			_, err = tx.Exec(ctx, q.dropMarks, to)
		}
		return err
	})
	if err != nil {
		return nil, false, nil, fmt.Errorf("outbox: go back: %w", err)
	}
	return nil, true, k, nil
}
