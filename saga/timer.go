package saga

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/backoff"
)

// parkAfter is how long a saga whose plan this engine does not know is left to others, say during a rolling upgrade,
// before it counts as one that nobody runs.
const parkAfter = 10 * time.Second

// postponed is the wait after a timer's transition that failed.
const postponed = time.Second

// noteTimeout bounds the statement that puts a failed timer off.
const noteTimeout = 2 * time.Second

// Run fires due timers until ctx ends, finishes those in hand and returns nil. It outlives trouble with the database; only
// missing tables are an error, FailedPrecondition. Replies are handled by [Engine.Handler], with or without it.
func (e *Engine) Run(ctx context.Context) error {
	failures := 0
	for ctx.Err() == nil {
		wait, err := e.poll(ctx)
		switch {
		case err == nil:
			failures = 0
		case withoutTables(err):
			return e.trouble("saga: run "+e.cfg.Name, err)
		case ctx.Err() == nil:
			failures++
			wait = backoff.Delay(postrider.RetryPolicy{Max: 5 * time.Second}, failures)
			e.log.WarnContext(ctx, "saga: timers are not fired", slog.String("engine", e.cfg.Name), slog.Any("err", err))
		}
		e.timers.sleep(ctx, wait)
	}
	return nil
}

// poll fires what is due and returns how long to wait for the next.
func (e *Engine) poll(ctx context.Context) (time.Duration, error) {
	var seconds *float64
	if err := e.pool.QueryRow(ctx, e.sql.nextWake, e.cfg.Name, e.hashes).Scan(&seconds); err != nil {
		return 0, err
	}
	wait := e.cfg.PollInterval
	if seconds != nil {
		wait = min(wait, time.Duration(*seconds*float64(time.Second)))
	}
	if wait > 0 {
		return wait, e.park(ctx)
	}
	errs := make([]error, e.cfg.Workers)
	fired := make([]bool, e.cfg.Workers)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { fired[i], errs[i] = e.fire(ctx) })
	}
	wg.Wait()
	if !slices.Contains(fired, true) { // another instance holds what is due
		wait = min(20*time.Millisecond, e.cfg.PollInterval)
	}
	return max(wait, 0), errors.Join(errs...)
}

// fire handles due timers one after the other until there are none or ctx ends. A saga whose transition fails is tried
// again later, so that it holds up no other.
func (e *Engine) fire(ctx context.Context) (fired bool, err error) {
	for ctx.Err() == nil {
		again, err := e.fireOne(context.WithoutCancel(ctx))
		if err != nil || !again {
			return fired, err
		}
		fired = true
	}
	return fired, nil
}

func (e *Engine) fireOne(ctx context.Context) (bool, error) {
	work, cancel := context.WithTimeout(ctx, e.cfg.DrainTimeout)
	defer cancel()
	saga, err := e.transact(work, func(*run) (event, error) { return event{kind: woken}, nil }, e.sql.claim, e.cfg.Name, e.hashes)
	if err == nil || saga == nil {
		return saga != nil, err
	}
	e.log.WarnContext(ctx, "saga: a timer's transition failed", slog.String("saga", saga.id), slog.String("plan", saga.plan), slog.Any("err", err))
	note, done := context.WithTimeout(ctx, noteTimeout) // the transition may have used up its own time
	defer done()
	_, err = e.pool.Exec(note, e.sql.postpone, saga.id, saga.epoch, postponed)
	return true, err
}

// park marks the sagas that nobody runs.
func (e *Engine) park(ctx context.Context) error {
	rows, err := e.pool.Query(ctx, e.sql.park, e.cfg.Name, e.hashes, "no engine has its plan", parkAfter)
	if err != nil {
		return err
	}
	var id, plan, hash string
	var version int
	_, err = pgx.ForEachRow(rows, []any{&id, &plan, &version, &hash}, func() error {
		e.log.WarnContext(ctx, "saga: parked: give the engine its plan and it goes on", slog.String("saga", id),
			slog.String("plan", fmt.Sprintf("%s version %d hash %s", plan, version, hash)))
		return nil
	})
	return err
}

// sleeper is the wait for the next timer, cut short when an earlier one is set.
type sleeper struct {
	mu    sync.Mutex
	until time.Time     // zero while nobody sleeps
	poke  chan struct{} // holds one
}

// sleep waits for d, for an earlier timer or for the end of ctx.
func (s *sleeper) sleep(ctx context.Context, d time.Duration) {
	s.set(time.Now().Add(d))
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-s.poke:
	case <-ctx.Done():
	}
	s.set(time.Time{})
}

func (s *sleeper) set(until time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.until = until
}

// earlier tells that a timer is due in d. While nobody sleeps it pokes too: the next sleep may have been measured already.
func (s *sleeper) earlier(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.until.IsZero() || time.Now().Add(d).Before(s.until) {
		select {
		case s.poke <- struct{}{}:
		default:
		}
	}
}

// waiters are those who wait for the end of a saga in this process.
type waiters struct {
	mu sync.Mutex
	of map[string][]chan struct{}
}

func (w *waiters) add(id string) chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.of == nil {
		w.of = make(map[string][]chan struct{})
	}
	ch := make(chan struct{}, 1)
	w.of[id] = append(w.of[id], ch)
	return ch
}

func (w *waiters) remove(id string, ch chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.of[id] = slices.DeleteFunc(w.of[id], func(c chan struct{}) bool { return c == ch })
	if len(w.of[id]) == 0 {
		delete(w.of, id)
	}
}

func (w *waiters) notify(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, ch := range w.of[id] {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
}
