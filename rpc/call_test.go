package rpc

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/devstack"
	"github.com/postrider/postrider/postridertest"
)

func TestCall(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	var seen *postrider.Message
	serve(t, nc, ServerConfig{Prefix: "acme.test"}, reserve.Handler(func(ctx context.Context, it *item) (*hold, error) {
		seen = postrider.MessageFromContext(ctx)
		return echo(ctx, it)
	}))
	c := dial(t, nc, ClientConfig{Prefix: "acme.test", Source: "//shop/orders"})

	cause := &postrider.Message{ID: "cause-1", Source: "//test", Type: "test"}
	ctx := postrider.ContextWithMessage(t.Context(), cause)
	res, err := Call(ctx, c, reserve, &item{SKU: 7, Note: "zażółć\x00"},
		Attributes(postrider.IdempotencyKey("k-1"), postrider.Subject("shelf 4")))
	if err != nil {
		t.Fatal(err)
	}
	if res.ID != "7zażółć\x00" {
		t.Errorf("response %q", res.ID)
	}
	for _, a := range [][2]string{
		{seen.Source, "//shop/orders"},
		{seen.Type, "stock.v1/Reserve"},
		{seen.Topic, "stock.v1.Reserve"},
		{seen.Subject, "shelf 4"},
		{seen.Extension(postrider.ExtIdempotencyKey), "k-1"},
		{seen.Extension(postrider.ExtCausationID), "cause-1"},
		{seen.Extension(postrider.ExtCorrelationID), "cause-1"},
	} {
		if a[0] != a[1] {
			t.Errorf("the handler saw %q, want %q", a[0], a[1])
		}
	}
}

func TestCallErrorTravels(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	details := []postrider.Detail{{Type: "type.test/one", Value: []byte{0, 1, 255}}, {Type: "type.test/two"}}
	serve(t, nc, ServerConfig{}, reserve.Handler(func(_ context.Context, it *item) (*hold, error) {
		err := &postrider.Error{
			Code: postrider.Code(it.SKU), Msg: "no: źle\n", Details: details, Unprocessed: true,
		}
		switch it.Note {
		case "permanent":
			return nil, postrider.Permanent(err)
		case "wait":
			err.RetryAfter = 1500 * time.Millisecond
		}
		return nil, fmt.Errorf("wrapped: %w", err)
	}))
	c := dial(t, nc, ClientConfig{})
	for code := postrider.Canceled; code <= postrider.Unauthenticated; code++ {
		_, err := Call(t.Context(), c, reserve, &item{SKU: int(code)})
		e := wantError(t, err, code, true)
		if !errors.Is(err, code) || e.Msg != "no: źle\n" || e.RetryAfter != 0 || e.Op != "call stock.v1/Reserve" {
			t.Errorf("%v arrived as %+v", code, e)
		}
		if fmt.Sprint(e.Details) != fmt.Sprint(details) {
			t.Errorf("%v: details %v, want %v", code, e.Details, details)
		}
		if want := postrider.Retryable(code); postrider.Retryable(err) != want {
			t.Errorf("%v: retryable %v, want %v", code, !want, want)
		}
		if _, err := Call(t.Context(), c, reserve, &item{SKU: int(code), Note: "permanent"}); postrider.Retryable(err) {
			t.Errorf("%v: a permanent error arrived as retryable", code)
		}
		_, err = Call(t.Context(), c, reserve, &item{SKU: int(code), Note: "wait"})
		if d, ok := postrider.RetryDelay(err); !ok || d != 1500*time.Millisecond || !postrider.Retryable(err) {
			t.Errorf("%v: asked for a wait of %v, %v", code, d, ok)
		}
	}
}

func TestCallPanicIsInternal(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	serve(t, nc, ServerConfig{}, reserve.Handler(func(_ context.Context, it *item) (*hold, error) {
		if it.SKU == 13 {
			panic("thirteen")
		}
		return echo(t.Context(), it)
	}))
	c := dial(t, nc, ClientConfig{})
	_, err := Call(t.Context(), c, reserve, &item{SKU: 13})
	if e := wantError(t, err, postrider.Internal, false); !strings.Contains(e.Msg, "thirteen") {
		t.Errorf("message %q", e.Msg)
	}
	if _, err := Call(t.Context(), c, reserve, &item{SKU: 1}); err != nil {
		t.Errorf("the next call: %v", err)
	}
}

// An error that a handler got from its own call says that this inner call did not run; the outer one did.
func TestCallInsideHandler(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	c := dial(t, nc, ClientConfig{})
	nobody := postrider.NewMethod[item, hold]("nobody.v1/Serves")
	serve(t, nc, ServerConfig{}, reserve.Handler(func(ctx context.Context, it *item) (*hold, error) {
		return Call(ctx, c, nobody, it)
	}))
	_, err := Call(t.Context(), c, reserve, &item{})
	wantError(t, err, postrider.Unavailable, false)
}

