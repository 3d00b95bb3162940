package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// deadLetters makes an outbox with good messages that were sent and poison among them, in the given number.
func deadLetters(t *testing.T, poison int) (*pgxpool.Pool, *outbox.Outbox, *broker) {
	t.Helper()
	pool, ob := setup(t)
	b := &broker{refuse: func(m *postrider.Message) error {
		if strings.HasPrefix(m.ID, "poison") {
			return postrider.Permanent(fmt.Errorf("%s is too large", m.ID))
		}
		return nil
	}}
	for i := range poison {
		other := message(fmt.Sprint("poison ", i), fmt.Sprint("key ", i%2))
		if other.Type = "orders.placed.v1"; i%3 == 0 {
			other.Type = "stock.moved.v1"
		}
		publish(t, pool, ob, message(fmt.Sprint("before ", i), ""), other, message(fmt.Sprint("after ", i), fmt.Sprint("key ", i%2)))
	}
	_, stop := start(t, pool, b, quick(ob))
	wantRows(t, pool, "postrider.postrider_outbox_dead", poison)
	wantStatus(t, pool, ob, func(s outbox.Status) bool {
		return s.Depth == 0 && s.Dead == int64(poison) && s.Sent == int64(2*poison)
	})
	stop()
	return pool, ob, b
}

func TestDeadLettersListed(t *testing.T) {
	t.Parallel()
	pool, ob, _ := deadLetters(t, 12)
	ctx, d := t.Context(), ob.DeadLetters(pool)
	names := func(f outbox.Filter, after int64, limit int) (names []string, next int64) {
		t.Helper()
		letters, next, err := d.List(ctx, f, after, limit)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range letters {
			if l.Message.Topic != l.Topic || l.Topic != l.Message.Type || l.Key != l.Message.Key() || !strings.Contains(string(l.Message.Data), l.Message.ID) ||
				l.Cause != l.Message.ID+" is too large" || l.Published.After(l.At) || l.Published.IsZero() {
				t.Errorf("letter %+v %+v", l, l.Message)
			}
			names = append(names, strings.TrimPrefix(l.Message.ID, "poison "))
		}
		return names, next
	}
	for _, tt := range []struct {
		f    outbox.Filter
		want string
	}{
		{outbox.Filter{}, "0 1 2 3 4 5 6 7 8 9 10 11"},
		{outbox.Filter{Topic: "stock.moved.v1"}, "0 3 6 9"},
		{outbox.Filter{Topic: "stock.*.v1"}, "0 3 6 9"},
		{outbox.Filter{Topic: "stock.>"}, "0 3 6 9"},
		{outbox.Filter{Topic: "*.moved.v1", Key: "key 1"}, "3 9"},
		{outbox.Filter{Topic: "stock"}, ""},
		{outbox.Filter{Topic: "stock.moved*v1"}, ""},
		{outbox.Filter{Topic: "stock|orders.>"}, ""},
		{outbox.Filter{Cause: "poison 1"}, "1 10 11"},
		{outbox.Filter{Cause: "%"}, ""},
		{outbox.Filter{From: time.Now().Add(time.Hour)}, ""},
		{outbox.Filter{To: time.Now().Add(-time.Hour)}, ""},
		{outbox.Filter{From: time.Now().Add(-time.Hour), To: time.Now().Add(time.Hour), Key: "key 0"}, "0 2 4 6 8 10"},
	} {
		if got, next := names(tt.f, 0, 0); strings.Join(got, " ") != tt.want || next != 0 {
			t.Errorf("%+v: %q, next %d, want %s", tt.f, got, next, tt.want)
		}
	}
	var all []string
	for after := int64(0); ; {
		page, next := names(outbox.Filter{Key: "key 1"}, after, 2)
		all = append(all, page...)
		if after = next; next == 0 {
			break
		}
	}
	if got := strings.Join(all, " "); got != "1 3 5 7 9 11" {
		t.Errorf("by pages: %s", got)
	}
	if _, _, err := d.List(ctx, outbox.Filter{}, 0, -1); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("limit -1: %v", err)
	}
}

func TestDeadLettersReplayedAndDiscarded(t *testing.T) {
	t.Parallel()
	pool, ob, b := deadLetters(t, 60) // more than one transaction
	ctx, d := t.Context(), ob.DeadLetters(pool)
	want := func(what string, n int, err error, wantN int, code postrider.Code) {
		t.Helper()
		if n != wantN || (code == postrider.OK) != (err == nil) || code != postrider.OK && !errors.Is(err, code) {
			t.Fatalf("%s: %d, %v, want %d, %v", what, n, err, wantN, code)
		}
	}
	letters, _, err := d.List(ctx, outbox.Filter{Cause: "poison 5"}, 0, 0) // 5, 50 to 59
	if err != nil || len(letters) != 11 {
		t.Fatalf("%d letters, %v", len(letters), err)
	}
	n, err := d.Discard(ctx, []int64{letters[0].Number, letters[1].Number, 987654}, clerk)
	want("discard", n, err, 2, postrider.NotFound)
	n, err = d.Replay(ctx, []int64{letters[0].Number}, clerk)
	want("replay what is gone", n, err, 0, postrider.NotFound)
	n, err = d.DiscardAll(ctx, outbox.Filter{Cause: "poison 51 "}, clerk)
	want("discard all", n, err, 1, postrider.OK)

	sent := len(b.ids())
	n, err = d.ReplayAll(ctx, outbox.Filter{}, clerk)
	want("replay all", n, err, 57, postrider.OK)
	n, err = d.ReplayAll(ctx, outbox.Filter{}, clerk)
	want("replay nothing", n, err, 0, postrider.OK)
	b.set(func(b *broker) {
		refuse := b.refuse
		b.refuse = func(m *postrider.Message) error {
			if m.ID == "poison 7" {
				return refuse(m)
			}
			return nil
		}
	})
	start(t, pool, b, quick(ob))
	wantRows(t, pool, "postrider.postrider_outbox_dead", 1) // comes back
	postridertest.Eventually(t, func() error {
		if got := len(b.ids()); got != sent+56 {
			return fmt.Errorf("%d were sent, want 56", got-sent)
		}
		return nil
	})
	last := -1
	for _, m := range b.copy()[sent:] {
		var n int
		if _, err := fmt.Sscanf(m.ID, "poison %d", &n); err != nil || n <= last || m.Key() != fmt.Sprint("key ", n%2) {
			t.Errorf("%q with key %s comes after %d", m.ID, m.Key(), last)
		}
		last = n
	}
	wantRows(t, pool, `postrider.postrider_outbox_log where by = 'ada' and why = 'test' and messages = 1 and letter > 0
		and cause like 'poison % is too large' and attributes is not null and topic in ('orders.placed.v1', 'stock.moved.v1')
		and done in ('replay', 'discard')`, 60)
	_, err = d.ReplayAll(ctx, outbox.Filter{}, outbox.Action{By: "ada"})
	wantCode(t, err, postrider.InvalidArgument)
}

