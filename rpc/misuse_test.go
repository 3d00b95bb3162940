package rpc

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

func TestNilIsRefused(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	c := dial(t, nc, ClientConfig{})
	for what, call := range map[string]func() error{
		"server's connection": func() error { _, err := NewServer(nil, ServerConfig{}); return err },
		"client's connection": func() error { _, err := NewClient(nil, ClientConfig{}); return err },
		"server's middleware": func() error {
			_, err := NewServer(nc, ServerConfig{Middleware: []postrider.Middleware{nil}})
			return err
		},
		"client's middleware": func() error {
			_, err := NewClient(nc, ClientConfig{Middleware: []postrider.Middleware{nil}})
			return err
		},
		"client":  func() error { _, err := Call(t.Context(), nil, reserve, &item{}); return err },
		"method":  func() error { _, err := Call[item, hold](t.Context(), c, nil, &item{}); return err },
		"request": func() error { _, err := Call(t.Context(), c, reserve, nil); return err },
		"option":  func() error { _, err := Call(t.Context(), c, reserve, &item{}, nil); return err },
		"attribute": func() error {
			_, err := Call(t.Context(), c, reserve, &item{}, Attributes(nil))
			return err
		},
	} {
		if err := call(); !errors.Is(err, postrider.InvalidArgument) {
			t.Errorf("%s: %v, want InvalidArgument", what, err)
		}
	}
}

// An error variable of a middleware belongs to the middleware: calls that fail with it, at the same time and of several
// methods, name themselves and leave it as it is.
func TestErrorsOfMiddlewareAreNotChanged(t *testing.T) {
	t.Parallel()
	open := postrider.Errorf(postrider.Unavailable, "the circuit is open")
	for name, refusal := range map[string]error{"plain": open, "permanent": postrider.Permanent(open)} {
		c := dial(t, postridertest.NATS(t), ClientConfig{Middleware: []postrider.Middleware{
			func(postrider.HandlerFunc) postrider.HandlerFunc {
				return func(context.Context, *postrider.Message) (*postrider.Message, error) { return nil, refusal }
			},
		}})
		release := postrider.NewMethod[item, hold]("stock.v1/Release")
		var wg sync.WaitGroup
		for range 10 {
			for _, m := range []*postrider.Method[item, hold]{reserve, release} {
				wg.Go(func() {
					_, err := Call(t.Context(), c, m, &item{})
					if want := "call " + m.Name() + ": the circuit is open (UNAVAILABLE)"; err == nil || err.Error() != want {
						t.Errorf("%s: %v, want %s", name, err, want)
					}
					if postrider.Retryable(err) != postrider.Retryable(refusal) {
						t.Errorf("%s: the error is retryable: %v", name, postrider.Retryable(err))
					}
				})
			}
		}
		wg.Wait()
	}
	if open.Op != "" {
		t.Errorf("the middleware's variable says now %q", open.Op)
	}
}