func TestCallDeadlineReachesHandler(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	left := make(chan time.Duration, 1)
	ended := make(chan error, 1)
	serve(t, nc, ServerConfig{}, reserve.Handler(func(ctx context.Context, _ *item) (*hold, error) {
		d, _ := ctx.Deadline()
		left <- time.Until(d)
		<-ctx.Done()
		ended <- context.Cause(ctx)
		return nil, ctx.Err()
	}))
	c := dial(t, nc, ClientConfig{})

	_, err := Call(t.Context(), c, reserve, &item{}, Timeout(100*time.Millisecond))
	wantError(t, err, postrider.DeadlineExceeded, false)
	if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, postrider.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	if d := <-left; d <= 0 || d > 100*time.Millisecond {
		t.Errorf("the handler had %v left, want up to 100 ms", d)
	}
	if err := <-ended; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the handler's context ended with %v", err)
	}

	// The earlier one of time-out and context wins.
	ctx, cancel := context.WithTimeout(t.Context(), 80*time.Millisecond)
	defer cancel()
	_, err = Call(ctx, c, reserve, &item{}, Timeout(time.Minute))
	wantError(t, err, postrider.DeadlineExceeded, false)
	if d := <-left; d > 80*time.Millisecond {
		t.Errorf("the handler had %v left, want up to 80 ms", d)
	}
}

func TestCallCanceled(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	g := newGate()
	serve(t, nc, ServerConfig{}, reserve.Handler(g.handle))
	defer close(g.open)
	c := dial(t, nc, ClientConfig{})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-g.entered; cancel() }()
	_, err := Call(ctx, c, reserve, &item{})
	wantError(t, err, postrider.Canceled, false)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v does not wrap the context's", err)
	}
	_, err = Call(ctx, c, reserve, &item{}, Timeout(-1))
	wantError(t, err, postrider.InvalidArgument, true)
}

func TestCallNobodyServes(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	c := dial(t, nc, ClientConfig{Timeout: time.Hour})
	_, err := Call(t.Context(), c, reserve, &item{}) // an hour would fail the test
	wantError(t, err, postrider.Unavailable, true)

	_, err = Call(t.Context(), c, reserve, &item{}, WaitForReady(), Timeout(50*time.Millisecond))
	wantError(t, err, postrider.Unavailable, true)

	waiting := goCall(c, 5, WaitForReady())
	serve(t, nc, ServerConfig{}, reserve.Handler(echo))
	if r := <-waiting; r.err != nil || r.res.ID != "5" {
		t.Errorf("the call that waited: %v, %v", r.res, r.err)
	}
}

func TestCallTooLarge(t *testing.T) {
	t.Parallel()
	nc := natsWith(t, func(o *server.Options) { o.MaxPayload = 4096 })
	var ran atomic.Int32
	serve(t, nc, ServerConfig{}, reserve.Handler(func(_ context.Context, it *item) (*hold, error) {
		ran.Add(1)
		return &hold{ID: strings.Repeat("x", it.SKU)}, nil
	}))
	c := dial(t, nc, ClientConfig{})

	_, err := Call(t.Context(), c, reserve, &item{Note: strings.Repeat("x", 5000)})
	if e := wantError(t, err, postrider.ResourceExhausted, true); !strings.Contains(e.Msg, "4096") {
		t.Errorf("message %q does not name the limit", e.Msg)
	}
	if n := ran.Load(); n != 0 {
		t.Errorf("the handler ran %d times", n)
	}
	_, err = Call(t.Context(), c, reserve, &item{SKU: 5000})
	if e := wantError(t, err, postrider.ResourceExhausted, false); !strings.Contains(e.Msg, "4096") {
		t.Errorf("message %q does not name the limit", e.Msg)
	}
	if res, err := Call(t.Context(), c, reserve, &item{SKU: 3000}); err != nil || len(res.ID) != 3000 {
		t.Errorf("one that fits: %v", err)
	}
}

func TestCallPermissionDenied(t *testing.T) {
	t.Parallel()
	seen := make(chan error, 10)
	nc := natsWith(t, func(o *server.Options) {
		o.Users = []*server.User{{
			Username: "u", Password: "p", // of this test's own server
			Permissions: &server.Permissions{Publish: &server.SubjectPermission{Allow: []string{"ok.>"}}},
		}}
	}, nats.UserInfo("u", "p"), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { seen <- err }))
	c := dial(t, nc, ClientConfig{Timeout: time.Hour})
	for range 2 {
		_, err := Call(t.Context(), c, reserve, &item{})
		wantError(t, err, postrider.PermissionDenied, false)
		if err := <-seen; !errors.Is(err, nats.ErrPermissionViolation) {
			t.Errorf("the user's error handler got %v", err)
		}
	}
}

func TestCallSubscribeDenied(t *testing.T) {
	t.Parallel()
	nc := natsWith(t, func(o *server.Options) {
		o.Users = []*server.User{{
			Username: "u", Password: "p", // of this test's own server
			Permissions: &server.Permissions{Subscribe: &server.SubjectPermission{Allow: []string{"_INBOX.>", "$SRV.>"}}},
		}}
	}, nats.UserInfo("u", "p"), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
	srv, err := NewServer(nc, ServerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.Register(reserve.Handler(echo)); err != nil {
		t.Fatal(err)
	}
	if err := srv.Run(t.Context()); !errors.Is(err, postrider.PermissionDenied) {
		t.Errorf("Run returned %v, want PermissionDenied", err)
	}
}

// natsWith connects to a nats-server with options.
func natsWith(t *testing.T, options func(*server.Options), opts ...nats.Option) *nats.Conn {
	t.Helper()
	srv, err := devstack.StartNATS(t.Context(), devstack.NATSConfig{Options: options})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = srv.Close() })
	nc, err := nats.Connect(srv.URL, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}
