package outbox

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
)

// An outbox that rests has nobody who sees that the broker has lost something of it. Relays look now and then at the newest mark of
// all that rest, with one statement. Streams lose their ends, so of a stream that holds the newest of these marks it is taken that
// it holds the others; but when it does not, or the connection was lost, or at the beginning, each of them is compared.

// outboxTails is the newest mark of an outbox that nobody serves: number $1. It reads two rows by their keys.
const outboxTails = `
	select $1 as outbox, m.at, m.tails
	from :"schema".postrider_outbox_relay as r,
		lateral (select at, tails from :"schema".postrider_outbox_mark order by n desc limit 1) as m
	where paused_at is null and expires not between clock_timestamp() and clock_timestamp() + make_interval(secs => ttl)`

// lossWatch is what Relays know of the broker's losses.
type lossWatch struct {
	pub       Tailer
	sql       string // outboxTails of all
	each      bool   // compare each mark, not only the newest of each stream
	reconnect uint64
	problem   string // the last that was logged
}

// watchTails has outboxes served that the broker has lost something of, until ctx ends.
func (s *Relays) watchTails(ctx context.Context, w *lossWatch) {
	ticker := time.NewTicker(tailEvery)
	defer ticker.Stop()
	for w.each = true; ctx.Err() == nil; {
		if reconnect := w.pub.Reconnects(); reconnect != w.reconnect {
			w.each, w.reconnect = true, reconnect
		}
		err := s.lookForLoss(ctx, w)
		switch {
		case err == nil:
			w.problem = ""
		case ctx.Err() == nil && !errors.Is(err, postrider.Unavailable) && err.Error() != w.problem: // else it will be back
			w.problem = err.Error()
			s.log.WarnContext(ctx, "cannot see if the broker still has what outboxes at rest have sent", "component", "outbox", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
	}
}

// restMark is the newest mark of an outbox at rest.
type restMark struct {
	outbox int
	at     time.Time
	tails  map[string]string
}

func (s *Relays) lookForLoss(ctx context.Context, w *lossWatch) error {
	asking, cancel := context.WithTimeout(ctx, tailTimeout)
	defer cancel()
	rows, err := s.pool.Query(asking, w.sql)
	if err != nil {
		return err
	}
	marks, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (m restMark, err error) {
		err = row.Scan(&m.outbox, &m.at, &m.tails)
		return m, err
	})
	if err != nil {
		return err
	}
	if !w.each {
		newest := map[string]string{}
		for _, m := range marks { // the newest comes first
			for stream, tail := range m.tails {
				if _, there := newest[stream]; !there {
					newest[stream] = tail
				}
			}
		}
		lost, err := w.lost(ctx, newest)
		if err != nil || len(lost) == 0 {
			return err
		}
		w.each = true
	}
	for _, m := range marks {
		lost, err := w.lost(ctx, m.tails)
		if err != nil {
			return err
		}
		if len(lost) > 0 {
			one := s.members[m.outbox]
			one.relay.search.Store(true)
			poke(one.due)
		}
	}
	w.each = false
	return nil
}

func (w *lossWatch) lost(ctx context.Context, tails map[string]string) ([]string, error) {
	if len(tails) == 0 {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, tailTimeout)
	defer cancel()
	return w.pub.Lost(ctx, tails)
}
