package idempotency

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

const day = 24 * time.Hour

// partitions returns the days that have a partition.
func (b *bench) partitions() []string {
	b.t.Helper()
	rows, err := b.pool.Query(b.t.Context(), `select relname::text from pg_class where relkind = 'r'
		and relname ~ '^postrider_inbox_[0-9]+$' order by 1`)
	must(b.t, err)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	must(b.t, err)
	return names
}

func TestTimesInAndOutOfTheWindow(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.store(Config{Window: 3 * day})
	h := b.writer(s, "billing")
	now := time.Now()
	for name, at := range map[string]time.Time{
		"now": now, "clock ahead": now.Add(23 * time.Hour), "yesterday": now.Add(-day), "old": now.Add(-3 * day),
		"other zone": now.In(time.FixedZone("far", 14*3600)), "untimed": {},
	} {
		for range 2 {
			if err := handle(t, h, b.event(name, at)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		b.wantEffects("billing "+name, 1)
	}
	refused := map[string]time.Time{
		"too old": now.Add(-4*day - time.Minute), "1970": time.Unix(0, 0), "before": time.Unix(-5, 0), "too new": now.Add(49 * time.Hour),
		"never": time.UnixMilli(1 << 48), "year 2": time.Date(2, 1, 1, 0, 0, 0, 0, time.UTC),
	}
	for name, at := range refused {
		err := handle(t, h, b.event(name, at))
		if !errors.Is(err, postrider.OutOfRange) || postrider.Retryable(err) {
			t.Errorf("%s: error %v, want OutOfRange, not retryable", name, err)
		}
		b.wantEffects("billing "+name, 0)
	}
	if n := s.Stats().Expired; n != int64(len(refused)) {
		t.Errorf("%d messages counted as expired, want %d", n, len(refused))
	}
}

func TestMissingPartitionsAreCreatedOnceByMany(t *testing.T) {
	t.Parallel()
	b := setup(t)
	h := b.writer(b.store(Config{}), "billing")
	now := time.Now()
	const days, each = 5, 4
	errs := make([]error, days*each)
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range errs {
		m := b.event(fmt.Sprintf("m-%d", i/2), now.Add(-time.Duration(i/each)*day)) // each message twice
		wg.Go(func() {
			<-start
			errs[i] = handle(t, h, m)
		})
	}
	close(start)
	wg.Wait()
	must(t, errors.Join(errs...))
	for i := range len(errs) / 2 {
		b.wantEffects(fmt.Sprintf("billing m-%d", i), 1)
	}
	if p := b.partitions(); len(p) != days {
		t.Fatalf("partitions %q, want %d", p, days)
	}
}

// A pool of one connection shows that a handler that meets a missing partition holds none while it is created.
func TestOneConnectionIsEnough(t *testing.T) {
	t.Parallel()
	b := setup(t)
	cfg := b.pool.Config()
	cfg.MaxConns = 1
	pool := b.connect(cfg)
	must(t, handle(t, b.writer(b.storeOn(pool, Config{}), "billing"), b.event("m-1", time.Now())))
	must(t, b.storeOn(pool, Config{}).maintain(t.Context()))
	b.wantEffects("billing m-1", 1)
}

func TestCreatingAPartitionLocksOutNobody(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.store(Config{})
	other := b.writer(s, "mailer")
	now := time.Now()
	must(t, handle(t, other, b.event("today", now)))
	h := Handler(s, "billing", b.placed, func(ctx context.Context, tx pgx.Tx, e postrider.Event[order]) error {
		// This handler's transaction is open while partitions come and others handle messages.
		for i := range 3 {
			if _, err := other.Handle(ctx, b.event(fmt.Sprint(i), now.Add(-time.Duration(i)*day))); err != nil {
				return err
			}
		}
		return write(ctx, tx, e.ID)
	})
	must(t, handle(t, h, b.event("m-1", now)))
	b.wantEffects("m-1", 1)
}

func TestRunPreparesAndExpires(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ctx := t.Context()
	long, short := b.store(Config{Window: 30 * day, Retention: 30 * day}), b.store(Config{Window: 3 * day, Retention: 3 * day})
	now := time.Now()
	old := b.event("old", now.Add(-10*day))
	young := b.event("young", now.Add(-2*day))
	for _, m := range []*postrider.Message{old, young, b.event("untimed", time.Time{}), b.event("untimed old", time.Time{})} {
		must(t, handle(t, b.writer(long, "billing"), m))
	}
	b.exec(`update effects.postrider_inbox_untimed set handled_at = handled_at - interval '4 days' where k in
		(select k from effects.postrider_inbox_untimed order by handled_at desc limit 1)`)
	b.exec(`insert into effects.postrider_barrier (key, state, at) values
		('key:gone', 1, now() - interval '5 days'), ('key:kept', 1, now() - interval '3 days')`)

	run, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- postrider.Run(run, short) }()
	want := []string{young.Time.UTC().Format(partitionName), now.UTC().Format(partitionName), now.Add(day).UTC().Format(partitionName)}
	postridertest.Eventually(t, func() error {
		var untimed, barrier int
		err := b.pool.QueryRow(ctx, `select (select count(*) from effects.postrider_inbox_untimed),
			(select count(*) from effects.postrider_barrier)`).Scan(&untimed, &barrier)
		if p := b.partitions(); err != nil || !slices.Equal(p, want) || untimed != 1 || barrier != 1 {
			return fmt.Errorf("partitions %q, %d untimed rows, %d barrier rows, error %w; want %q, 1, 1", p, untimed, barrier, err, want)
		}
		return nil
	})
	stop()
	must(t, <-ended)

	// What was dropped never comes back, not even for a store with a longer window.
	for _, s := range []*Store{short, long} {
		wantCode(t, handle(t, b.writer(s, "billing"), old), postrider.OutOfRange, false)
	}
	b.wantEffects("billing old", 1)
	must(t, handle(t, b.writer(short, "billing"), young))
	b.wantEffects("billing young", 1)

	// Of all instances one sweeps.
	b.exec(`create table effects.postrider_inbox_20200101 ()`)
	must(t, short.maintain(ctx))
	if len(b.partitions()) != len(want)+1 {
		t.Fatalf("partitions %q: a second sweep within the hour", b.partitions())
	}
	must(t, short.sweep(ctx, now))
	if p := b.partitions(); !slices.Equal(p, want) {
		t.Fatalf("partitions %q, want %q: what a dead sweep left stays", p, want)
	}
}

// An open handler does not stop the others while a partition is dropped, and an interrupted drop is finished later.
func TestDropWaitsForOpenHandlersAlone(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.store(Config{Window: 30 * day})
	h := b.writer(s, "mailer")
	now := time.Now()
	must(t, handle(t, h, b.event("old", now.Add(-10*day))))
	must(t, handle(t, h, b.event("now", now)))

	holder, err := b.pool.Begin(t.Context())
	must(t, err)
	t.Cleanup(func() { _ = holder.Rollback(context.WithoutCancel(t.Context())) }) // the pool cannot close before
	_, err = holder.Exec(t.Context(), `insert into effects.postrider_inbox (k) values ($1)`, inboxKey("x", b.event("x", now)))
	must(t, err)

	dropping, interrupt := context.WithCancel(t.Context())
	dropped := make(chan error, 1)
	go func() { dropped <- s.dropBefore(dropping, now.Add(-5*day)) }()
	postridertest.Eventually(t, func() error {
		var pending int
		err := b.pool.QueryRow(t.Context(), `select count(*) from pg_inherits where inhdetachpending`).Scan(&pending)
		if err != nil || pending != 1 {
			return fmt.Errorf("%d partitions wait to be detached, error %w", pending, err)
		}
		return nil
	})
	must(t, handle(t, h, b.event("during", now)))
	interrupt()
	if err := <-dropped; err == nil {
		t.Fatal("the drop did not wait for the open transaction")
	}
	wantCode(t, handle(t, h, b.event("old", now.Add(-10*day))), postrider.OutOfRange, false)
	must(t, holder.Rollback(t.Context()))
	must(t, s.dropBefore(t.Context(), now.Add(-5*day)))
	if p, want := b.partitions(), []string{now.UTC().Format(partitionName)}; !slices.Equal(p, want) {
		t.Fatalf("partitions %q, want %q", p, want)
	}
}

// A sweep that was broken off may end on the server between the look at the partitions and the drop.
func TestDropOfWhatIsDetachedMeanwhile(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.store(Config{Window: 30 * day})
	old := time.Now().Add(-10 * day)
	must(t, handle(t, b.writer(s, "mailer"), b.event("old", old)))
	name := old.UTC().Format(partitionName)
	_, err := b.pool.Exec(t.Context(), "alter table effects.postrider_inbox detach partition effects."+name)
	must(t, err)
	for range 2 { // detached, and gone
		must(t, s.drop(t.Context(), partition{name: name, day: dayOf(old), attached: true, pending: true}))
	}
	if p := b.partitions(); len(p) > 0 {
		t.Fatalf("partitions %q, want none", p)
	}
}

func TestRunLivesWithoutTables(t *testing.T) {
	t.Parallel()
	pool := postridertest.Postgres(t)
	s, err := New(pool, Config{})
	must(t, err)
	if err := s.maintain(t.Context()); err == nil {
		t.Fatal("maintenance without tables is no error")
	}
	run, stop := context.WithCancel(t.Context())
	stop()
	must(t, s.Run(run))
}

// Copies of a message of the last millisecond of a day, and of the first of the next, meet in one partition each, whenever they
// come and in whatever zone their time is written.
func TestMidnight(t *testing.T) {
	t.Parallel()
	b := setup(t)
	h := b.writer(b.store(Config{}), "billing")
	first := dayOf(time.Now())
	last := first.Add(-time.Millisecond)
	batch, _ := b.batcher(b.store(Config{}), "billing", nil)
	for range 2 {
		for id, at := range map[string]time.Time{"last": last, "first": first} {
			for _, zone := range []string{"", "far east"} {
				if zone != "" {
					at = at.In(time.FixedZone(zone, 14*3600))
				}
				must(t, handle(t, h, b.event(id, at)))
				must(t, handle(t, batch, b.event(id, at)))
			}
		}
	}
	b.wantEffects("billing last", 1)
	b.wantEffects("billing first", 1)
	if p, want := b.partitions(), []string{last.Format(partitionName), first.Format(partitionName)}; !slices.Equal(p, want) {
		t.Fatalf("partitions %q, want %q", p, want)
	}
}

// Consumers that need to know messages for different times have stores of different schemas: each expires by itself.
func TestRetentionPerConsumer(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ctx, now := t.Context(), time.Now()
	const archive = "archive"
	must(t, Migrate(ctx, b.pool, archive))
	short := b.store(Config{Window: 3 * day})
	long, err := New(b.pool, Config{Schema: archive, Window: 365 * day})
	must(t, err)
	old := b.event("old", now.Add(-200*day))
	young := b.event("young", now.Add(-2*day))
	for range 2 {
		for _, s := range []*Store{short, long} {
			must(t, handle(t, b.writer(s, s.cfg.Schema), young))
			must(t, s.maintain(ctx))
			must(t, s.sweep(ctx, now))
		}
		must(t, handle(t, b.writer(long, archive), old))
		wantCode(t, handle(t, b.writer(short, testSchema), old), postrider.OutOfRange, false)
	}
	for what, want := range map[string]int{"archive young": 1, "effects young": 1, "archive old": 1, "effects old": 0} {
		b.wantEffects(what, want)
	}
	must(t, long.sweep(ctx, now.AddDate(1, 0, 0)))
	must(t, handle(t, b.writer(short, testSchema), young))
	b.wantEffects("effects young", 1)
}
