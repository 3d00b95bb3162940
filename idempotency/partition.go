package idempotency

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
)

// maxAhead is how far a sender's clock may be ahead of the database's. Without a bound each message with a random time
// would leave a table.
const maxAhead = 24 * time.Hour

// partitionName is the layout of the name of a day's partition.
const partitionName = "postrider_inbox_20060102"

// createPartition creates the partition of a time, or refuses what is out of the window. A dropped day stays dropped,
// whatever clock or Config says, so a message that was handled and forgotten is never taken for new. Many may call it at once:
// they wait for each other on the state row.
func (s *Store) createPartition(ctx context.Context, op string, t time.Time) error {
	var refused error
	err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		var floor, now time.Time
		if err := tx.QueryRow(ctx, s.sql.state).Scan(&floor, &now); err != nil {
			return err
		}
		day := dayOf(t)
		end := day.AddDate(0, 0, 1)
		tooOld := func() error {
			return s.outOfRange(op, "it is from %s, older than the window of %v in which it is known what was handled",
				t.UTC().Format(time.RFC3339), s.cfg.Window)
		}
		if !day.After(floor) {
			refused = tooOld()
			return nil
		}
		var there bool
		name := day.Format(partitionName)
		if err := tx.QueryRow(ctx, s.sql.partition, s.cfg.Schema, name).Scan(&there); err != nil || there {
			return err
		}
		switch {
		case s.cfg.Window > 0 && end.Before(now.Add(-s.cfg.Window)):
			refused = tooOld()
			return nil
		case t.After(now.Add(maxAhead)):
			refused = s.outOfRange(op, "it is from %s, more than %v ahead of the database's clock: mend the sender's clock",
				t.UTC().Format(time.RFC3339), maxAhead)
			return nil
		}
		// Created beside and then attached: CREATE TABLE PARTITION OF would lock out all handlers (ACCESS EXCLUSIVE on the
		// parent), ATTACH does not (SHARE UPDATE EXCLUSIVE).
		_, err := tx.Exec(ctx, fmt.Sprintf(`
			create table %[1]s.%[2]s (like %[1]s.postrider_inbox including all);
			alter table %[1]s.postrider_inbox attach partition %[1]s.%[2]s for values from ('%[3]s') to ('%[4]s')`,
			s.sql.schema, name, lowest(day), lowest(end)))
		return err
	})
	if err != nil {
		return &postrider.Error{Code: postrider.Unavailable, Op: op + ": create the partition", Unprocessed: true, Err: err}
	}
	return refused
}
