package postridertest_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

type order struct{ ID string }

func TestRecorderKeepsItsOwnCopy(t *testing.T) {
	t.Parallel()
	rec := &postridertest.Recorder{Source: "//shop/orders"}
	m := &postrider.Message{ID: "1", Type: "a", Extensions: postrider.Extensions{{Name: "x", Value: "1"}}, Data: []byte("data")}
	if err := rec.Publish(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	m.Data[0], m.Extensions[0].Value, m.ID = 'X', "2", "2"
	got := rec.Messages()
	if len(got) != 1 || got[0].ID != "1" || got[0].Source != "//shop/orders" || string(got[0].Data) != "data" || got[0].Extension("x") != "1" {
		t.Errorf("recorded %+v", got[0])
	}
	if rec.Reset(); len(rec.Messages()) != 0 || len(got) != 1 {
		t.Error("Reset did not forget, or took away what was handed out")
	}
}

func TestRecorderRefuses(t *testing.T) {
	t.Parallel()
	var rec postridertest.Recorder
	full := errors.New("full")
	rec.Fail = func(m *postrider.Message) error {
		if strings.HasPrefix(m.ID, "bad") {
			return full
		}
		return nil
	}
	good, bad, invalid := &postrider.Message{ID: "good", Type: "a"}, &postrider.Message{ID: "bad", Type: "a"}, &postrider.Message{ID: "x"}
	if err := rec.Publish(t.Context(), bad); !errors.Is(err, full) {
		t.Errorf("one refused message: %v", err)
	}
	err := rec.Publish(t.Context(), bad, good, invalid)
	errs := postrider.PublishErrors(err, 3)
	if !errors.Is(errs[0], full) || errs[1] != nil || !errors.Is(errs[2], postrider.InvalidArgument) {
		t.Errorf("three messages: %v", errs)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := rec.Publish(ctx, good); !errors.Is(err, postrider.Canceled) || !errors.Is(err, context.Canceled) {
		t.Errorf("with an ended context: %v", err)
	}
	if got := rec.Messages(); len(got) != 1 || got[0].ID != "good" || got[0].Source != "//postridertest" {
		t.Errorf("recorded %v", got)
	}
}

func TestEventsOfATopic(t *testing.T) {
	t.Parallel()
	var rec postridertest.Recorder
	placed, paid := postrider.NewTopic[order]("orders.placed.v1"), postrider.NewTopic[order]("orders.paid.v1")
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			if err := placed.Publish(t.Context(), &rec, &order{fmt.Sprint(i)}); err != nil {
				t.Error(err)
			}
			if err := paid.Publish(t.Context(), &rec, &order{"paid"}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	events, err := postridertest.Events(&rec, placed)
	seen := map[string]bool{}
	for _, e := range events {
		seen[e.Value.ID] = e.Type == "orders.placed.v1"
	}
	if err != nil || len(events) != 50 || len(seen) != 50 || seen["paid"] {
		t.Errorf("%d events of %d orders, %v", len(events), len(seen), err)
	}
	if err := rec.Publish(t.Context(), &postrider.Message{ID: "1", Type: "orders.paid.v1", Data: []byte("{")}); err != nil {
		t.Fatal(err)
	}
	if events, err := postridertest.Events(&rec, paid); !errors.Is(err, postrider.InvalidArgument) || len(events) != 50 {
		t.Errorf("with an undecodable event: %d events, %v", len(events), err)
	}
}

// A Recorder stands in for the bus or the outbox.
func ExampleRecorder() {
	placed := postrider.NewTopic[order]("orders.placed.v1", postrider.KeyBy(func(o *order) string { return o.ID }))
	place := func(ctx context.Context, p postrider.Publisher, id string) error { // the code under test
		return placed.Publish(ctx, p, &order{ID: id})
	}

	rec := &postridertest.Recorder{Source: "//shop/orders"}
	if err := place(context.Background(), rec, "o-17"); err != nil {
		fmt.Println(err)
	}

	events, err := postridertest.Events(rec, placed)
	for _, e := range events {
		fmt.Println(e.Type, e.Source, e.Key(), e.Value.ID)
	}
	fmt.Println(err)
	// Output:
	// orders.placed.v1 //shop/orders o-17 o-17
	// <nil>
}
