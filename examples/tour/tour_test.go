package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
	"github.com/postrider/postrider/postridertest/membus"
)

func TestMain(m *testing.M) { os.Exit(postridertest.Main(m)) }

func TestTour(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var out bytes.Buffer
	if err := tour(ctx, &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"event: mail to Åse", "call: chai costs 1800", `there is no "gold" in the catalog (NOT_FOUND)`,
		"saga: o-2 is completed", "saga: o-3 is compensated", "the card of Bob is refused",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the tour did not print %q:\n%s", want, out.String())
		}
	}
}

func TestConfirmation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // retries and delays pass at once
		b, err := new(membus.Broker).New(bus.Config{
			Source: "//test", Streams: []bus.Stream{{Name: "ORDERS", Topics: []string{"orders.>"}}},
		})
		if err != nil {
			t.Fatal(err)
		}
		mailed := make(chan string, 1)
		if err := subscribe(b, mailed); err != nil { // the code under test
			t.Fatal(err)
		}
		go func() { _ = b.Run(t.Context()) }()
		<-b.Started()
		if err := OrderPlaced.Publish(t.Context(), b, &Order{ID: "o-1", Customer: "Åse", Cents: 1800}); err != nil {
			t.Fatal(err)
		}
		if got := <-mailed; got != "Åse" {
			t.Errorf("mail to %s, want Åse", got)
		}
	})
}

// TestReadmeQuotesTheTour holds every piece of Go in the README to a file that is compiled and run here.
func TestReadmeQuotesTheTour(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile(filepath.Join("..", "..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	var code strings.Builder
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		code.Write(b)
	}
	pieces := strings.Split(string(readme), "```go\n")[1:]
	if len(pieces) < 5 {
		t.Errorf("the README has %d pieces of Go, want contract, handler, transaction, call and saga", len(pieces))
	}
	for _, p := range pieces {
		p, _, _ = strings.Cut(p, "```")
		if !strings.Contains(code.String(), p) {
			t.Errorf("the README shows what is in no file of the tour:\n%s", p)
		}
	}
}
