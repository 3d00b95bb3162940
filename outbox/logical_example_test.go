package outbox_test

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider/outbox"
)

// The server pushes what is committed where it can; where it cannot, the tables are read.
func ExampleLogicalConfig() {
	pool, err := pgxpool.New(context.Background(), "postgres://relay@localhost/shop") // which connects when it is first used
	if err != nil {
		panic(err)
	}
	defer pool.Close()
	ob, err := outbox.New(outbox.Config{Source: "//shop/orders"})
	if err != nil {
		panic(err)
	}
	_, err = outbox.NewRelay(pool, printer{}, outbox.RelayConfig{
		Outbox:  ob,
		Logical: outbox.LogicalConfig{Mode: outbox.LogicalAuto, MaxRetained: 256 << 20},
	})
	fmt.Println(err)

	_, err = outbox.NewRelay(pool, printer{}, outbox.RelayConfig{
		Outbox:  ob,
		Logical: outbox.LogicalConfig{Mode: outbox.LogicalAuto, MaxRetained: 1000},
	})
	fmt.Println(err)
	// Output:
	// <nil>
	// outbox: LogicalConfig.MaxRetained is 1000: want at least 1 MiB (INVALID_ARGUMENT)
}
