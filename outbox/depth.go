package outbox

import (
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
)

// lookEvery is how often a process looks at the depth while it publishes.
const lookEvery = time.Second

// admit refuses when more than Config.MaxDepth messages wait. It reports whether the caller is to look again, along with the
// statement that inserts; only where nothing was to be inserted, the last time, it asks by itself.
func (o *Outbox) admit(ask func(sql string, depth *int64) error) (look bool, err error) {
	if o.cfg.MaxDepth <= 0 {
		return false, nil
	}
	now, last := int64(time.Since(o.began)), o.looked.Load()
	due := last == 0 || now-last >= int64(lookEvery)
	if due && o.looked.CompareAndSwap(last, now) {
		if o.waiting.Load() <= o.cfg.MaxDepth {
			return true, nil
		}
		var depth int64
		if err := ask(o.q.depth, &depth); err != nil {
			return false, err
		}
		o.waiting.Store(depth)
	}
	if depth := o.waiting.Load(); depth > o.cfg.MaxDepth {
		return false, &postrider.Error{
			Code: postrider.ResourceExhausted, Op: "outbox: publish", Unprocessed: true, RetryAfter: lookEvery,
			Msg: fmt.Sprintf("about %d messages wait to be sent, Config.MaxDepth is %d: Outbox.Status tells why", depth, o.cfg.MaxDepth),
		}
	}
	return false, nil
}

// queueLook has a flight look at the depth.
func (o *Outbox) queueLook(b *pgx.Batch) {
	b.Queue(o.q.depth).QueryRow(func(row pgx.Row) error {
		var depth int64
		err := row.Scan(&depth)
		if err == nil {
			o.waiting.Store(depth)
		}
		return err
	})
}
