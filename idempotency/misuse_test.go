package idempotency_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/idempotency"
)

func TestNilIsRefused(t *testing.T) {
	t.Parallel()
	type thing struct{}
	store, err := idempotency.New(new(pgxpool.Pool), idempotency.Config{})
	if err != nil {
		t.Fatal(err)
	}
	topic := postrider.NewTopic[thing]("things.made.v1")
	method := postrider.NewMethod[thing, thing]("things.v1/Make")
	one := func(context.Context, pgx.Tx, postrider.Event[thing]) error { return nil }
	for text, mistake := range map[string]func(){
		"Handler of things.made.v1: the consumer needs a name": func() { idempotency.Handler(store, "", topic, one) },
		"Handler of things.made.v1: the Store is nil":          func() { idempotency.Handler(nil, "a", topic, one) },
		"Handler of things.made.v1: the function is nil":       func() { idempotency.Handler(store, "a", topic, nil) },
		"BatchHandler of things.made.v1: the function is nil":  func() { idempotency.BatchHandler(store, "a", topic, nil) },
		"Action of things.v1/Make: the function is nil":        func() { idempotency.Action(store, method, nil) },
		"Compensation of things.v1/Make: the function is nil":  func() { idempotency.Compensation[thing, thing, thing](store, method, nil) },
		"Dedup: the Records are nil":                           func() { idempotency.Dedup(nil, "a") },
	} {
		func() {
			defer func() {
				if got := fmt.Sprint(recover()); !strings.HasPrefix(got, "idempotency: "+text) {
					t.Errorf("panic %q, want %q", got, text)
				}
			}()
			mistake()
		}()
	}
	make1 := func(context.Context, *thing) (*thing, error) { return nil, nil }
	for what, call := range map[string]func() error{
		"store":    func() error { _, err := idempotency.Do(t.Context(), nil, method, "k", &thing{}, make1); return err },
		"request":  func() error { _, err := idempotency.Do(t.Context(), store, method, "k", nil, make1); return err },
		"function": func() error { _, err := idempotency.Do(t.Context(), store, method, "k", &thing{}, nil); return err },
		"tx":       func() error { _, err := idempotency.DoTx(t.Context(), store, method, "k", &thing{}, nil); return err },
	} {
		if err := call(); !errors.Is(err, postrider.InvalidArgument) {
			t.Errorf("%s: %v, want InvalidArgument", what, err)
		}
	}
}
