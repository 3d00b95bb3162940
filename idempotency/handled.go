package idempotency

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/postrider/postrider"
)

// Handled tells which messages a consumer of [Handler] has handled, one answer for each. It is for looking, such as
// outbox.Audit does: a handler finds out by itself, and an answer of false is out of date at once. A message that is older
// than [Config.Window] is not known any more. One round trip; it finds rows by the primary key and locks nothing.
func (s *Store) Handled(ctx context.Context, consumer string, msgs ...*postrider.Message) ([]bool, error) {
	keys := make([]pgtype.UUID, len(msgs))
	for i, m := range msgs {
		keys[i] = inboxKey(consumer, m)
	}
	rows, err := s.pool.Query(ctx, s.sql.handled, keys)
	if err != nil {
		return nil, fmt.Errorf("idempotency: %s: what is handled: %w", consumer, err)
	}
	known, err := pgx.CollectRows(rows, pgx.RowTo[pgtype.UUID])
	if err != nil {
		return nil, fmt.Errorf("idempotency: %s: what is handled: %w", consumer, err)
	}
	there := make(map[pgtype.UUID]bool, len(known))
	for _, k := range known {
		there[k] = true
	}
	handled := make([]bool, len(msgs))
	for i, k := range keys {
		handled[i] = there[k]
	}
	return handled, nil
}
