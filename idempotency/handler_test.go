package idempotency

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
)

func TestEffectOnceUnderConcurrentDuplicates(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.store(Config{LockTimeout: -1})
	h := b.writer(s, "billing")
	const copies, messages = 16, 25
	now := time.Now()
	errs := make([]error, copies)
	var wg sync.WaitGroup
	for c := range copies {
		wg.Go(func() {
			for i := range messages {
				m := b.event(fmt.Sprintf("m-%d", i), now.Add(time.Duration(i)*time.Millisecond))
				errs[c] = errors.Join(errs[c], handle(t, h, m))
			}
		})
	}
	wg.Wait()
	must(t, errors.Join(errs...))
	for i := range messages {
		b.wantEffects(fmt.Sprintf("billing m-%d", i), 1)
	}
	if got, want := s.Stats(), (Stats{Handled: messages, Duplicates: (copies - 1) * messages}); got != want {
		t.Fatalf("stats %+v, want %+v", got, want)
	}
}

func TestDuplicateAfterRestartAndPerConsumer(t *testing.T) {
	t.Parallel()
	b := setup(t)
	m := b.event("m-1", time.Now())
	must(t, handle(t, b.writer(b.store(Config{}), "billing"), m))

	restarted := b.store(Config{})
	must(t, handle(t, b.writer(restarted, "billing"), m.Clone()))
	must(t, handle(t, b.writer(restarted, "mailer"), m))
	other := m.Clone()
	other.Source = "//test/other"
	must(t, handle(t, b.writer(restarted, "mailer"), other)) // the same id of another source is another message
	b.wantEffects("billing m-1", 1)
	b.wantEffects("mailer m-1", 2)
}

func TestErrorRollsBackAndRunsAgain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	fail := errors.New("weather")
	for name, fn := range map[string]func() error{
		"error":     func() error { return fail },
		"permanent": func() error { return postrider.Permanent(fail) },
		"panic":     func() error { panic(fail) },
	} {
		t.Run(name, func(t *testing.T) {
			first := true
			h := Handler(b.store(Config{}), "billing", b.placed, func(ctx context.Context, tx pgx.Tx, e postrider.Event[order]) error {
				if err := write(ctx, tx, e.ID); err != nil || !first {
					return err
				}
				first = false
				return fn()
			})
			m := b.event(name, time.Now())
			if err := handle(t, h, m); !errors.Is(err, fail) {
				t.Fatalf("error %v, want %v", err, fail)
			}
			b.wantEffects(name, 0)
			must(t, handle(t, h, m))
			b.wantEffects(name, 1)
		})
	}
	if n := b.pool.Stat().AcquiredConns(); n != 0 {
		t.Fatalf("%d connections are not given back", n)
	}
}

func TestSecondCopyIsDelayedByTheLockTimeout(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.store(Config{LockTimeout: 50 * time.Millisecond})
	running, finish := make(chan struct{}), make(chan struct{})
	proceed := sync.OnceFunc(func() { close(finish) })
	defer proceed() // or a failed test would never end
	h := Handler(s, "billing", b.placed, func(ctx context.Context, tx pgx.Tx, e postrider.Event[order]) error {
		close(running)
		<-finish
		return write(ctx, tx, e.ID)
	})
	m := b.event("m-1", time.Now())
	first := make(chan error, 1)
	go func() { first <- handle(t, h, m) }()
	<-running

	err := handle(t, h, m)
	wantCode(t, err, postrider.Aborted, true)
	if d, ok := postrider.RetryDelay(err); !ok || d != busyDelay {
		t.Errorf("the copy is delayed by %v, want %v", d, busyDelay)
	}
	proceed()
	must(t, <-first)
	must(t, handle(t, h, m))
	b.wantEffects("m-1", 1)
	if got, want := s.Stats(), (Stats{Handled: 1, Duplicates: 1, Busy: 1}); got != want {
		t.Fatalf("stats %+v, want %+v", got, want)
	}
}

