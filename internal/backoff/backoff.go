// Package backoff computes the waits of a [postrider.RetryPolicy]. The randomisation is that of cenkalti/backoff.
package backoff

import (
	"context"
	"math"
	"time"

	"github.com/cenkalti/backoff/v4"

	"github.com/postrider/postrider"
)

// Delay returns how long to wait after a failed attempt, counted from 1: full jitter below an exponential bound.
func Delay(p postrider.RetryPolicy, attempt int) time.Duration {
	bound := Bound(p, attempt)
	b := backoff.NewExponentialBackOff(
		backoff.WithInitialInterval(bound/2), // randomised by its whole size: 0 to bound
		backoff.WithRandomizationFactor(1),
		backoff.WithMaxElapsedTime(0),
		backoff.WithMaxInterval(max(p.Max, bound)),
	)
	return b.NextBackOff()
}

// Bound returns the longest wait after a failed attempt, counted from 1.
func Bound(p postrider.RetryPolicy, attempt int) time.Duration {
	p = p.WithDefaults()
	return time.Duration(min(float64(p.Initial)*math.Pow(p.Multiplier, float64(max(attempt, 1)-1)), float64(p.Max)))
}

// Next decides what follows a failed attempt, counted from 1: the wait before the next one, or false when the policy is
// exhausted or the error says that trying again is useless. A delay that the error asks for is kept.
func Next(p postrider.RetryPolicy, attempt int, err error) (time.Duration, bool) {
	if p.Exhausted(attempt) || !postrider.Retryable(err) {
		return 0, false
	}
	if d, ok := postrider.RetryDelay(err); ok {
		return d, true
	}
	return Delay(p, attempt), true
}

// Wait waits after a failed attempt, or returns the context's error when it ends first.
func Wait(ctx context.Context, p postrider.RetryPolicy, attempt int) error {
	timer := time.NewTimer(Delay(p, attempt))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
