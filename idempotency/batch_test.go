package idempotency

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

// batcher handles events by one line each in the ledger. bad, if it is not nil, has the last word on each run.
func (b *bench) batcher(s *Store, consumer string, bad func(events []postrider.Event[order]) error) (h postrider.Handler, runs *atomic.Int64) {
	runs = new(atomic.Int64)
	return BatchHandler(s, consumer, b.placed, func(ctx context.Context, tx pgx.Tx, events []postrider.Event[order]) error {
		runs.Add(1)
		what := make([]string, len(events))
		for i, e := range events {
			what[i] = consumer + " " + e.ID
		}
		if _, err := tx.Exec(ctx, `insert into ledger (what) select unnest($1::text[])`, what); err != nil || bad == nil {
			return err
		}
		return bad(events)
	}), runs
}

// events returns n messages, m-0 and so on.
func (b *bench) events(n int, at time.Time) []*postrider.Message {
	msgs := make([]*postrider.Message, n)
	for i := range msgs {
		msgs[i] = b.event(fmt.Sprintf("m-%d", i), at.Add(time.Duration(i)*time.Millisecond))
	}
	return msgs
}

// wantOnce fails unless each of the messages is in the ledger once, but for those given.
func (b *bench) wantOnce(consumer string, msgs []*postrider.Message, but ...int) {
	b.t.Helper()
	for i, m := range msgs {
		want := 1
		if slices.Contains(but, i) {
			want = 0
		}
		b.wantEffects(consumer+" "+m.ID, want)
	}
}

func TestBatchesOfCopiesTakeEffectOnce(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.store(Config{LockTimeout: -1})
	h, _ := b.batcher(s, "billing", nil)
	one := b.writer(s, "billing")
	msgs := b.events(60, time.Now())
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	const workers, each = 8, 5
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		rnd := rand.New(rand.NewPCG(seed, uint64(w)))
		wg.Go(func() {
			for range each {
				// In any order, some twice in a batch: the batches must not lock each other out.
				mine := slices.Clone(msgs)
				mine = append(mine, msgs[:10]...)
				rnd.Shuffle(len(mine), func(i, j int) { mine[i], mine[j] = mine[j], mine[i] })
				errs[w] = errors.Join(append(h.HandleBatch(t.Context(), mine[:40]), handle(t, one, mine[50]), errs[w])...)
			}
		})
	}
	wg.Wait()
	must(t, errors.Join(errs...))
	must(t, errors.Join(h.HandleBatch(t.Context(), msgs)...))
	b.wantOnce("billing", msgs)
	if got, want := s.Stats(), (Stats{Handled: 60, Duplicates: workers * each * 41}); got.Handled != want.Handled || got.Duplicates != want.Duplicates || got.Busy != 0 {
		t.Fatalf("stats %+v, want %+v", got, want)
	}
}

func TestBatchSeesWhatIsNew(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.store(Config{})
	msgs := b.events(6, time.Now())
	must(t, handle(t, b.writer(s, "billing"), msgs[1]))
	must(t, handle(t, b.writer(s, "mailer"), msgs[2]))
	var seen []string
	h, runs := b.batcher(s, "billing", func(events []postrider.Event[order]) error {
		for _, e := range events {
			seen = append(seen, e.Value.ID)
		}
		return &postrider.BatchError{Errs: make([]error, len(events))}
	})
	for range 2 {
		must(t, errors.Join(h.HandleBatch(t.Context(), append(slices.Clone(msgs), msgs[3], msgs[0]))...))
	}
	if want := []string{"m-0", "m-2", "m-3", "m-4", "m-5"}; !slices.Equal(seen, want) || runs.Load() != 1 {
		t.Fatalf("fn got %q in %d runs, want %q in one", seen, runs.Load(), want)
	}
	b.wantOnce("billing", msgs)
	if got, want := s.Stats(), (Stats{Handled: 7, Duplicates: 1 + 2 + 8}); got != want {
		t.Fatalf("stats %+v, want %+v", got, want)
	}
	must(t, handle(t, h, b.event("alone", time.Now()))) // as a bus does with the only one of a batch
	b.wantEffects("billing alone", 1)
}

