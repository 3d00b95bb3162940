package main

import (
	"sync"
	"testing"
	"time"
)

// BenchmarkSleepers is the bound of slow-16: its handlers without any messages.
func BenchmarkSleepers(b *testing.B) {
	work := make(chan struct{}, 1024)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range work {
				time.Sleep(slowTime)
			}
		})
	}
	began := time.Now()
	for range b.N {
		work <- struct{}{}
	}
	close(work)
	wg.Wait()
	b.ReportMetric(float64(b.N)/time.Since(began).Seconds(), "handled/s")
}
