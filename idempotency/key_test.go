package idempotency

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
)

func TestInboxKeyIsStable(t *testing.T) {
	t.Parallel()
	m := &postrider.Message{Source: "//shop/orders", ID: "o-1", Time: time.UnixMilli(1_700_000_000_123).UTC()}
	// Written into tables for days: a release that computes it otherwise handles messages twice.
	const want = "018bcfe5-687b-8cb1-8b17-d4b1466c3a2a"
	if got := inboxKey("billing", m).String(); got != want {
		t.Fatalf("key %s, want %s", got, want)
	}
	m.Time = m.Time.In(time.FixedZone("x", 3600)).Add(400 * time.Microsecond)
	if got := inboxKey("billing", m).String(); got != want {
		t.Errorf("another zone gives another key, %s", got)
	}
	for _, other := range []*postrider.Message{
		{Source: "//shop/order", ID: "so-1", Time: m.Time},
		{Source: "//shop/orders", ID: "o-2", Time: m.Time},
		{Source: "//shop/orders", ID: "o-1"},
		{Source: "//shop/orders", ID: "o-1", Time: m.Time.Add(time.Millisecond)},
	} {
		if got := inboxKey("billing", other).String(); got == want {
			t.Errorf("%+v has the same key", other)
		}
	}
	if inboxKey("mailer", m).String() == want {
		t.Error("another consumer has the same key")
	}
}

func FuzzInboxKeyLiesInItsDay(f *testing.F) {
	f.Add("billing", "//shop", "o-1", int64(1_700_000_000_123))
	f.Add("", "", "", int64(1))
	f.Add("a", "b", "c", int64(1<<48-1))
	f.Fuzz(func(t *testing.T, consumer, source, id string, ms int64) {
		at := time.UnixMilli(ms)
		if !validTime(at) || at.IsZero() {
			t.Skip()
		}
		k := inboxKey(consumer, &postrider.Message{Source: source, ID: id, Time: at})
		low, high := lowest(dayOf(at)), lowest(dayOf(at).AddDate(0, 0, 1))
		if s := k.String(); s < low || (s >= high && high > low) {
			t.Fatalf("key %s is not within %s and %s", s, low, high)
		}
		if k.Bytes[6]>>4 != 8 || k.Bytes[8]>>6 != 2 {
			t.Fatalf("key %s is no UUID of version 8", k)
		}
	})
}

func FuzzBarrierKey(f *testing.F) {
	f.Add("s/1/do", "s/1/undo", "//a", "1")
	f.Add("s/1", "s/1/undo/do", `//a"`, `"1`)
	f.Fuzz(func(t *testing.T, key1, key2, source, id string) {
		msg := func(key string) *postrider.Message {
			return &postrider.Message{
				Source: source, ID: id, Extensions: postrider.Extensions{{Name: postrider.ExtIdempotencyKey, Value: key}},
			}
		}
		trim := func(key string) string {
			for _, suffix := range []string{"/do", "/undo"} {
				if s, ok := strings.CutSuffix(key, suffix); ok {
					return s
				}
			}
			return key
		}
		k1, err1 := newBarrierKey(msg(key1))
		k2, err2 := newBarrierKey(msg(key2))
		if err1 != nil || err2 != nil || key1 == "" || key2 == "" {
			t.Skip()
		}
		if (k1.text == k2.text) != (trim(key1) == trim(key2)) {
			t.Fatalf("keys %q and %q become %q and %q", key1, key2, k1.text, k2.text)
		}
		if none, err := newBarrierKey(msg("")); err == nil && (none.text == k1.text || none.chosen) {
			t.Fatalf("a message without a key has that of %q", key1)
		}
	})
}

func TestFingerprintOfChosenKeysAlone(t *testing.T) {
	t.Parallel()
	m := &postrider.Message{Data: []byte("1")}
	if fp := (barrierKey{chosen: false}).fingerprint("a/B", m); fp != nil {
		t.Errorf("a saga's request has the fingerprint %x", fp)
	}
	k := barrierKey{chosen: true}
	fp := k.fingerprint("a/B", m)
	if len(fp) != 8 || bytes.Equal(fp, k.fingerprint("a/C", m)) || bytes.Equal(fp, k.fingerprint("a/B", &postrider.Message{})) {
		t.Errorf("fingerprint %x does not tell requests apart", fp)
	}
}

func TestConfigNamesTheWrongField(t *testing.T) {
	t.Parallel()
	pool := new(pgxpool.Pool)
	for want, cfg := range map[string]Config{
		"Window": {Window: time.Hour}, "Retention": {Retention: time.Hour}, "LockTimeout": {LockTimeout: time.Microsecond},
		"schema": {Schema: "No Such"},
	} {
		_, err := New(pool, cfg)
		wantCode(t, err, postrider.InvalidArgument, false)
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not name %s", err, want)
		}
	}
	if _, err := New(nil, Config{}); err == nil {
		t.Error("no pool is no error")
	}
}
