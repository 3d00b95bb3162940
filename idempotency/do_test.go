package idempotency

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/faultproxy"
	"github.com/postrider/postrider/postridertest"
)

// charge is a function that counts its runs and answers with their number.
type charge struct {
	runs atomic.Int64
	err  error
	body func(ctx context.Context) error
}

func (c *charge) run(ctx context.Context, req *order) (*hold, error) {
	n := c.runs.Add(1)
	if c.body != nil {
		if err := c.body(ctx); err != nil {
			return nil, err
		}
	}
	return &hold{ID: fmt.Sprintf("%s/%d", req.ID, n)}, c.err
}

func (b *bench) do(r Records, key string, c *charge, opts ...DoOption) (string, error) {
	b.t.Helper()
	res, err := Do(b.t.Context(), r, b.reserve, key, &order{ID: "o-1"}, c.run, opts...)
	if err != nil {
		return "", err
	}
	return res.ID, nil
}

func (b *bench) wantDo(r Records, key string, c *charge, want string) {
	b.t.Helper()
	if got, err := b.do(r, key, c); err != nil || got != want {
		b.t.Fatalf("got %q, %v, want %q", got, err, want)
	}
}

func TestDoReturnsTheRecordedResponse(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, c := b.store(Config{}), &charge{}
	b.wantDo(s, "k", c, "o-1/1")
	b.wantDo(s, "k", c, "o-1/1")
	b.wantDo(s, "other", c, "o-1/2")
	// Another instance, and another method.
	b.wantDo(b.store(Config{}), "k", c, "o-1/1")
	res, err := Do(t.Context(), s, b.release, "k", &order{ID: "o-1"}, c.run)
	if err != nil || res.ID != "o-1/3" {
		t.Fatalf("the same key of another method: %v, %v", res, err)
	}
	if st := s.Stats(); st.Handled != 3 || st.Duplicates != 1 {
		t.Errorf("stats %+v", st)
	}
	// A nil response is the zero one, both times.
	for range 2 {
		res, err := Do(t.Context(), s, b.reserve, "nil", &order{}, func(context.Context, *order) (*hold, error) { return nil, nil })
		if err != nil || res == nil {
			t.Fatalf("nil response: %v, %v", res, err)
		}
	}
}

func TestDoRecordsRefusalsOnly(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.store(Config{})
	no := &charge{err: &postrider.Error{
		Code: postrider.FailedPrecondition, Msg: "sold out", Details: []postrider.Detail{{Type: "stock", Value: []byte("0")}},
	}}
	for range 2 {
		_, err := b.do(s, "no", no)
		wantCode(t, err, postrider.FailedPrecondition, false)
		if e, _ := errors.AsType[*postrider.Error](err); e.Msg != "sold out" || len(e.Details) != 1 {
			t.Errorf("the refusal came as %+v", e)
		}
	}
	if n := no.runs.Load(); n != 1 {
		t.Errorf("a refused function ran %d times", n)
	}
	weather := &charge{err: errors.New("weather")}
	for range 2 {
		if _, err := b.do(s, "weather", weather); !errors.Is(err, weather.err) {
			t.Fatalf("error %v", err)
		}
	}
	weather.err = nil
	b.wantDo(s, "weather", weather, "o-1/3")

	ouch := &charge{body: func(context.Context) error { panic("ouch") }}
	func() {
		defer func() {
			if recover() != "ouch" {
				t.Error("the panic was swallowed")
			}
		}()
		_, _ = b.do(s, "panic", ouch)
	}()
	ouch.body = nil
	b.wantDo(s, "panic", ouch, "o-1/2")
}

func TestDoRefusesAnotherRequest(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, c := b.store(Config{}), &charge{}
	other := func() {
		t.Helper()
		_, err := Do(t.Context(), s, b.reserve, "k", &order{ID: "o-2"}, c.run)
		wantCode(t, err, postrider.AlreadyExists, false)
		if !strings.Contains(err.Error(), "another request") {
			t.Errorf("the error says %q", err)
		}
	}
	c.body = func(context.Context) error { other(); return nil } // while it runs
	b.wantDo(s, "k", c, "o-1/1")
	other()
	if n := c.runs.Load(); n != 1 {
		t.Errorf("it ran %d times", n)
	}
	// Nor does a dead owner's key go to another request, which would hide that the first one may have had its effect.
	_, err := s.Claim(t.Context(), "stock.v1/Reserve dead", "me", []byte("something else"), time.Millisecond)
	must(t, err)
	b.exec(`update effects.postrider_request set until = now() - interval '1 second' where key ~ 'dead'`)
	_, err = b.do(s, "dead", c)
	wantCode(t, err, postrider.AlreadyExists, false)
}

