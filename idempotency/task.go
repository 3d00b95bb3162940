package idempotency

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/backoff"
)

const (
	defaultLease = 10 * time.Second

	// minLease is what the stores can do: NATS counts seconds.
	minLease = time.Second

	// settleTimeout bounds each write that follows a function, whose caller may be gone, and settleTries how many of them are waited
	// for.
	settleTimeout = 5 * time.Second
	settleTries   = 3

	// defaultAskAgain is what a caller is told whose key is in use. How long the work still takes nobody knows.
	defaultAskAgain = time.Second
)

// polling is how a caller waits for another one.
var polling = postrider.RetryPolicy{Initial: 10 * time.Millisecond, Multiplier: 2, Max: 500 * time.Millisecond}

// task is a function that is to run once under a key.
//
//	free --Claim--> leased --Complete--> done
//	 ^                | ^ '--Renew--.
//	 '----Release-----' '-----------'
//
// When a lease ends without either, the next claim takes the key over with a higher fence (Gray and Cheriton, "Leases", 1989).
type task struct {
	records Records
	op      string
	key     string
	request []byte // its fingerprint
	lease   time.Duration

	wait     bool          // for another who has the key
	askAgain time.Duration // what one is told who does not wait
	detached bool          // the function's context does not end with the caller's
}

// do runs the function, or returns the outcome that it had before. An error of the function means: no outcome.
func (t *task) do(ctx context.Context, run func(context.Context) (Outcome, error)) (o Outcome, repeated bool, err error) {
	if t.lease < minLease {
		return o, false, postrider.Errorf(postrider.InvalidArgument, "%s: the lease is %v: want at least %v", t.op, t.lease, minLease)
	}
	owner := postrider.NewID()
	for attempt := 1; ; attempt++ {
		c, began, err := t.claim(ctx, owner)
		switch {
		case err != nil:
			return o, false, t.unclaimed(ctx, err)
		case c.Fence != 0:
			o, err = t.own(ctx, c.Fence, began, run)
			return o, false, err
		case !bytes.Equal(c.Request, t.request):
			return o, false, &postrider.Error{
				Code: postrider.AlreadyExists, Op: t.op, Unprocessed: true,
				Msg: "the idempotency key was used for another request: use a new key for each request",
			}
		case c.Outcome != nil:
			return *c.Outcome, true, nil
		case !t.wait:
			return o, false, t.busy(nil)
		}
		if err := backoff.Wait(ctx, polling, attempt); err != nil {
			return o, false, t.busy(err)
		}
	}
}

// claim claims the key. If an answer is lost the key may be ours, so that it asks again before it leaves the key to the end of its lease.
func (t *task) claim(ctx context.Context, owner string) (c Claim, began time.Time, err error) {
	for attempt := 1; ; attempt++ {
		began = time.Now()
		c, err = t.records.Claim(ctx, t.key, owner, t.request, t.lease)
		if err == nil || attempt == settleTries || !postrider.Retryable(err) || backoff.Wait(ctx, polling, attempt) != nil {
			return c, began, err
		}
	}
}

// busy makes the error of a caller whose key is in use. cause is nil, or why it does not wait any longer.
func (t *task) busy(cause error) error {
	e := &postrider.Error{
		Code: postrider.Aborted, Op: t.op, Err: cause, RetryAfter: cmp.Or(t.askAgain, defaultAskAgain),
		Msg: "a request with the same idempotency key is being handled right now",
	}
	if cause != nil {
		e.Code, e.RetryAfter = postrider.CodeOf(cause), 0
	}
	return e
}

// unclaimed makes the error of a failed claim. The function has not run, now.
func (t *task) unclaimed(ctx context.Context, err error) error {
	code := postrider.CodeOf(err)
	if ctx.Err() != nil {
		code = postrider.CodeOf(ctx.Err())
	}
	return &postrider.Error{Code: code, Op: t.op, Unprocessed: true, Err: err}
}

// own runs the function as the owner of its key.
func (t *task) own(ctx context.Context, fence int64, began time.Time, run func(context.Context) (Outcome, error)) (o Outcome, err error) {
	after := context.WithoutCancel(ctx)
	if t.detached {
		ctx = after
	}
	work, lose := context.WithCancelCause(context.WithValue(ctx, fenceKey{}, fence))
	renewing, stop := context.WithCancel(after)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		t.renew(renewing, fence, began, lose)
	}()
	completed := false
	defer func() { // also when the function panics
		stop()
		<-stopped
		lose(nil)
		if !completed {
			t.release(after, fence)
		}
	}()

	o, err = run(work)
	if err != nil {
		if cause := context.Cause(work); errors.Is(cause, ErrLost) {
			err = t.lost(errors.Join(cause, err))
		}
		return o, err
	}
	completed = true // from now on the key must not be free: the effect is there
	return o, t.complete(after, fence, o)
}

// renew renews the lease until ctx ends. When it is lost, or may be, it says so. The time is counted by this process's own clock from
// before each request, so that the lease ends here before it ends in the store.
func (t *task) renew(ctx context.Context, fence int64, began time.Time, lose context.CancelCauseFunc) {
	ends := began.Add(t.lease)
	timer := time.NewTimer(t.lease / 3)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		sent := time.Now()
		request, cancel := context.WithDeadline(ctx, ends)
		err := t.records.Renew(request, t.key, fence, t.lease)
		cancel()
		again := t.lease / 3
		if err == nil {
			ends = sent.Add(t.lease)
		} else {
			again = min(t.lease/10, time.Until(ends))
		}
		if errors.Is(err, ErrLost) || again <= 0 {
			lose(ErrLost)
			return
		}
		timer.Reset(again)
	}
}

// complete writes the outcome down. The lease is still being renewed.
func (t *task) complete(ctx context.Context, fence int64, o Outcome) error {
	ctx, cancel := context.WithTimeout(ctx, settleTries*settleTimeout)
	defer cancel()
	for attempt := 1; ; attempt++ {
		request, cancel := context.WithTimeout(ctx, settleTimeout)
		err := t.records.Complete(request, t.key, fence, o)
		cancel()
		switch {
		case err == nil:
			return nil
		case errors.Is(err, ErrLost):
			return t.lost(err)
		}
		if !postrider.Retryable(err) || backoff.Wait(ctx, polling, attempt) != nil {
			code := postrider.CodeOf(err)
			if ctx.Err() != nil {
				code = postrider.Unavailable
			}
			return &postrider.Error{Code: code, Op: t.op, Err: err, Msg: "it ran, but its outcome could not be written down: " + err.Error()}
		}
	}
}

func (t *task) lost(err error) error {
	return &postrider.Error{
		Code: postrider.Aborted, Op: t.op, Err: err, RetryAfter: defaultAskAgain,
		Msg: "the lease of the key was lost to another caller: the outcome of this run is not written down, ask again for that of the other",
	}
}

// release gives the key back. If that fails its lease ends by itself.
func (t *task) release(ctx context.Context, fence int64) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	_ = t.records.Release(ctx, t.key, fence)
}