func TestABadEventFailsAlone(t *testing.T) {
	t.Parallel()
	fail := errors.New("bad")
	has := func(events []postrider.Event[order], ids ...string) bool {
		return slices.ContainsFunc(events, func(e postrider.Event[order]) bool { return slices.Contains(ids, e.ID) })
	}
	for name, test := range map[string]struct {
		bad    func(tx pgx.Tx, events []postrider.Event[order]) error
		failed []int
		runs   int64 // at most
	}{
		"error": {func(_ pgx.Tx, e []postrider.Event[order]) error {
			if has(e, "m-17") {
				return fail
			}
			return nil
		}, []int{17}, 15},
		"two": {func(_ pgx.Tx, e []postrider.Event[order]) error {
			if has(e, "m-0", "m-99") {
				return postrider.Permanent(fail)
			}
			return nil
		}, []int{0, 99}, 29},
		"panic": {func(_ pgx.Tx, e []postrider.Event[order]) error {
			if has(e, "m-99") {
				panic(fail)
			}
			return nil
		}, []int{99}, 15},
		"all": {func(pgx.Tx, []postrider.Event[order]) error { return fail }, nil, 199},
		"named": {func(_ pgx.Tx, e []postrider.Event[order]) error {
			errs := make([]error, len(e))
			for i := range e {
				if has(e[i:i+1], "m-3", "m-40", "m-77") {
					errs[i] = fail
				}
			}
			return &postrider.BatchError{Errs: errs}
		}, []int{3, 40, 77}, 2},
		"named, wrapped": {func(_ pgx.Tx, e []postrider.Event[order]) error {
			if has(e, "m-3") {
				return fmt.Errorf("of something else: %w", &postrider.BatchError{Errs: append(make([]error, len(e)-1), fail)})
			}
			return nil
		}, []int{3}, 15},
		"aborted": {func(tx pgx.Tx, e []postrider.Event[order]) error {
			if has(e, "m-50") {
				_, err := tx.Exec(context.Background(), `select 1/0`)
				return errors.Join(err, fail)
			}
			return nil
		}, []int{50}, 15},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			s := b.store(Config{})
			runs := int64(0)
			h := BatchHandler(s, "billing", b.placed, func(ctx context.Context, tx pgx.Tx, events []postrider.Event[order]) error {
				runs++
				for _, e := range events {
					if err := write(ctx, tx, "billing "+e.ID); err != nil {
						return err
					}
				}
				return test.bad(tx, events)
			})
			msgs := b.events(100, time.Now())
			if test.failed == nil {
				for i := range msgs {
					test.failed = append(test.failed, i)
				}
			}
			for i, err := range h.HandleBatch(t.Context(), msgs) {
				if failed := slices.Contains(test.failed, i); failed != errors.Is(err, fail) || !failed && err != nil {
					t.Errorf("message %d: error %v", i, err)
				}
			}
			b.wantOnce("billing", msgs, test.failed...)
			if runs > test.runs {
				t.Errorf("fn ran %d times, want at most %d", runs, test.runs)
			}
			if got := s.Stats(); got != (Stats{Handled: int64(100 - len(test.failed))}) {
				t.Errorf("stats %+v", got)
			}
			if n := b.pool.Stat().AcquiredConns(); n != 0 {
				t.Fatalf("%d connections are not given back", n)
			}
		})
	}
}

// What fails in COMMIT, a deferred constraint here, is found in the same way.
func TestABadEventFailsAloneInTheCommit(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`create table strict (n text unique deferrable initially deferred); insert into strict values ('m-5')`)
	h := BatchHandler(b.store(Config{}), "billing", b.placed, func(ctx context.Context, tx pgx.Tx, events []postrider.Event[order]) error {
		for _, e := range events {
			if _, err := tx.Exec(ctx, `insert into strict values ($1)`, e.ID); err != nil {
				return err
			}
		}
		return nil
	})
	errs := h.HandleBatch(t.Context(), b.events(8, time.Now()))
	wantCode(t, errs[5], postrider.Aborted, true)
	errs[5] = nil
	must(t, errors.Join(errs...))
}

