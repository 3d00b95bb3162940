package postrider_test

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/postrider/postrider"
)

func TestRetryPolicyDefaults(t *testing.T) {
	t.Parallel()
	want := postrider.RetryPolicy{Attempts: 5, Initial: 200 * time.Millisecond, Max: 30 * time.Second, Multiplier: 2}
	if got := (postrider.RetryPolicy{}).WithDefaults(); got != want {
		t.Errorf("defaults %+v, want %+v", got, want)
	}
	if got := (postrider.RetryPolicy{Initial: time.Hour}).WithDefaults(); got.Max != time.Hour {
		t.Errorf("Max is %v below an Initial of an hour", got.Max)
	}
	own := postrider.RetryPolicy{Attempts: -1, Initial: 1, Max: 2, Multiplier: 3}
	if got := own.WithDefaults(); got != own {
		t.Errorf("the defaults changed %+v to %+v", own, got)
	}
}

func TestRetryPolicyValidate(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		policy postrider.RetryPolicy
		want   string // the field that the error names; empty: valid
	}{
		{postrider.RetryPolicy{}, ""},
		{postrider.RetryPolicy{Attempts: -1}, ""},
		{postrider.RetryPolicy{Attempts: 1, Initial: time.Hour, Multiplier: 1}, ""},
		{postrider.RetryPolicy{Multiplier: math.Inf(1)}, ""},
		{postrider.RetryPolicy{Initial: -1}, "RetryPolicy.Initial"},
		{postrider.RetryPolicy{Max: -1}, "RetryPolicy.Max"},
		{postrider.RetryPolicy{Max: time.Millisecond}, "RetryPolicy.Max"},
		{postrider.RetryPolicy{Initial: 2, Max: 1}, "RetryPolicy.Max"},
		{postrider.RetryPolicy{Multiplier: 0.9}, "RetryPolicy.Multiplier"},
		{postrider.RetryPolicy{Multiplier: -2}, "RetryPolicy.Multiplier"},
		{postrider.RetryPolicy{Multiplier: math.NaN()}, "RetryPolicy.Multiplier"},
	} {
		err := tt.policy.Validate()
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%+v: %v, want nil", tt.policy, err)
		case tt.want != "" && (!errors.Is(err, postrider.InvalidArgument) || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%+v: %v, want InvalidArgument that names %s", tt.policy, err, tt.want)
		}
	}
}

func TestRetryPolicyExhausted(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		attempts, attempt int
		want              bool
	}{{0, 4, false}, {0, 5, true}, {1, 1, true}, {3, 2, false}, {3, 3, true}, {3, 9, true}, {-1, math.MaxInt, false}} {
		if got := (postrider.RetryPolicy{Attempts: tt.attempts}).Exhausted(tt.attempt); got != tt.want {
			t.Errorf("%d attempts, the %dth failed: exhausted %v", tt.attempts, tt.attempt, got)
		}
	}
}