// A replay is a publish: it takes its number under the lock of its key.
func TestReplayWaitsForItsKey(t *testing.T) {
	t.Parallel()
	pool, ob, b := deadLetters(t, 1)
	ctx := t.Context()
	tx, err := pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	if err := ob.In(tx).Publish(ctx, message("first", "key 0")); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { _, err := ob.DeadLetters(pool).ReplayAll(ctx, outbox.Filter{}, clerk); done <- err }()
	wantRows(t, pool, "pg_locks where locktype = 'advisory' and not granted and database = (select oid from pg_database where datname = current_database())", 1)
	if err := tx.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	b.set(func(b *broker) { b.refuse = nil })
	start(t, pool, b, quick(ob))
	wantIDs(t, b, "before 0", "after 0", "first", "poison 0")
}

func TestResend(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx, b := t.Context(), &broker{}
	msgs := messages(130)
	for i, m := range msgs {
		if i%2 == 0 {
			m.Type = "stock.moved.v1"
		}
		if i%5 == 0 {
			if err := m.SetExtension(postrider.ExtPartitionKey, "five"); err != nil {
				t.Fatal(err)
			}
		}
	}
	publish(t, pool, ob, msgs...)
	_, err := pool.Exec(ctx, `insert into postrider.postrider_outbox (topic, data) values ('plain.v1', 'x')`)
	if err != nil {
		t.Fatal(err)
	}
	_, stop := start(t, pool, b, quick(ob))
	wantStatus(t, pool, ob, func(s outbox.Status) bool { return s.Depth == 0 && s.Sent == 131 })
	stop()
	publish(t, pool, ob, message("not sent yet", "")) // is not sent twice for a resend
	resend := func(f outbox.Filter, newIDs bool, want int) {
		t.Helper()
		if n, err := ob.Resend(ctx, pool, f, newIDs, clerk); n != want || err != nil {
			t.Fatalf("resend %+v: %d, %v, want %d", f, n, err, want)
		}
	}
	resend(outbox.Filter{To: time.Now().Add(-time.Hour)}, false, 0)
	resend(outbox.Filter{Topic: "stock.>"}, false, 65)
	resend(outbox.Filter{Key: "five", Topic: "orders.placed.v1"}, true, 13)
	resend(outbox.Filter{Topic: "plain.v1"}, false, 1)
	start(t, pool, b, quick(ob))
	postridertest.Eventually(t, func() error {
		if n := len(b.ids()); n != 131+1+65+13+1 {
			return fmt.Errorf("%d were sent", n)
		}
		return nil
	})
	if b.repeated != 0 {
		t.Errorf("%d were duplicates", b.repeated)
	}
	got := b.copy()
	if got[131].ID != "not sent yet" {
		t.Errorf("%s comes after the first ones", got[131].ID)
	}
	for i, m := range got[132 : 132+65] {
		if want := msgs[2*i]; m.ID != want.ID || m.Source != want.Source || m.Type != want.Type || m.Key() != want.Key() || !slices.Equal(m.Data, want.Data) {
			t.Errorf("%d is %+v, want %+v", i, m, want)
		}
	}
	for i, m := range got[132+65 : 132+65+13] {
		if want := msgs[10*i+5]; m.ID == want.ID || m.Key() != "five" || !slices.Equal(m.Data, want.Data) {
			t.Errorf("%d is %+v, want %+v with another id", i, m, want)
		}
	}
	if plain := got[len(got)-1]; plain.ID != got[130].ID || plain.Source != got[130].Source || !plain.Time.Equal(got[130].Time) {
		t.Errorf("a row without attributes: %+v, before %+v", plain, got[130])
	}
	wantRows(t, pool, "postrider.postrider_outbox_log where done = 'resend' and by = 'ada' and why = 'test'", 5) // one for a transaction
	_, err = ob.Resend(ctx, pool, outbox.Filter{Cause: "x"}, false, clerk)
	wantCode(t, err, postrider.InvalidArgument)
	_, err = ob.Resend(ctx, pool, outbox.Filter{}, false, outbox.Action{})
	wantCode(t, err, postrider.InvalidArgument)
}