func TestAWrongBatchErrorFailsAll(t *testing.T) {
	t.Parallel()
	b := setup(t)
	h, _ := b.batcher(b.store(Config{}), "billing", func([]postrider.Event[order]) error {
		return &postrider.BatchError{Errs: make([]error, 77)}
	})
	msgs := b.events(3, time.Now())
	for _, err := range h.HandleBatch(t.Context(), msgs) {
		wantCode(t, err, postrider.Internal, true)
	}
	b.wantOnce("billing", msgs, 0, 1, 2)
}

func TestBusyMessagesArePartedFromTheirBatch(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.store(Config{LockTimeout: 100 * time.Millisecond})
	h, _ := b.batcher(s, "billing", func(events []postrider.Event[order]) error { return nil })
	msgs := b.events(40, time.Now())
	must(t, handle(t, b.writer(s, "other"), msgs[0])) // the partition is there

	// Others handle two of them right now.
	holder, err := b.pool.Begin(t.Context())
	must(t, err)
	t.Cleanup(func() { _ = holder.Rollback(context.WithoutCancel(t.Context())) }) // the pool cannot close before
	hold := func(m *postrider.Message) {
		_, err := holder.Exec(t.Context(), `insert into effects.postrider_inbox (k) values ($1)`, inboxKey("billing", m))
		must(t, err)
	}
	hold(msgs[7])
	hold(msgs[31])
	errs := h.HandleBatch(t.Context(), msgs)
	for _, i := range []int{7, 31} {
		wantCode(t, errs[i], postrider.Aborted, true)
		if d, ok := postrider.RetryDelay(errs[i]); !ok || d != busyDelay {
			t.Errorf("message %d is delayed by %v, want %v", i, d, busyDelay)
		}
		errs[i] = nil
	}
	must(t, errors.Join(errs...))
	b.wantOnce("billing", msgs, 7, 31)

	// All are busy: not each of them is asked about.
	more := b.events(100, time.Now().Add(time.Minute))
	for _, m := range more {
		hold(m)
	}
	before := s.Stats().Busy
	for _, err := range h.HandleBatch(t.Context(), more) {
		wantCode(t, err, postrider.Aborted, true)
	}
	if n := s.Stats().Busy - before; n > 40 {
		t.Errorf("waited %d times for a batch of which nothing can be handled", n)
	}
	must(t, holder.Rollback(t.Context()))
	must(t, errors.Join(h.HandleBatch(t.Context(), more)...))
}

func TestTimesInABatch(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.store(Config{Window: 3 * day})
	now := time.Now()
	good := map[string]time.Time{
		"now": now, "clock ahead": now.Add(23 * time.Hour), "yesterday": now.Add(-day), "old": now.Add(-3 * day), "untimed": {},
	}
	bad := map[string]time.Time{
		"too old": now.Add(-5 * day), "older": now.Add(-5*day - time.Second), "1970": time.Unix(0, 0), "too new": now.Add(49 * time.Hour),
		"never": time.UnixMilli(1 << 48), "": now,
	}
	var msgs []*postrider.Message
	for id, at := range good {
		msgs = append(msgs, b.event(id, at))
	}
	for id, at := range bad {
		msgs = append(msgs, b.event(id, at))
		msgs[len(msgs)-1].ID = id
	}
	h, runs := b.batcher(s, "billing", nil)
	for range 2 {
		for i, err := range h.HandleBatch(t.Context(), msgs) {
			switch _, ok := good[msgs[i].ID]; {
			case ok && err != nil:
				t.Errorf("%s: %v", msgs[i].ID, err)
			case !ok && postrider.Retryable(err), !ok && err == nil:
				t.Errorf("%s: error %v, want one that is final", msgs[i].ID, err)
			}
		}
	}
	for id := range good {
		b.wantEffects("billing "+id, 1)
	}
	if runs.Load() != 1 {
		t.Errorf("fn ran %d times", runs.Load())
	}
	if n, want := s.Stats().Expired, int64(2*(len(bad)-1)); n != want {
		t.Errorf("%d messages counted as expired, want %d", n, want)
	}
}

