package postridertest_test

import (
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/postrider/postrider/postridertest"
)

func ExampleEventually() {
	t := new(testing.T) // the one that a test function gets

	var handled atomic.Int64
	go func() { // the service
		for range 3 {
			handled.Add(1)
		}
	}()

	postridertest.Eventually(t, func() error {
		if n := handled.Load(); n != 3 {
			return fmt.Errorf("handled %d of 3 orders", n)
		}
		return nil
	})
	fmt.Println("all handled")
	// Output: all handled
}