func TestDoWhileTheKeyIsInUse(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, c := b.store(Config{}), &charge{}
	running, finish := make(chan struct{}), make(chan struct{})
	c.body = func(context.Context) error {
		close(running)
		<-finish
		return nil
	}
	results := make(chan string, 4)
	call := func() {
		got, err := b.do(s, "k", c)
		results <- fmt.Sprint(got, err)
	}
	go call()
	<-running
	for range 3 {
		go call()
	}
	_, err := b.do(s, "k", c, Refuse())
	wantCode(t, err, postrider.Aborted, true)
	if d, ok := postrider.RetryDelay(err); !ok || d <= 0 {
		t.Errorf("the error names no delay: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = Do(ctx, s, b.reserve, "k", &order{ID: "o-1"}, c.run)
	wantCode(t, err, postrider.DeadlineExceeded, true)
	close(finish)
	for range 4 {
		if got := <-results; got != "o-1/1<nil>" {
			t.Errorf("a caller that waited got %s", got)
		}
	}
}

func TestDoTakesOverFromTheDead(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, c := b.store(Config{}), &charge{}
	data, err := b.reserve.Codecs()[0].Append(nil, &order{ID: "o-1"})
	must(t, err)
	dead, err := s.Claim(t.Context(), "stock.v1/Reserve k", "me", fingerprint(data), time.Second)
	must(t, err)
	var fence int64
	c.body = func(ctx context.Context) error {
		fence = FenceFromContext(ctx)
		return nil
	}
	b.wantDo(s, "k", c, "o-1/1")
	if dead.Fence == 0 || fence <= dead.Fence {
		t.Errorf("fence %d after %d", fence, dead.Fence)
	}
	if f := FenceFromContext(t.Context()); f != 0 {
		t.Errorf("fence %d outside", f)
	}
}

func TestDoRenewsItsLease(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, c := b.store(Config{}), &charge{}
	c.body = func(ctx context.Context) error {
		var until, first time.Time
		postridertest.Eventually(t, func() error {
			must(t, b.pool.QueryRow(ctx, `select until from effects.postrider_request`).Scan(&until))
			if first.IsZero() {
				first = until
			}
			if until.Sub(first) < 4*time.Second {
				return fmt.Errorf("renewed by %v since it began", until.Sub(first))
			}
			return nil
		})
		return ctx.Err()
	}
	if _, err := b.do(s, "k", c, Lease(3*time.Second)); err != nil {
		t.Fatal(err)
	}
	_, err := b.do(s, "k2", c, Lease(time.Millisecond))
	wantCode(t, err, postrider.InvalidArgument, false)
}

func TestDoTellsOfALostLease(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, c := b.store(Config{}), &charge{}
	stolen := false
	c.body = func(ctx context.Context) error {
		if stolen {
			return nil
		}
		stolen = true
		b.exec(`update effects.postrider_request set fence = fence + 1, until = now()`)
		select {
		case <-ctx.Done():
		case <-t.Context().Done():
		}
		if cause := context.Cause(ctx); !errors.Is(cause, ErrLost) {
			t.Errorf("the cause is %v", cause)
		}
		return ctx.Err()
	}
	_, err := b.do(s, "k", c, Lease(time.Second))
	wantCode(t, err, postrider.Aborted, true)
	b.wantDo(s, "k", c, "o-1/2")

	// A function that does not look at its context: its outcome is not reported as if it were recorded.
	stubborn := &charge{}
	stubborn.body = func(context.Context) error {
		b.exec(`update effects.postrider_request set fence = fence + 1, until = now() where state = 0`)
		return nil
	}
	_, err = b.do(s, "stubborn", stubborn)
	wantCode(t, err, postrider.Aborted, true)
	stubborn.body = nil
	b.wantDo(s, "stubborn", stubborn, "o-1/2")
}

// proxied returns a store whose connections can be broken.
func (b *bench) proxied() (*Store, *faultproxy.Proxy) {
	b.t.Helper()
	cfg := b.pool.Config()
	proxy, err := faultproxy.New(fmt.Sprintf("%s:%d", cfg.ConnConfig.Host, cfg.ConnConfig.Port))
	must(b.t, err)
	b.t.Cleanup(func() { _ = proxy.Close() })
	cfg.ConnConfig.Host, cfg.ConnConfig.Fallbacks = "127.0.0.1", nil
	_, err = fmt.Sscanf(proxy.Addr(), "127.0.0.1:%d", &cfg.ConnConfig.Port)
	must(b.t, err)
	return b.storeOn(b.connect(cfg), Config{}), proxy
}

func TestDoWritesDownThroughBrokenConnections(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, proxy := b.proxied()
	c := &charge{body: func(context.Context) error {
		proxy.Cut()
		return nil
	}}
	b.wantDo(s, "k", c, "o-1/1")
	b.wantDo(s, "k", c, "o-1/1")

	// The answer to the completion is lost.
	c.body = func(context.Context) error {
		proxy.Swallow()
		go func() {
			for !b.completed("k2") {
				<-time.After(time.Millisecond)
			}
			proxy.Cut()
		}()
		return nil
	}
	b.wantDo(s, "k2", c, "o-1/2")
	b.wantDo(s, "k2", c, "o-1/2")

	must(t, proxy.Close())
	_, err := b.do(s, "k3", c)
	wantCode(t, err, postrider.Unavailable, true)
	if e, _ := errors.AsType[*postrider.Error](err); !e.Unprocessed {
		t.Error("it did not run, and the error does not say so")
	}
}

// TestDoOwnsAKeyThatItHasNotHeardOf: the claim is there, its answer is lost, and nobody waits for the end of the lease.
func TestDoOwnsAKeyThatItHasNotHeardOf(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, proxy := b.proxied()
	c := &charge{}
	b.wantDo(s, "before", c, "o-1/1") // so that there is a connection
	proxy.Swallow()
	go func() {
		const there = `select count(*) from effects.postrider_request where key ~ 'lost'`
		for n := 0; n == 0 && b.pool.QueryRow(t.Context(), there).Scan(&n) == nil; {
			<-time.After(time.Millisecond)
		}
		proxy.Cut()
	}()
	began := time.Now()
	res, err := Do(t.Context(), s, b.reserve, "lost", &order{ID: "o-1"}, c.run, Lease(time.Hour))
	if err != nil || res.ID != "o-1/2" {
		t.Fatalf("%v, %v after %v", res, err, time.Since(began))
	}
	b.wantDo(s, "lost", c, "o-1/2")
}

// completed says if a key's request is.
func (b *bench) completed(key string) bool {
	var state int
	err := b.pool.QueryRow(b.t.Context(), `select state from effects.postrider_request where key = $1`, "stock.v1/Reserve "+key).Scan(&state)
	return err != nil || state != requestOpen
}

// queries counts what goes to the server.
type queries struct{ n atomic.Int64 }

func (q *queries) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	q.n.Add(1)
	return ctx
}

func (q *queries) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func TestDoRoundTrips(t *testing.T) {
	t.Parallel()
	b := setup(t)
	cfg, q := b.pool.Config(), &queries{}
	cfg.ConnConfig.Tracer = q
	s, c := b.storeOn(b.connect(cfg), Config{}), &charge{}
	for i, want := range []int64{2, 1, 1} { // claim and complete; then claim alone
		before := q.n.Load()
		b.wantDo(s, "k", c, "o-1/1")
		if n := q.n.Load() - before; n != want {
			t.Errorf("call %d took %d round trips, want %d", i, n, want)
		}
	}
}

// TestDoHotPathWritesNothing: a repetition takes no transaction id, so it neither writes WAL nor waits for the disk.
func TestDoHotPathWritesNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, c := b.store(Config{}), &charge{}
	b.wantDo(s, "k", c, "o-1/1")
	version := func() (v string) {
		must(t, b.pool.QueryRow(t.Context(), `select ctid::text || ' ' || xmin::text || ' ' || xmax::text from effects.postrider_request`).Scan(&v))
		return v
	}
	before := version()
	b.wantDo(s, "k", c, "o-1/1")
	if after := version(); after != before {
		t.Errorf("the row was %s and is %s", before, after)
	}
}

