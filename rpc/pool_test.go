package rpc

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// Twice the capacity with deadlines of 100 ms, then half of it: what can be in time is in time, work for nobody is not
// done, and the overload is over as soon as the load is.
func TestPoolOverload(t *testing.T) {
	t.Parallel()
	for name, workers := range map[string]int{"1 worker": 1, "16 workers": 16, "64 workers": 64} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				const service, deadline, overload = time.Millisecond, 100 * time.Millisecond, 4 * time.Second
				var ran, inTime atomic.Int64
				lane := make(chan struct{}, 1) // what all handlers share: it has room for one
				p := newPool(workers, 1024, func(c *inbound) {
					if c.late(context.Background()) != nil {
						return
					}
					lane <- struct{}{}
					<-time.After(service)
					<-lane
					ran.Add(1)
					if time.Now().Before(c.expires) {
						inTime.Add(1)
					}
				})
				offer := func(interval, total time.Duration) (offered int64) {
					for range total / interval {
						now := time.Now()
						_ = p.submit(&inbound{arrived: now, expires: now.Add(deadline)})
						offered++
						<-time.After(interval)
					}
					return offered
				}
				offer(service/2, overload)
				<-time.After(deadline)
				capacity, good := int64(overload/service), inTime.Swap(0)
				late := ran.Load() - good
				t.Logf("overload: %d of %d in time, %d for nobody", good, capacity, late)
				if good < capacity*9/10 {
					t.Errorf("%d calls in time, the capacity is %d", good, capacity)
				}
				if late > capacity*3/100 {
					t.Errorf("the handler ran %d times for nobody", late)
				}

				offered := offer(2*service, time.Second)
				<-time.After(deadline)
				if n := inTime.Load(); n < offered-1 {
					t.Errorf("after the overload %d of %d calls were in time", n, offered)
				}
				p.drain()
			})
		})
	}
}

// Calls that take most of their time are no overload as long as a worker is free.
func TestPoolLongCalls(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPool(2, 10, func(*inbound) { <-time.After(90 * time.Millisecond) })
		for round := range 20 {
			for range 2 {
				now := time.Now()
				if err := p.submit(&inbound{arrived: now, expires: now.Add(100 * time.Millisecond)}); err != nil {
					t.Error(err)
				}
			}
			synctest.Wait()
			now := time.Now()
			if round > 0 && p.submit(&inbound{arrived: now, expires: now.Add(100 * time.Millisecond)}) == nil {
				t.Error("a call that cannot be in time was accepted")
			}
			<-time.After(95 * time.Millisecond)
		}
		p.drain()
		if err := p.submit(&inbound{}); err == nil {
			t.Error("a drained pool accepts a call")
		}
	})
}
