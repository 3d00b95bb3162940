package idempotency

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
)

func TestDedupHandlesAMessageOnce(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, runs := b.store(Config{}), 0
	var fail error
	var fence int64
	h := b.placed.Handler(func(ctx context.Context, _ postrider.Event[order]) error {
		runs++
		fence = FenceFromContext(ctx)
		return fail
	})
	mail := h.With(postrider.Stack{Dedup: Dedup(s, "mail")}.Middleware()...)
	fail = postrider.Permanent(errors.New("no such address"))
	m := b.event("m-1", time.Now())
	for range 2 { // as after a replay of the dead letter
		if err := handle(t, mail, m); postrider.Retryable(err) || !strings.Contains(fmt.Sprint(err), "no such address") {
			t.Fatalf("error %v", err)
		}
	}
	fail = nil
	for range 3 {
		must(t, handle(t, mail, m))
	}
	if runs != 3 || fence == 0 {
		t.Errorf("%d runs, fence %d", runs, fence)
	}
	must(t, handle(t, h.With(Dedup(s, "audit")), m))
	other := b.event("m-1", m.Time)
	other.Source = "//test/other"
	must(t, handle(t, mail, other))
	if runs != 5 {
		t.Errorf("%d runs", runs)
	}
	wantCode(t, handle(t, mail, b.event("", time.Now())), postrider.InvalidArgument, false)
	wantCode(t, handle(t, mail, b.event(strings.Repeat("i", 1000), time.Now())), postrider.InvalidArgument, false)
}

func TestDedupRepeatsTheReply(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, runs := b.store(Config{}), 0
	h := b.reserve.Handler(func(_ context.Context, req *order) (*hold, error) {
		runs++
		return &hold{ID: fmt.Sprint(req.ID, runs)}, nil
	}).With(Dedup(s, "stock"))
	m := b.command(b.reserve, "", order{ID: "o-1"})
	must(t, m.SetExtension(postrider.ExtReplyTo, "shop.replies"))
	first, err := h.Handle(t.Context(), m)
	must(t, err)
	again, err := h.Handle(t.Context(), m)
	must(t, err)
	first.Time, again.Time = first.Time.Round(0).UTC(), again.Time.UTC()
	if runs != 1 || !reflect.DeepEqual(first, again) || again.Topic != "shop.replies" {
		t.Errorf("%d runs, reply\n%+v, again\n%+v", runs, first, again)
	}
	b.exec(`update effects.postrider_request set reply = '?'`)
	_, err = h.Handle(t.Context(), m)
	wantCode(t, err, postrider.Internal, true)
}

func TestDedupDelaysACopy(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.store(Config{})
	m, inner := b.event("m-1", time.Now()), error(nil)
	var h postrider.Handler
	h = b.placed.Handler(func(ctx context.Context, _ postrider.Event[order]) error {
		_, inner = h.Handle(ctx, m)
		return nil
	}).With(Dedup(s, "mail"))
	must(t, handle(t, h, m))
	wantCode(t, inner, postrider.Aborted, true)
	if d, _ := postrider.RetryDelay(inner); d != busyDelay {
		t.Errorf("delayed by %v", d)
	}
}

// TestDedupComesAgainAfterALostLease: whatever the handler made of its context's end, another has the message now.
func TestDedupComesAgainAfterALostLease(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		topic := postrider.NewTopic[order]("orders.placed.v1")
		h := topic.Handler(func(ctx context.Context, _ postrider.Event[order]) error {
			<-ctx.Done()
			return postrider.Permanent(errors.New("interrupted"))
		}).With(Dedup(away{}, "mail"))
		m, err := topic.Message(t.Context(), &order{}, postrider.MessageID("m-1"))
		must(t, err)
		wantCode(t, handle(t, h, m), postrider.Aborted, true)
	})
}

// TestRequestsInEachExecMode: what PgBouncer takes works, and so does the rest.
func TestRequestsInEachExecMode(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, mode := range []pgx.QueryExecMode{
		pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol,
	} {
		cfg := b.pool.Config()
		cfg.ConnConfig.DefaultQueryExecMode = mode
		s, c := b.storeOn(b.connect(cfg), Config{}), &charge{err: errors.New("weather")}
		key := mode.String()
		if _, err := b.do(s, key, c); !errors.Is(err, c.err) {
			t.Errorf("%v: %v", mode, err)
		}
		c.err = nil
		b.wantDo(s, key, c, "o-1/2")
		b.wantDo(s, key, c, "o-1/2")
		claim, err := s.Claim(t.Context(), key, "me", []byte{}, time.Second)
		must(t, err)
		must(t, s.Renew(t.Context(), key, claim.Fence, time.Second))
		b.exec(`update effects.postrider_request set until = now() - interval '1 hour' where key = $1`, key)
		next, err := s.Claim(t.Context(), key, "another", []byte{}, time.Second)
		if err != nil || next.Fence <= claim.Fence {
			t.Errorf("%v: %+v, %v", mode, next, err)
		}
	}
}
