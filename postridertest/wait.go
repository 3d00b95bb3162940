package postridertest

import (
	"testing"
	"time"
)

const (
	// patience is how long [Eventually] waits. It is generous: only tests that fail wait for it.
	patience = 30 * time.Second
	// firstPoll and lastPoll are the waits between two looks, doubled each time.
	firstPoll, lastPoll = time.Millisecond, 50 * time.Millisecond
)

// Eventually waits until cond returns nil. It looks again and again, at once and then every few milliseconds; after 30 s it fails
// the test with cond's last error, which therefore should say what was seen and what was wanted. It is for the test's
// goroutine, and so is cond, which it runs there.
//
//	postridertest.Eventually(t, func() error {
//		if n := handled.Load(); n != 10 {
//			return fmt.Errorf("handled %d of 10", n)
//		}
//		return nil
//	})
func Eventually(t testing.TB, cond func() error) {
	t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for wait := firstPoll; ; wait = min(2*wait, lastPoll) {
		err := cond()
		if err == nil {
			return
		}
		next := time.NewTimer(wait)
		select {
		case <-next.C:
		case <-deadline.C:
			next.Stop()
			t.Fatalf("not within %v: %v", patience, err)
		}
	}
}
