package backoff_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/backoff"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Full jitter: the waits of an attempt fill the whole range from zero to its bound, and never leave it.
func TestDelayIsFullJitter(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		policy  postrider.RetryPolicy
		attempt int
		bound   time.Duration
	}{
		{postrider.RetryPolicy{}, 1, 200 * time.Millisecond},
		{postrider.RetryPolicy{}, 0, 200 * time.Millisecond},
		{postrider.RetryPolicy{}, 2, 400 * time.Millisecond},
		{postrider.RetryPolicy{}, 8, 25600 * time.Millisecond},
		{postrider.RetryPolicy{}, 9, 30 * time.Second},
		{postrider.RetryPolicy{}, 1000, 30 * time.Second},
		{postrider.RetryPolicy{}, math.MaxInt, 30 * time.Second},
		{postrider.RetryPolicy{Initial: time.Second, Multiplier: 1.5}, 2, 1500 * time.Millisecond},
		{postrider.RetryPolicy{Initial: time.Second, Multiplier: 1.5}, 4, 3375 * time.Millisecond},
		{postrider.RetryPolicy{Initial: time.Second, Multiplier: 1.5, Max: 2 * time.Second}, 4, 2 * time.Second},
		{postrider.RetryPolicy{Initial: time.Second, Multiplier: 1}, 50, time.Second},
		{postrider.RetryPolicy{Initial: time.Second, Multiplier: math.Inf(1), Max: time.Minute}, 2, time.Minute},
		{postrider.RetryPolicy{Initial: 1}, 1, 1},
	} {
		t.Run(fmt.Sprintf("%+v attempt %d", tt.policy, tt.attempt), func(t *testing.T) {
			t.Parallel()
			if err := tt.policy.Validate(); err != nil {
				t.Fatal(err)
			}
			const draws = 4000
			var tenths [10]int
			var sum time.Duration
			for range draws {
				d := backoff.Delay(tt.policy, tt.attempt)
				if d < 0 || d > tt.bound {
					t.Fatalf("a wait of %v, want 0 to %v", d, tt.bound)
				}
				tenths[min(9, int(10*float64(d)/float64(tt.bound)))]++
				sum += d / draws
			}
			if tt.bound < time.Millisecond {
				return // too coarse to be even
			}
			for i, n := range tenths { // expected 400, standard deviation 19
				if n < 250 || n > 550 {
					t.Errorf("%d of %d waits are in tenth %d of the range: %v", n, draws, i, tenths)
				}
			}
			if mean := float64(sum) / float64(tt.bound); mean < 0.45 || mean > 0.55 {
				t.Errorf("the mean is %.2f of the bound, want 0.5", mean)
			}
		})
	}
}

func TestNext(t *testing.T) {
	t.Parallel()
	refused := postrider.Errorf(postrider.NotFound, "no such order")
	busy := &postrider.Error{Code: postrider.Unavailable, RetryAfter: 7 * time.Second}
	for name, tt := range map[string]struct {
		policy   postrider.RetryPolicy
		attempt  int
		err      error
		min, max time.Duration
		ok       bool
	}{
		"first failure":                {postrider.RetryPolicy{}, 1, io.EOF, 0, 200 * time.Millisecond, true},
		"the last but one":             {postrider.RetryPolicy{}, 4, io.EOF, 0, 1600 * time.Millisecond, true},
		"the last":                     {postrider.RetryPolicy{}, 5, io.EOF, 0, 0, false},
		"one attempt only":             {postrider.RetryPolicy{Attempts: 1}, 1, io.EOF, 0, 0, false},
		"without end":                  {postrider.RetryPolicy{Attempts: -1}, 1 << 40, io.EOF, 0, 30 * time.Second, true},
		"an answer, not weather":       {postrider.RetryPolicy{Attempts: -1}, 1, refused, 0, 0, false},
		"permanent":                    {postrider.RetryPolicy{Attempts: -1}, 1, postrider.Permanent(io.EOF), 0, 0, false},
		"the handler's own delay":      {postrider.RetryPolicy{}, 1, postrider.RetryAfter(time.Hour, io.EOF), time.Hour, time.Hour, true},
		"the other side's delay":       {postrider.RetryPolicy{}, 1, busy, 7 * time.Second, 7 * time.Second, true},
		"a delay counts as an attempt": {postrider.RetryPolicy{}, 5, postrider.RetryAfter(time.Hour, io.EOF), 0, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, ok := backoff.Next(tt.policy, tt.attempt, tt.err)
			if ok != tt.ok || d < tt.min || d > tt.max {
				t.Errorf("Next is %v, %v, want %v to %v, %v", d, ok, tt.min, tt.max, tt.ok)
			}
		})
	}
}

func TestWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		policy := postrider.RetryPolicy{Initial: time.Hour, Max: time.Hour}
		begin := time.Now()
		if err := backoff.Wait(t.Context(), policy, 1); err != nil || time.Since(begin) > time.Hour {
			t.Errorf("waited %v, %v", time.Since(begin), err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		begin = time.Now()
		if err := backoff.Wait(ctx, policy, 1); !errors.Is(err, context.Canceled) || time.Since(begin) != 0 {
			t.Errorf("with an ended context: %v after %v", err, time.Since(begin))
		}
	})
}

func BenchmarkDelay(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		backoff.Delay(postrider.RetryPolicy{}, 3)
	}
}

func ExampleNext() {
	policy := postrider.RetryPolicy{Attempts: 3}
	wait, again := backoff.Next(policy, 1, postrider.RetryAfter(time.Second, io.ErrUnexpectedEOF))
	fmt.Println(wait, again)
	_, again = backoff.Next(policy, 3, io.ErrUnexpectedEOF)
	fmt.Println(again)
	// Output:
	// 1s true
	// false
}
