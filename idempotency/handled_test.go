package idempotency

import (
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
)

func TestHandled(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, now := b.store(Config{}), time.Now()
	first, second, untimed := b.event("m-1", now), b.event("m-2", now), b.event("m-3", time.Time{})
	for _, m := range []*postrider.Message{first, untimed} {
		must(t, handle(t, b.writer(s, "billing"), m))
	}
	held, err := b.pool.Begin(t.Context()) // a handler at work has handled nothing yet
	must(t, err)
	defer held.Rollback(t.Context())
	must(t, pgx.BeginFunc(t.Context(), held, func(tx pgx.Tx) error {
		_, err := tx.Exec(t.Context(), s.sql.claim, s.sql.lockTimeout, inboxKey("billing", second))
		return err
	}))
	for consumer, want := range map[string][]bool{"billing": {false, true, true, false}, "mailer": {false, false, false, false}} {
		got, err := s.Handled(t.Context(), consumer, second, first, untimed, b.event("m-4", now.AddDate(0, 0, -3)))
		must(t, err)
		if !slices.Equal(got, want) {
			t.Errorf("%s handled %v, want %v", consumer, got, want)
		}
	}
	if got, err := s.Handled(t.Context(), "billing"); err != nil || len(got) != 0 {
		t.Errorf("of no messages %v, %v", got, err)
	}
}
