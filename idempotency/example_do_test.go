package idempotency_test

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/idempotency"
)

type Charge struct {
	Account string
	Cents   int64
}

type Receipt struct{ Number string }

// A payment at a provider, asked for twice with one key.
func ExampleDo() {
	ctx := context.Background()
	pool, done := connect(ctx, "")
	defer done()
	store, err := idempotency.New(pool, idempotency.Config{})
	if err != nil {
		log.Fatal(err)
	}

	charge := postrider.NewMethod[Charge, Receipt]("payments.v1/Charge")
	pay := func(ctx context.Context, req *Charge) (*Receipt, error) {
		fmt.Println("  the provider takes", req.Cents)
		return &Receipt{Number: "r-1"}, nil
	}
	for _, cents := range []int64{1999, 1999, 2500} {
		receipt, err := idempotency.Do(ctx, store, charge, "order-17", &Charge{"ada", cents}, pay)
		if err != nil {
			fmt.Println(postrider.CodeOf(err))
			continue
		}
		fmt.Println(receipt.Number)
	}
	// Output:
	//   the provider takes 1999
	// r-1
	// r-1
	// ALREADY_EXISTS
}

// A client that did not hear the answer repeats its request.
func ExampleHTTP() {
	pool, done := connect(context.Background(), "")
	defer done()
	store, err := idempotency.New(pool, idempotency.Config{})
	if err != nil {
		log.Fatal(err)
	}
	tenant := func(r *http.Request) string { return r.Header.Get("Tenant") } // a service takes what authentication found
	once, err := idempotency.HTTP(store, tenant, idempotency.HTTPConfig{Required: true})
	if err != nil {
		log.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("POST /charges", once(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Println("  charged")
		w.WriteHeader(http.StatusCreated)
		fmt.Fprint(w, `{"number":"r-1"}`)
	})))

	for _, key := range []string{`"8e03978e"`, `"8e03978e"`, ""} {
		req := httptest.NewRequest(http.MethodPost, "/charges", strings.NewReader(`{"cents":1999}`))
		if key != "" {
			req.Header.Set("Idempotency-Key", key)
		}
		res := httptest.NewRecorder()
		mux.ServeHTTP(res, req)
		fmt.Println(res.Code, res.Header().Get("Idempotent-Replayed"), res.Body)
	}
	// Output:
	//   charged
	// 201  {"number":"r-1"}
	// 201 true {"number":"r-1"}
	// 400  {"title":"Idempotency-Key is missing","status":400,"detail":"The Idempotency-Key is needed for this operation: a string such as \"8e03978e-40d5-43dd-bc93-6894a57f9324\"."}
}
