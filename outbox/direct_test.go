package outbox_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// blind is a relay that looks at the tables on its own so seldom that what arrives has come directly, or by a wake-up.
func blind(ob *outbox.Outbox) outbox.RelayConfig {
	return outbox.RelayConfig{Outbox: ob, PollInterval: time.Hour, LeaseTTL: 30 * time.Second}
}

// insertSQL inserts as a client that wakes nobody.
func insertSQL(ctx context.Context, db interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}, data string,
) (id int64, err error) {
	err = db.QueryRow(ctx, `insert into postrider.postrider_outbox (topic, data) values ('sql', $1) returning id`, []byte(data)).Scan(&id)
	return id, err
}

func data(b *broker) (all []string) {
	for _, m := range b.copy() {
		if m.Topic == "sql" {
			all = append(all, string(m.Data))
		} else {
			all = append(all, m.ID)
		}
	}
	return all
}

func wantData(t *testing.T, b *broker, want ...string) {
	t.Helper()
	postridertest.Eventually(t, func() error {
		if got := data(b); !slices.Equal(got, want) {
			return fmt.Errorf("accepted %q, want %q", got, want)
		}
		return nil
	})
}

// What a DB has committed goes without a look at the tables, is looked at later and does not go twice, not even to a relay that
// comes after.
func TestDirect(t *testing.T) {
	t.Parallel()
	for name, publish := range waysToPublish {
		if strings.HasPrefix(name, "in the caller") {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool, ob := setup(t)
			b := &broker{}
			_, stop := start(t, pool, b, blind(ob))
			var want []string
			send := func(n int) {
				msgs := messages(n)
				for i, m := range msgs {
					m.ID = fmt.Sprintf("%d.%d", len(want), i)
				}
				want = append(want, ids(msgs)...)
				if err := publish(t.Context(), pool, ob, msgs); err != nil {
					t.Fatal(err)
				}
				clear(msgs[0].Data) // it is its caller's again
				wantIDs(t, b, want...)
			}
			for i := range 20 {
				send(1 + i%3)
			}
			stop()
			start(t, pool, b, blind(ob))
			send(1)
			if b.repeated > 0 {
				t.Errorf("%d messages were sent again", b.repeated)
			}
			for _, m := range b.copy() {
				if m.Data[0] == 0 {
					t.Fatalf("%s was sent as its caller changed it later", m.ID)
				}
			}
		})
	}
}

// A message that was committed before and is not sent, of whatever writer, is not overtaken; nor is one that is not committed waited for.
func TestDirectOvertakesNothing(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx := t.Context()
	b := &broker{}
	start(t, pool, b, blind(ob))
	db := ob.On(pool)
	put := func(id string) {
		t.Helper()
		if err := db.Publish(ctx, message(id, "")); err != nil {
			t.Fatal(err)
		}
	}
	put("1")
	wantData(t, b, "1")
	if _, err := insertSQL(ctx, pool, "2"); err != nil {
		t.Fatal(err)
	}
	put("3")
	wantData(t, b, "1", "2", "3")

	open, err := pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Rollback(ctx)
	if _, err := insertSQL(ctx, open, "late"); err != nil {
		t.Fatal(err)
	}
	put("4")
	wantData(t, b, "1", "2", "3", "4")
	if err := open.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	put("5")
	wantData(t, b, "1", "2", "3", "4", "late", "5")
}

// What is published after Pause has returned is not sent, as it would be before the relay looks again.
func TestDirectPause(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx := t.Context()
	b := &broker{}
	start(t, pool, b, blind(ob))
	put := func(id string) {
		t.Helper()
		if err := ob.On(pool).Publish(ctx, message(id, "")); err != nil {
			t.Fatal(err)
		}
	}
	put("1")
	wantData(t, b, "1")
	if err := ob.Pause(ctx, pool, outbox.Action{By: "test", Why: "to see"}); err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		put(fmt.Sprint("paused ", i))
	}
	if got := b.ids(); len(got) != 1 {
		t.Fatalf("%q were sent while the outbox was paused", got)
	}
}