func TestDoKeys(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, c := b.store(Config{}), &charge{}
	for _, key := range []string{"", strings.Repeat("k", 1001)} {
		_, err := b.do(s, key, c)
		wantCode(t, err, postrider.InvalidArgument, false)
	}
	b.wantDo(s, strings.Repeat("k", 1000), c, "o-1/1")
	_, err := Do(t.Context(), s, b.reserve, "\x00", &order{}, c.run) // PostgreSQL has no such text
	wantCode(t, err, postrider.InvalidArgument, false)
}

func TestSweepOfRequests(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, c := b.store(Config{KeyRetention: time.Hour}), &charge{}
	for _, key := range []string{"old", "new", "leased", "dead"} {
		b.wantDo(s, key, c, fmt.Sprint("o-1/", c.runs.Load()+1))
	}
	b.exec(`update effects.postrider_request set at = at - interval '2 hours' where key !~ 'new'`)
	b.exec(`update effects.postrider_request set state = 0, until = now() + interval '1 hour' where key ~ 'leased'`)
	b.exec(`update effects.postrider_request set state = 0, until = now() where key ~ 'dead'`)
	must(t, s.maintain(t.Context()))
	var left string
	must(t, b.pool.QueryRow(t.Context(), `select string_agg(split_part(key, ' ', 2), ' ' order by key) from effects.postrider_request`).Scan(&left))
	if left != "leased new" {
		t.Errorf("left are %q", left)
	}
	if _, err := New(b.pool, Config{KeyRetention: time.Second}); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("a retention of a second: %v", err)
	}
}

