package postrider

import (
	"context"
	"errors"
	"slices"
)

// Runner is a part of a service that lives: a bus, an rpc server, a relay, a saga engine. Run blocks; when ctx ends it
// takes no new work, finishes what it has and returns nil.
type Runner interface {
	Run(ctx context.Context) error
}

// Run runs the parts of a service until ctx ends or one of them fails, then drains them one after the other in the
// given order, so that a part which others hand work to comes after them: bus and server first, then the relay that
// sends what their handlers committed. It returns when all have returned, with their errors joined; nil means that the
// work in hand is done. A nil part is InvalidArgument, and nothing runs.
func Run(ctx context.Context, parts ...Runner) error {
	if i := slices.Index(parts, nil); i >= 0 {
		return Errorf(InvalidArgument, "run: part %d of %d is nil", i+1, len(parts))
	}
	type part struct {
		stop context.CancelFunc
		done chan error
	}
	failed := make(chan struct{}, len(parts))
	running := make([]part, len(parts))
	for i, r := range parts {
		partCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
		running[i] = part{stop, make(chan error, 1)}
		go func() {
			err := r.Run(partCtx)
			running[i].done <- err
			if err != nil {
				failed <- struct{}{}
			}
		}()
	}
	select {
	case <-ctx.Done():
	case <-failed:
	}
	var errs []error
	for _, p := range running {
		p.stop()
		errs = append(errs, <-p.done)
	}
	return errors.Join(errs...)
}
