package outbox

import (
	"context"
	"fmt"
	"maps"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
)

// kept is what need not be sent again when the cursor goes back, because only some of the streams have lost their ends: what a
// mark covers of the others. It is good for one term: until something else may have been lost, or all of it was passed.
type kept struct {
	mark  stored
	tails map[string]string // of the streams that are whole up to the mark
	here  map[string]bool   // by topic: it goes to one of them; for the goroutine that sends
	whole bool              // the scan that goes on sees all that the mark covers; for that of lead
}

// keptBy compares the newest mark, which does not hold, with the streams.
func (t *term) keptBy(ctx context.Context, pub Tailer, newest storedMark) (*kept, error) {
	lost, err := pub.Lost(ctx, newest.tails)
	if err != nil {
		return nil, err
	}
	k := &kept{mark: newest.stored, tails: maps.Clone(newest.tails), here: map[string]bool{}}
	for _, stream := range lost {
		delete(k.tails, stream)
	}
	if len(k.tails) == 0 {
		return nil, nil
	}
	return k, nil
}

// beginScan is told that a scan of what can be seen now begins.
func (k *kept) beginScan() {
	if k != nil {
		k.whole = true
	}
}

// noteKept notes which rows of a page the mark covers.
func (t *term) noteKept(p *page, full bool) error {
	k := t.kept
	if k != nil && k.whole && !full {
		t.kept = nil // all of it is passed
	}
	if k == nil || len(p.rows) == 0 {
		return nil
	}
	ids := make([]int64, len(p.rows))
	for i, row := range p.rows {
		ids[i] = row.id
	}
	batch := &pgx.Batch{}
	batch.Queue(t.r.outbox.q.plan)
	covered := map[int64]bool{}
	batch.Queue(t.r.outbox.q.covered, ids, k.mark.prev, k.mark.cur, k.mark.last).Query(func(rows pgx.Rows) error {
		var id int64
		_, err := pgx.ForEachRow(rows, []any{&id}, func() error { covered[id] = true; return nil })
		return err
	})
	if err := t.conn.SendBatch(t.ctx, batch).Close(); err != nil {
		return fmt.Errorf("outbox: look for what a mark covers: %w", err)
	}
	for i := range p.rows {
		if covered[p.rows[i].id] {
			p.rows[i].kept = k
		}
	}
	return nil
}

// maxTopics bounds what is known of topics.
const maxTopics = 10_000

// holds says if a row that was sent is still where it went to. It is for the goroutine that sends. Where messages wait that were put
// off is not known by their topic.
func (k *kept) holds(ctx context.Context, pub Tailer, row row) bool {
	if k == nil || row.delayed() {
		return false
	}
	here, known := k.here[row.topic]
	if known {
		return here
	}
	ctx, cancel := context.WithTimeout(ctx, tailTimeout)
	defer cancel()
	tails, err := pub.Tail(ctx, []string{row.topic}, false)
	if err != nil || len(tails) != 1 {
		return false // it is sent again
	}
	for stream := range tails {
		_, here = k.tails[stream]
	}
	if len(k.here) >= maxTopics {
		clear(k.here)
	}
	k.here[row.topic] = here
	return here
}

// delayed says if a message may wait somewhere before it comes to its topic.
func (r row) delayed() bool { return r.err == nil && r.msg.Extension(postrider.ExtDeliverAt) != "" }
