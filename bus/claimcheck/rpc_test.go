package claimcheck_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus/claimcheck"
	"github.com/postrider/postrider/postridertest"
	"github.com/postrider/postrider/rpc"
)

// reversing serves files.v1/Convert until the test ends: the response is the request backwards, or many times "x" for "x".
func reversing(t *testing.T, nc *nats.Conn, mw ...postrider.Middleware) {
	t.Helper()
	srv, err := rpc.NewServer(nc, rpc.ServerConfig{Middleware: mw})
	if err == nil {
		err = srv.Register(convert.Handler(func(ctx context.Context, req *[]byte) (*[]byte, error) {
			if m := postrider.MessageFromContext(ctx); m.Extension(postrider.ExtDataRef) != "" {
				t.Error("the handler sees the reference")
			}
			if string(*req) == "x" {
				res := bytes.Repeat(*req, 2<<20)
				return &res, nil
			}
			res := bytes.Clone(*req)
			slices.Reverse(res)
			return &res, nil
		}))
	}
	if err != nil {
		t.Fatal(err)
	}
	run(t, srv)
}

func caller(t *testing.T, nc *nats.Conn, mw ...postrider.Middleware) *rpc.Client {
	t.Helper()
	c, err := rpc.NewClient(nc, rpc.ClientConfig{Source: "//test/files", Timeout: 30 * time.Second, Middleware: mw})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestCall(t *testing.T) {
	t.Parallel()
	srv := postridertest.NewNATS(t)
	nc := srv.Connect()
	calls := func(c *claimcheck.Config) { c.Bucket, c.MaxAge = "CALLS", time.Minute }
	reversing(t, nc, newStore(t, nc, calls).Middleware)
	c := caller(t, srv.Connect(), newStore(t, nc, calls).CallMiddleware)
	large := append(*fiveMiB(), *fiveMiB()...)
	reversed := bytes.Clone(large)
	slices.Reverse(reversed)
	for _, tt := range []struct{ req, res []byte }{
		{large, reversed}, {[]byte("small"), []byte("llams")}, {[]byte("x"), bytes.Repeat([]byte("x"), 2<<20)},
	} {
		res, err := rpc.Call(t.Context(), c, convert, &tt.req, rpc.WaitForReady())
		if err != nil {
			t.Fatal(err)
		}
		if sha256.Sum256(*res) != sha256.Sum256(tt.res) {
			t.Errorf("a request of %d bytes had another response, of %d bytes, want %d", len(tt.req), len(*res), len(tt.res))
		}
	}
}

// A call has one outcome, and says whether it may have run.
func TestCallErrors(t *testing.T) {
	t.Parallel()
	srv := postridertest.NewNATS(t)
	nc := srv.Connect()
	claims := newStore(t, nc)
	large, x := *fiveMiB(), []byte("x")

	reversing(t, nc, claims.Middleware)
	plain := caller(t, srv.Connect())
	if _, err := rpc.Call(t.Context(), plain, convert, &x, rpc.WaitForReady()); !errors.Is(err, postrider.ResourceExhausted) {
		t.Errorf("a large response to a caller that does not take references: %v, want ResourceExhausted", err)
	}
	// A program without a CloudEvent in its request reads no attributes.
	bare := &nats.Msg{Subject: "rpc.files.v1.Convert", Data: x, Header: nats.Header{"Content-Type": {"application/octet-stream"}}}
	if msg, err := nc.RequestMsg(bare, 30*time.Second); err != nil || !strings.Contains(msg.Header.Get("Nats-Service-Error"), "RESOURCE_EXHAUSTED") {
		t.Errorf("the answer to a plain request is %+v, %v, want an error", msg, err)
	}
	other := newStore(t, nc, func(c *claimcheck.Config) { c.Bucket = "OTHER" })
	elsewhere := caller(t, srv.Connect(), other.CallMiddleware)
	if _, err := rpc.Call(t.Context(), elsewhere, convert, &large); !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), "CLAIMS") {
		t.Errorf("a request in another bucket: %v, want FailedPrecondition that names the server's", err)
	}
	var e *postrider.Error
	limited := caller(t, srv.Connect(), newStore(t, nc, func(c *claimcheck.Config) { c.MaxBytes = 1 << 20 }).CallMiddleware)
	if _, err := rpc.Call(t.Context(), limited, convert, &large); !errors.As(err, &e) || e.Code != postrider.ResourceExhausted || !e.Unprocessed {
		t.Errorf("a request beyond MaxBytes: %v, want ResourceExhausted that says it did not run", err)
	}
	away := postridertest.NewNATS(t)
	lost := away.Connect()
	away.Stop()
	cut := caller(t, srv.Connect(), newStore(t, lost).CallMiddleware)
	if _, err := rpc.Call(t.Context(), cut, convert, &large, rpc.Timeout(2*time.Second)); !errors.As(err, &e) || !postrider.Retryable(err) || !e.Unprocessed {
		t.Errorf("a store that is away: %v, want an error that passes and says that the call did not run", err)
	}
}
