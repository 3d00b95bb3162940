package idempotency_test

import (
	"context"
	"fmt"
	"log"

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