func TestAmbiguousCommitOfABatch(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]int32{"commit lost": loseCommit, "answer lost": loseAnswer} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			pool, armed, hits := b.faulty()
			s, first := b.storeOn(pool, Config{}), true
			warm, _ := b.batcher(s, "warm-up", nil)
			h, runs := b.batcher(s, "billing", func([]postrider.Event[order]) error {
				if first {
					armed.Store(fault)
				}
				first = false
				return nil
			})
			msgs := b.events(20, time.Now())
			must(t, errors.Join(warm.HandleBatch(t.Context(), msgs)...))
			for _, err := range h.HandleBatch(t.Context(), msgs) {
				wantCode(t, err, postrider.Unavailable, true)
			}
			if hits.Load() != 1 || runs.Load() != 1 {
				t.Fatalf("the fault happened %d times, fn ran %d times", hits.Load(), runs.Load())
			}
			must(t, errors.Join(h.HandleBatch(t.Context(), msgs)...))
			b.wantOnce("billing", msgs)
			if want := map[int32]int64{loseCommit: 2, loseAnswer: 1}[fault]; runs.Load() != want {
				t.Errorf("fn ran %d times, want %d", runs.Load(), want)
			}
		})
	}
}

func TestABatchEndsWithItsContextAndConnection(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.store(Config{})
	msgs := b.events(10, time.Now())
	ctx, cancel := context.WithCancel(t.Context())
	ended, runs := b.batcher(s, "billing", func([]postrider.Event[order]) error { cancel(); return ctx.Err() })
	for _, err := range ended.HandleBatch(ctx, msgs) {
		if postrider.CodeOf(err) != postrider.Canceled {
			t.Errorf("error %v, want that of the context", err)
		}
	}
	if runs.Load() != 1 {
		t.Errorf("fn ran %d times after its context ended", runs.Load())
	}
	tries := 0
	broken := BatchHandler(s, "billing", b.placed, func(ctx context.Context, tx pgx.Tx, _ []postrider.Event[order]) error {
		tries++
		_, err := tx.Exec(ctx, `select pg_terminate_backend(pg_backend_pid())`)
		return err
	})
	for _, err := range broken.HandleBatch(t.Context(), msgs) {
		if err == nil || !postrider.Retryable(err) {
			t.Errorf("error %v, want a retryable one", err)
		}
	}
	if tries != 1 {
		t.Errorf("fn ran %d times on broken connections", tries)
	}
	b.wantOnce("billing", msgs, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
	h, _ := b.batcher(s, "billing", nil)
	must(t, errors.Join(h.HandleBatch(t.Context(), msgs)...))
}

func TestBatchConsumerNeedsAName(t *testing.T) {
	t.Parallel()
	defer func() {
		if r := recover(); r == nil || !strings.Contains(fmt.Sprint(r), "orders.placed.v1") {
			t.Errorf("panic %v, want one that names the topic", r)
		}
	}()
	BatchHandler(nil, "", newContracts().placed, nil)
}

// Two batches with the same messages in opposite order wait for one that a third transaction has: when it is free, the one goes
// first and the other follows.
func TestBatchesInOppositeOrderDoNotDeadlock(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.store(Config{LockTimeout: -1})
	h, _ := b.batcher(s, "billing", nil)
	msgs := b.events(3, time.Now())
	must(t, handle(t, b.writer(s, "other"), msgs[0])) // the partition is there
	holder, err := b.pool.Begin(t.Context())
	must(t, err)
	t.Cleanup(func() { _ = holder.Rollback(context.WithoutCancel(t.Context())) }) // the pool cannot close before
	_, err = holder.Exec(t.Context(), `insert into effects.postrider_inbox (k) values ($1)`, inboxKey("billing", msgs[1]))
	must(t, err)
	backward := slices.Clone(msgs)
	slices.Reverse(backward)
	ended := make(chan error, 2)
	for _, batch := range [][]*postrider.Message{msgs, backward} {
		go func() { ended <- errors.Join(h.HandleBatch(t.Context(), batch)...) }()
	}
	postridertest.Eventually(t, func() error {
		var n int
		err := b.pool.QueryRow(t.Context(), `select count(*) from pg_stat_activity
			where datname = current_database() and wait_event_type = 'Lock'`).Scan(&n)
		if err == nil && n < 2 {
			err = fmt.Errorf("%d wait for a lock", n)
		}
		return err
	})
	must(t, holder.Rollback(t.Context()))
	must(t, errors.Join(<-ended, <-ended))
	b.wantOnce("billing", msgs)
}
