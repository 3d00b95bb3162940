package postridertest

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// Main runs the tests of a package, ends the servers they shared and fails if goroutines are left over. It returns the exit
// code:
//
//	func TestMain(m *testing.M) { os.Exit(postridertest.Main(m)) }
//
// Without it the servers end too, with the process; nobody looks for goroutines then.
func Main(m *testing.M) int {
	before := goleak.IgnoreCurrent()
	code := m.Run()
	if err := shared.close(); err != nil {
		fmt.Fprintln(os.Stderr, "postridertest: close the shared PostgreSQL:", err)
		code = max(code, 1)
	}
	if code != 0 {
		return code // a failed test may leave anything: its own report matters
	}
	// The client library's async publisher (object stores use it) waits for ever if its connection is closed as it begins.
	library := goleak.IgnoreTopFunction("github.com/nats-io/nats.go/jetstream.(*jetStream).resetPendingAcksOnReconnect")
	if err := goleak.Find(before, library); err != nil {
		fmt.Fprintln(os.Stderr, "postridertest: goroutines are left over after all tests:", err)
		return 1
	}
	return 0
}

// missing ends a test that needs a server that cannot be had: skipped on a laptop, failed where nobody would notice the skip.
func missing(t testing.TB, err error) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(err)
	}
	t.Skip(err)
}
