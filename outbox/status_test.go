package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

//nolint:gochecknoglobals // a constant in all but syntax
var clerk = outbox.Action{By: "ada", Why: "test"}

func status(t testing.TB, pool *pgxpool.Pool, ob *outbox.Outbox) outbox.Status {
	t.Helper()
	s, err := ob.Status(t.Context(), pool)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// wantStatus waits until the status is as it should be.
func wantStatus(t testing.TB, pool *pgxpool.Pool, ob *outbox.Outbox, ok func(outbox.Status) bool) {
	t.Helper()
	postridertest.Eventually(t, func() error {
		if s := status(t, pool, ob); !ok(s) {
			return fmt.Errorf("status %+v", s)
		}
		return nil
	})
}

func TestStatus(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	if s := status(t, pool, ob); s.Depth != 0 || s.Leader != "" || s.Oldest != 0 || s.Fence != 0 || s.Paused != nil || s.Ring[0] == 0 {
		t.Errorf("a new outbox: %+v", s)
	}
	publish(t, pool, ob, messages(12_000)...)
	wantStatus(t, pool, ob, func(s outbox.Status) bool { return s.Depth == 12_000 && s.Oldest > 50*time.Millisecond && s.Rate == 0 })

	var mu sync.Mutex
	var attempts []outbox.Attempt
	b := &broker{before: func([]*postrider.Message) error { return postrider.Errorf(postrider.Unavailable, "no broker") }}
	cfg := quick(ob)
	cfg.Metrics = func(_ context.Context, a outbox.Attempt) {
		mu.Lock()
		defer mu.Unlock()
		attempts = append(attempts, a)
	}
	relay, stop := start(t, pool, b, cfg)
	wantStatus(t, pool, ob, func(s outbox.Status) bool {
		return s.Depth == 12_000 && s.Leader != "" && s.Fence == 1 && s.LeaseLeft > 0 && s.LeaseLeft <= cfg.LeaseTTL &&
			strings.Contains(s.LastError, "no broker") && time.Since(s.FailedAt).Abs() < time.Minute
	})
	b.set(func(b *broker) {
		b.before = nil
		b.refuse = func(m *postrider.Message) error {
			if m.ID == "7" {
				return postrider.Permanent(errors.New("bad \x00 text \xff"))
			}
			return nil
		}
	})
	wantStatus(t, pool, ob, func(s outbox.Status) bool {
		return s.Depth == 0 && s.Oldest == 0 && s.Sent == 11_999 && s.Dead == 1 && s.Rate > 0
	})
	stop()
	if s := status(t, pool, ob); s.Leader != "" || s.Rate != 0 || s.LeaseLeft != 0 || s.Sent != 11_999 {
		t.Errorf("after the relay: %+v", s)
	}
	var sum outbox.Attempt
	for _, a := range attempts {
		if (a.Err != nil) != (a.Waiting > 0) || a.Began.IsZero() || a.Took < 0 || a.Lag <= 0 {
			t.Errorf("attempt %+v", a)
		}
		sum.Sent += a.Sent
		sum.Dead += a.Dead
	}
	if s := relay.Stats(); attempts[0].Err == nil || uint64(sum.Sent) != s.Published || uint64(sum.Dead) != s.Dead {
		t.Errorf("attempts %+v, stats %+v", sum, s)
	}
}

// The status of an outbox whose relay is behind, with a transaction that was open before and committed late.
func TestStatusCountsWhatCommittedLate(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx, b := t.Context(), &broker{}
	held, err := pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Rollback(ctx)
	if err := ob.In(held).Publish(ctx, message("held", "")); err != nil {
		t.Fatal(err)
	}
	_, stop := start(t, pool, b, quick(ob))
	publish(t, pool, ob, messages(5)...)
	wantStatus(t, pool, ob, func(s outbox.Status) bool { return s.Depth == 0 && s.Sent == 5 })
	stop()
	if err := held.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	if s := status(t, pool, ob); s.Depth != 1 {
		t.Errorf("%+v, want a depth of 1", s)
	}
}

// A pause holds for the relay that leads, for one that starts, and in the middle of a long backlog.
func TestPause(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx, b, msgs := t.Context(), &broker{}, messages(600)
	cfg := quick(ob)
	cfg.BatchSize = 10
	_, stop := start(t, pool, b, cfg)
	publish(t, pool, ob, msgs[0])
	wantIDs(t, b, "0")
	if err := ob.Pause(ctx, pool, clerk); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, pool, ob, func(s outbox.Status) bool {
		return s.Paused != nil && s.Paused.By == "ada" && s.Paused.Why == "test" && time.Since(s.Paused.Since).Abs() < time.Minute
	})
	// Its next look is not longer away than a poll, which the next lease is.
	stop()
	publish(t, pool, ob, msgs[1:]...)
	_, stop = start(t, pool, b, cfg)
	wantStatus(t, pool, ob, func(s outbox.Status) bool { return s.Depth == 599 && s.Leader != "" })
	stop()
	if got := b.ids(); len(got) != 1 {
		t.Fatalf("sent while paused: %q", clip(got))
	}
	paused := make(chan struct{})
	b.set(func(b *broker) {
		b.after = func([]*postrider.Message) {
			if len(b.accepted) < 100 {
				return
			}
			b.after = nil
			if err := ob.Pause(context.WithoutCancel(ctx), pool, clerk); err != nil {
				t.Error(err)
			}
			close(paused)
		}
	})
	if err := ob.Resume(ctx, pool, clerk); err != nil {
		t.Fatal(err)
	}
	slow := cfg
	slow.BatchSize = 1 // many pages of one scan: the pause is seen with a write of the cursor
	b.set(func(b *broker) {
		b.before = func([]*postrider.Message) error { <-time.After(time.Millisecond); return nil } // as far as a broker is
	})
	start(t, pool, b, slow)
	<-paused
	wantStatus(t, pool, ob, func(s outbox.Status) bool { return s.Depth > 0 && s.Sent == int64(len(b.ids())) })
	if err := ob.Resume(ctx, pool, clerk); err != nil {
		t.Fatal(err)
	}
	wantIDs(t, b, ids(msgs)...)
	wantRows(t, pool, "postrider.postrider_outbox_log where by = 'ada' and why = 'test' and done in ('pause', 'resume')", 4)
	for _, a := range []outbox.Action{{By: "ada"}, {Why: "x"}, {By: "a\x00", Why: "x"}} {
		wantCode(t, ob.Pause(ctx, pool, a), postrider.InvalidArgument)
		wantCode(t, ob.Resume(ctx, pool, a), postrider.InvalidArgument)
	}
}

func TestStatusWithoutTables(t *testing.T) {
	t.Parallel()
	pool := postridertest.Postgres(t)
	ob, err := outbox.New(outbox.Config{Source: "//s"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = ob.Status(t.Context(), pool)
	wantCode(t, err, postrider.FailedPrecondition)
	wantCode(t, ob.Pause(t.Context(), pool, clerk), postrider.FailedPrecondition)
}
