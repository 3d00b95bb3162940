package outbox_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
)

// The view decodes in SQL what the encoder writes, whatever stands in it.
func TestEventsView(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx := t.Context()
	rnd := rand.New(rand.NewPCG(1, 2))
	text := func(least int) string { // some are longer than what one byte of a length tells
		letters := []string{"a", "Z", "0", "-", "ä", "€", "😀", "'", `"`, `\`, "%"}
		var b strings.Builder
		for range least + rnd.IntN(1+rnd.IntN(300)) {
			b.WriteString(letters[rnd.IntN(len(letters))])
		}
		return b.String()
	}
	var msgs []*postrider.Message
	for i := range 300 {
		m := &postrider.Message{ID: text(1), Type: "type." + text(0), Topic: fmt.Sprint("topic.", i), Subject: text(0), Data: []byte(text(0))}
		for _, name := range []string{"aaa", postrider.ExtPartitionKey, postrider.ExtTraceParent, "zzz"} {
			if rnd.IntN(2) == 0 {
				if err := m.SetExtension(name, text(0)); err != nil {
					t.Fatal(err)
				}
			}
		}
		msgs = append(msgs, m)
	}
	publish(t, pool, ob, msgs...)
	rows, err := pool.Query(ctx, `select id, aggregatetype, aggregateid, type, payload from postrider.postrider_outbox_events order by number`)
	if err != nil {
		t.Fatal(err)
	}
	var id, topic, key, typ string
	var data []byte
	n := 0
	_, err = pgx.ForEachRow(rows, []any{&id, &topic, &key, &typ, &data}, func() error {
		m := msgs[n]
		wantKey := m.Key()
		if wantKey == "" {
			wantKey = m.ID
		}
		if n++; id != m.ID || topic != m.Topic || key != wantKey || typ != m.Type || !bytes.Equal(data, m.Data) {
			t.Errorf("%q %q %q %q, want %+v", id, topic, key, typ, m)
		}
		return nil
	})
	if err != nil || n != len(msgs) {
		t.Fatalf("%d rows, %v", n, err)
	}

	// What has no attributes, or such as cannot be read.
	_, err = pool.Exec(ctx, `
		truncate postrider.postrider_outbox;
		insert into postrider.postrider_outbox (topic, attributes, data) values ('plain.v1', null, 'x');
		insert into postrider.postrider_outbox (topic, attributes) select 'bad.v1', b from unnest(
			array['', '\xff', '\x0a', '\x0aff', '\x0affffffffffffffffff7f61', '\x0a0561', '\x2a02', '\x2a020a05', '\x0a02c328', '\xffffffffffffffffffffff']::bytea[]) as b`)
	if err != nil {
		t.Fatal(err)
	}
	wantRows(t, pool, `postrider.postrider_outbox_events as e, postrider.postrider_outbox_relay as r
		where e.id like r.identity || '-%' and aggregateid = e.id and type = aggregatetype and aggregatetype in ('plain.v1', 'bad.v1')`, 11)
}

func TestMigrateDownSQL(t *testing.T) {
	t.Parallel()
	pool, _ := setup(t)
	sql, err := outbox.MigrateDownSQL("")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), sql); err != nil {
		t.Fatal(err)
	}
	wantRows(t, pool, "pg_class as c where relnamespace = 'postrider'::regnamespace and relname not like 'postrider_migration%'", 0)
	wantRows(t, pool, "pg_proc where pronamespace = 'postrider'::regnamespace", 0)
	if err := outbox.Migrate(t.Context(), pool, ""); err != nil {
		t.Fatal(err)
	}
}
