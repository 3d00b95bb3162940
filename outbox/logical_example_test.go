package outbox_test

import (
	"fmt"

	"github.com/postrider/postrider/outbox"
)

// The server pushes what is committed where it can; where it cannot, the tables are read.
func ExampleLogicalConfig() {
	ob, err := outbox.New(outbox.Config{Source: "//shop/orders"})
	if err != nil {
		panic(err)
	}
	_, err = outbox.NewRelay(nil, printer{}, outbox.RelayConfig{
		Outbox:  ob,
		Logical: outbox.LogicalConfig{Mode: outbox.LogicalAuto, MaxRetained: 256 << 20},
	})
	fmt.Println(err)

	_, err = outbox.NewRelay(nil, printer{}, outbox.RelayConfig{
		Outbox:  ob,
		Logical: outbox.LogicalConfig{Mode: outbox.LogicalAuto, MaxRetained: 1000},
	})
	fmt.Println(err)
	// Output:
	// <nil>
	// outbox: LogicalConfig.MaxRetained is 1000: want at least 1 MiB (INVALID_ARGUMENT)
}
