package postrider

import (
	"math"
	"time"
)

// RetryPolicy says how often and how fast something is tried again. The delay before attempt n+1 is drawn between zero
// and min(Max, Initial x Multiplier^(n-1)) (full jitter: Brooker, "Exponential Backoff And Jitter", 2015). The zero
// value is the default.
type RetryPolicy struct {
	// Attempts is how often it is tried in all, the first time included. Negative: without end. Default 5.
	Attempts int

	// Initial bounds the first delay. Default 200 ms.
	Initial time.Duration

	// Max bounds every delay. Default 30 s.
	Max time.Duration

	// Multiplier is the growth of the bound, at least 1. Default 2.
	Multiplier float64
}

// WithDefaults returns the policy with its zero fields filled in.
func (p RetryPolicy) WithDefaults() RetryPolicy {
	if p.Attempts == 0 {
		p.Attempts = 5
	}
	if p.Initial == 0 {
		p.Initial = 200 * time.Millisecond
	}
	if p.Max == 0 {
		p.Max = max(30*time.Second, p.Initial)
	}
	if p.Multiplier == 0 {
		p.Multiplier = 2
	}
	return p
}

// Validate names the first field that makes no sense.
func (p RetryPolicy) Validate() error {
	switch d := p.WithDefaults(); {
	case d.Initial < 0:
		return Errorf(InvalidArgument, "RetryPolicy.Initial is %v: want a positive duration", p.Initial)
	case d.Max < d.Initial:
		return Errorf(InvalidArgument, "RetryPolicy.Max is %v: want at least Initial, %v", p.Max, d.Initial)
	case d.Multiplier < 1 || math.IsNaN(d.Multiplier):
		return Errorf(InvalidArgument, "RetryPolicy.Multiplier is %v: want at least 1", p.Multiplier)
	default:
		return nil
	}
}

// Exhausted reports whether a failed attempt, counted from 1, was the last one.
func (p RetryPolicy) Exhausted(attempt int) bool {
	p = p.WithDefaults()
	return p.Attempts > 0 && attempt >= p.Attempts
}