// away is a store that cannot be reached once a key is claimed.
type away struct{ Records }

func (away) Claim(context.Context, string, string, []byte, time.Duration) (Claim, error) {
	return Claim{Fence: 1}, nil
}

func (away) Renew(ctx context.Context, _ string, _ int64, _ time.Duration) error {
	return postrider.Errorf(postrider.Unavailable, "away")
}

func (away) Complete(context.Context, string, int64, Outcome) error {
	return postrider.Errorf(postrider.Unavailable, "away")
}

func (away) Release(context.Context, string, int64) error { return nil }

// TestDoStopsBeforeItsLeaseEnds: with the store away nobody may renew, and the function's context ends before another can have the
// key.
func TestDoStopsBeforeItsLeaseEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := postrider.NewMethod[order, hold]("stock.v1/Reserve")
		began := time.Now()
		_, err := Do(t.Context(), away{}, m, "k", &order{}, func(ctx context.Context, _ *order) (*hold, error) {
			<-ctx.Done()
			if took := time.Since(began); took > 10*time.Second || took < 9*time.Second {
				t.Errorf("it was told after %v", took)
			}
			return nil, ctx.Err()
		})
		wantCode(t, err, postrider.Aborted, true)
	})
}

// TestDoTellsThatItMayHaveRun: the function returned, and its outcome cannot be written down.
func TestDoTellsThatItMayHaveRun(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m, c := postrider.NewMethod[order, hold]("stock.v1/Reserve"), &charge{}
		_, err := Do(t.Context(), away{}, m, "k", &order{}, c.run)
		wantCode(t, err, postrider.Unavailable, true)
		if e, _ := errors.AsType[*postrider.Error](err); e.Unprocessed || c.runs.Load() != 1 {
			t.Errorf("it ran %d times, and the error is %+v", c.runs.Load(), e)
		}
	})
}

func TestDoTx(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.store(Config{})
	do := func(req order, fail error) (*hold, error) {
		return DoTx(t.Context(), s, b.reserve, "k", &req, func(ctx context.Context, tx pgx.Tx, req *order) (*hold, error) {
			if err := write(ctx, tx, "charge "+req.ID); err != nil {
				return nil, err
			}
			return &hold{ID: req.ID}, fail
		})
	}
	if _, err := do(order{ID: "o-1"}, errors.New("weather")); err == nil {
		t.Fatal("no error")
	}
	b.wantEffects("charge o-1", 0)
	for range 2 {
		res, err := do(order{ID: "o-1"}, nil)
		if err != nil || res.ID != "o-1" {
			t.Fatalf("%v, %v", res, err)
		}
		b.wantEffects("charge o-1", 1)
	}
	_, err := do(order{ID: "o-2"}, nil)
	wantCode(t, err, postrider.AlreadyExists, false)
	_, err = DoTx(t.Context(), s, b.reserve, "", &order{}, func(context.Context, pgx.Tx, *order) (*hold, error) { return nil, nil })
	wantCode(t, err, postrider.InvalidArgument, false)
}
