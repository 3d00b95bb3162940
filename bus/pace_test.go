package bus

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestPacerSpacesTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		stop := make(chan struct{})
		p := pacer{interval: 100 * time.Millisecond}
		start := time.Now()
		for i := range 5 {
			if !p.wait(stop) {
				t.Fatal("stopped")
			}
			if took, want := time.Since(start), time.Duration(i)*p.interval; took != want {
				t.Errorf("turn %d came after %v, want %v", i, took, want)
			}
		}
		time.AfterFunc(10*time.Millisecond, func() { close(stop) })
		if p.wait(stop) {
			t.Error("a turn came after the stop")
		}
		all := pacer{interval: -1}
		start = time.Now()
		for range 3 {
			if !all.wait(nil) || time.Since(start) != 0 {
				t.Errorf("a turn without a rate came after %v", time.Since(start))
			}
		}
	})
}
