package rpc

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

type item struct {
	SKU  int    `json:"sku"`
	Note string `json:"note,omitempty"`
}

type hold struct {
	ID string `json:"id"`
}

var reserve = postrider.NewMethod[item, hold]("stock.v1/Reserve")

// echo answers with the item's number and note.
func echo(_ context.Context, it *item) (*hold, error) {
	return &hold{ID: fmt.Sprint(it.SKU, it.Note)}, nil
}

// running is a server that serves.
type running struct {
	*Server
	stop context.CancelFunc // begins the drain
	done chan error         // gets the result of Run
}

// serve runs a server until the test's end and returns when it serves.
func serve(t testing.TB, nc *nats.Conn, cfg ServerConfig, hs ...postrider.Handler) *running {
	t.Helper()
	srv, err := NewServer(nc, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.Register(hs...); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	r := &running{Server: srv, stop: stop, done: make(chan error, 1)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.done <- srv.Run(ctx)
	}()
	t.Cleanup(func() { stop(); <-ended })

	ping, err := micro.ControlSubject(micro.PingVerb, microName(srv.methods[0].service), srv.id)
	if err != nil {
		t.Fatal(err)
	}
	postridertest.Eventually(t, func() error {
		_, err := nc.Request(ping, nil, time.Second)
		return err
	})
	return r
}

// drained waits for the end of Run.
func (r *running) drained(t testing.TB) {
	t.Helper()
	select {
	case err := <-r.done:
		if err != nil {
			t.Errorf("Run returned %v, want nil", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("Run did not return within 30 s")
	}
}

func dial(t testing.TB, nc *nats.Conn, cfg ClientConfig) *Client {
	t.Helper()
	c, err := NewClient(nc, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// wantError checks class and Unprocessed of a call's error.
func wantError(t testing.TB, err error, code postrider.Code, unprocessed bool) *postrider.Error {
	t.Helper()
	var e *postrider.Error
	if !errors.As(err, &e) {
		t.Fatalf("error %v (%T), want a *postrider.Error", err, err)
	}
	if e.Code != code || e.Unprocessed != unprocessed {
		t.Fatalf("error %v with Unprocessed %v, want %v with %v", err, e.Unprocessed, code, unprocessed)
	}
	return e
}

// gate is a handler that holds its calls until it is opened.
type gate struct {
	entered chan int // the numbers of the items, as handlers begin
	open    chan struct{}
}

func newGate() *gate { return &gate{entered: make(chan int, 1000), open: make(chan struct{})} }

func (g *gate) handle(ctx context.Context, it *item) (*hold, error) {
	g.entered <- it.SKU
	select {
	case <-g.open:
		return &hold{ID: fmt.Sprint(it.SKU)}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// result is what a call in the background ended with.
type result struct {
	res *hold
	err error
}

func goCall(c *Client, sku int, opts ...CallOption) chan result {
	out := make(chan result, 1)
	go func() {
		res, err := Call(context.Background(), c, reserve, &item{SKU: sku}, opts...)
		out <- result{res, err}
	}()
	return out
}