func TestTheStoreEndsTheTransaction(t *testing.T) {
	t.Parallel()
	b := setup(t)
	tests := map[string]struct {
		fn   func(ctx context.Context, tx pgx.Tx) error
		want string // of the error
	}{
		"commit":        {func(ctx context.Context, tx pgx.Tx) error { return tx.Commit(ctx) }, "must not commit"},
		"rollback":      {func(ctx context.Context, tx pgx.Tx) error { _ = tx.Rollback(ctx); return nil }, "must not roll back"},
		"text rollback": {func(ctx context.Context, tx pgx.Tx) error { _, err := tx.Exec(ctx, "rollback"); return err }, "ended its transaction"},
		"swallowed":     {func(ctx context.Context, tx pgx.Tx) error { _, _ = tx.Exec(ctx, "select 1/0"); return nil }, "after a statement failed"},
		"open rows": {func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Query(ctx, "select generate_series(1, 100000)")
			return err
		}, "busy"},
	}
	for name, test := range tests {
		h := Handler(b.store(Config{}), "billing", b.placed, func(ctx context.Context, tx pgx.Tx, e postrider.Event[order]) error {
			return errors.Join(write(ctx, tx, e.ID), test.fn(ctx, tx))
		})
		err := handle(t, h, b.event(name, time.Now()))
		if err == nil || !postrider.Retryable(err) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want a retryable one with %q", name, err, test.want)
		}
		b.wantEffects(name, 0)
	}
	var kept pgx.Tx
	keep := Handler(b.store(Config{}), "billing", b.placed, func(_ context.Context, tx pgx.Tx, _ postrider.Event[order]) error {
		kept = tx
		return nil
	})
	must(t, handle(t, keep, b.event("kept", time.Now())))
	if err := write(t.Context(), kept, "late"); !errors.Is(err, pgx.ErrTxClosed) {
		t.Errorf("a transaction kept after the handler: error %v, want %v", err, pgx.ErrTxClosed)
	}
	if n := b.pool.Stat().AcquiredConns(); n != 0 {
		t.Fatalf("%d connections are not given back", n)
	}
}

func TestSavepointsAndIsolation(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`do $$ begin execute format('alter database %I set default_transaction_isolation = serializable', current_database()); end $$`)
	b.pool.Reset()
	h := Handler(b.store(Config{}), "billing", b.placed, func(ctx context.Context, tx pgx.Tx, e postrider.Event[order]) error {
		var level string
		if err := tx.QueryRow(ctx, `show transaction_isolation`).Scan(&level); err != nil {
			return err
		}
		inner := errors.New("inner")
		err := pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error { return errors.Join(write(ctx, tx, "inner"), inner) })
		if !errors.Is(err, inner) {
			return fmt.Errorf("savepoint: %w", err)
		}
		return pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error { return write(ctx, tx, level) })
	})
	must(t, handle(t, h, b.event("m-1", time.Now())))
	b.wantEffects("inner", 0)
	b.wantEffects("read committed", 1)
}

func TestErrorsOfTheDatabase(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, err := New(b.pool, Config{Schema: "not_there"})
	must(t, err)
	err = handle(t, b.writer(s, "billing"), b.event("m-1", time.Now()))
	wantCode(t, err, postrider.Internal, true)
	if !strings.Contains(err.Error(), "idempotency.Migrate") {
		t.Errorf("error %q does not name Migrate", err)
	}

	h := b.writer(b.store(Config{}), "billing")
	m := b.event("", time.Now())
	wantCode(t, handle(t, h, m), postrider.InvalidArgument, false)

	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = h.Handle(ended, b.event("m-2", time.Now()))
	wantCode(t, err, postrider.Canceled, true)

	b.exec(`create table strict (n int unique deferrable initially deferred); insert into strict values (1)`)
	deferred := Handler(b.store(Config{}), "billing", b.placed, func(ctx context.Context, tx pgx.Tx, _ postrider.Event[order]) error {
		_, err := tx.Exec(ctx, `insert into strict values (1)`)
		return err
	})
	wantCode(t, handle(t, deferred, b.event("m-3", time.Now())), postrider.Aborted, true)

	closed, err := New(b.pool, Config{Schema: testSchema})
	must(t, err)
	b.pool.Close()
	err = handle(t, b.writer(closed, "billing"), b.event("m-4", time.Now()))
	wantCode(t, err, postrider.Unavailable, true)
	var e *postrider.Error
	if !errors.As(err, &e) || !e.Unprocessed {
		t.Errorf("error %v does not say that nothing ran", err)
	}
}

func TestConsumerNeedsAName(t *testing.T) {
	t.Parallel()
	defer func() {
		if r := recover(); r == nil || !strings.Contains(fmt.Sprint(r), "orders.placed.v1") {
			t.Errorf("panic %v, want one that names the topic", r)
		}
	}()
	Handler(nil, "", newContracts().placed, nil)
}
