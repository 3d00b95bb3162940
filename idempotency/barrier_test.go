package idempotency

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

// participant is one that reserves and releases, and says in the ledger what it did.
type participant struct {
	*bench
	do, undo postrider.Handler
	next     error // what the next action returns after its write
	nextUndo error // and the next compensation
	answers  int
}

func (b *bench) participant(s *Store) *participant {
	p := &participant{bench: b}
	p.do = Action(s, b.reserve, func(ctx context.Context, tx pgx.Tx, req *order) (*hold, error) {
		if err := write(ctx, tx, "do "+req.ID); err != nil {
			return nil, err
		}
		err := p.next
		p.next = nil
		p.answers++
		return &hold{ID: req.ID + "-hold", Names: map[string]int{"z": p.answers, "a": 1, "m": 2}}, err
	})
	p.undo = Compensation(s, b.release, func(ctx context.Context, tx pgx.Tx, _ *order, did *hold) error {
		if err := write(ctx, tx, "undo "+did.ID); err != nil {
			return err
		}
		err := p.nextUndo
		p.nextUndo = nil
		return err
	})
	return p
}

// send handles the do or the undo of a key, as a new message.
func (p *participant) send(op, key string) ([]byte, error) {
	p.t.Helper()
	h, method := p.do, p.reserve
	if op == "undo" {
		h, method = p.undo, p.release
	}
	reply, err := h.Handle(p.t.Context(), p.command(method, key+"/"+op, order{ID: key}))
	if err != nil {
		return nil, err
	}
	return reply.Data, nil
}

// TestBarrierTransitions walks every edge of the drawing in the package comment.
func TestBarrierTransitions(t *testing.T) {
	t.Parallel()
	b := setup(t)
	p := b.participant(b.store(Config{}))
	refusal := postrider.Errorf(postrider.NotFound, "no such product")
	weather := errors.New("weather")
	const ok = postrider.OK
	type move struct {
		op   string // do, undo; do!, undo!: refuses; do?, undo?: fails
		want postrider.Code
	}
	tests := map[string]struct {
		moves       []move
		done, undos int
	}{
		"done":              {[]move{{"do", ok}, {"do", ok}}, 1, 0},
		"undone":            {[]move{{"do", ok}, {"undo", ok}, {"undo", ok}, {"do", postrider.FailedPrecondition}, {"undo", ok}}, 1, 1},
		"nulled":            {[]move{{"undo", ok}, {"do", postrider.FailedPrecondition}, {"undo", ok}, {"do", postrider.FailedPrecondition}}, 0, 0},
		"refused":           {[]move{{"do!", postrider.NotFound}, {"do", postrider.NotFound}, {"undo", ok}, {"do", postrider.NotFound}}, 0, 0},
		"failed, then done": {[]move{{"do?", postrider.Unknown}, {"do", ok}}, 1, 0},
		"failed, nulled":    {[]move{{"do?", postrider.Unknown}, {"undo", ok}, {"do", postrider.FailedPrecondition}}, 0, 0},
		"undo fails":        {[]move{{"do", ok}, {"undo?", postrider.Unknown}, {"do", ok}, {"undo", ok}}, 1, 1},
		"undo refuses":      {[]move{{"do", ok}, {"undo!", postrider.NotFound}, {"undo", ok}}, 1, 1},
	}
	for name, test := range tests {
		for i, m := range test.moves {
			var fail error
			if strings.HasSuffix(m.op, "!") {
				fail = refusal
			} else if strings.HasSuffix(m.op, "?") {
				fail = weather
			}
			op := strings.TrimRight(m.op, "!?")
			if op == "do" {
				p.next = fail
			} else {
				p.nextUndo = fail
			}
			_, err := p.send(op, name)
			p.next, p.nextUndo = nil, nil
			if postrider.CodeOf(err) != m.want || err != nil && postrider.Retryable(err) != (m.want == postrider.Unknown) {
				t.Errorf("%s: move %d, %s: error %v, want %v", name, i, m.op, err, m.want)
			}
		}
		b.wantEffects("do "+name, test.done)
		b.wantEffects("undo "+name+"-hold", test.undos)
	}
}

func TestDuplicateGetsTheSameReply(t *testing.T) {
	t.Parallel()
	b := setup(t)
	p := b.participant(b.store(Config{}))
	first, err := p.send("do", "s/1")
	must(t, err)
	p = b.participant(b.store(Config{})) // after a restart
	p.answers = 7
	again, err := p.send("do", "s/1")
	must(t, err)
	if !bytes.Equal(first, again) || !bytes.Contains(first, []byte("s/1-hold")) {
		t.Fatalf("reply %s, then %s", first, again)
	}
}

func TestStoredRefusalKeepsItsParts(t *testing.T) {
	t.Parallel()
	b := setup(t)
	p := b.participant(b.store(Config{}))
	p.next = &postrider.Error{
		Code: postrider.FailedPrecondition, Op: "reserve", Msg: "3 left", Details: []postrider.Detail{{Type: "stock", Value: []byte{3}}},
	}
	_, first := p.send("do", "s/1")
	_, again := p.send("do", "s/1")
	if a, b := postrider.AppendError(nil, first), postrider.AppendError(nil, again); !bytes.Equal(a, b) || !bytes.Contains(a, []byte("3 left")) {
		t.Fatalf("refusal %s, then %s", a, b)
	}
	p.next = postrider.Permanent(errors.New("out of season"))
	_, first = p.send("do", "s/2")
	_, again = p.send("do", "s/2")
	if postrider.Retryable(first) || postrider.Retryable(again) || again.Error() != "out of season (UNKNOWN)" {
		t.Fatalf("refusal %v, then %v", first, again)
	}
}

func TestRefusalAfterFailedStatementOrRollback(t *testing.T) {
	t.Parallel()
	b := setup(t)
	refusal := postrider.Errorf(postrider.AlreadyExists, "taken")
	for name, spoil := range map[string]func(ctx context.Context, tx pgx.Tx){
		"statement": func(ctx context.Context, tx pgx.Tx) { _, _ = tx.Exec(ctx, `select 1/0`) },
		"rollback":  func(ctx context.Context, tx pgx.Tx) { _ = tx.Rollback(ctx) },
	} {
		runs := 0
		h := Action(b.store(Config{}), b.reserve, func(ctx context.Context, tx pgx.Tx, req *order) (*hold, error) {
			runs++
			must(t, write(ctx, tx, name))
			spoil(ctx, tx)
			return nil, refusal
		})
		for range 2 {
			wantCode(t, handle(t, h, b.command(b.reserve, name+"/do", order{})), postrider.AlreadyExists, false)
		}
		if runs != 1 {
			t.Errorf("%s: ran %d times", name, runs)
		}
		b.wantEffects(name, 0)
	}
}

func TestPanicOfAnActionStoresNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	runs := 0
	h := Action(b.store(Config{}), b.reserve, func(ctx context.Context, tx pgx.Tx, req *order) (*hold, error) {
		must(t, write(ctx, tx, req.ID))
		if runs++; runs == 1 {
			panic("boom")
		}
		return nil, nil // the zero response
	})
	m := b.command(b.reserve, "s/1/do", order{ID: "o"})
	wantCode(t, handle(t, h, m), postrider.Internal, true)
	b.wantEffects("o", 0)
	for range 2 {
		reply, err := h.Handle(t.Context(), m)
		must(t, err)
		if string(reply.Data) != `{"ID":"","Names":null}` {
			t.Fatalf("reply %s", reply.Data)
		}
	}
	b.wantEffects("o", 1)
}

func TestWhatAKeyIsGoodFor(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.store(Config{Retention: 2 * day})
	p := b.participant(s)
	ctx := t.Context()
	do := func(key, id string) error { return handle(t, p.do, b.command(b.reserve, key, order{ID: id})) }

	// A key that a caller chose must not be used for another request, nor for another method.
	must(t, do("call-1", "a"))
	must(t, do("call-1", "a"))
	wantCode(t, do("call-1", "b"), postrider.AlreadyExists, false)
	cancel := Action(s, b.release, func(context.Context, pgx.Tx, *order) (*hold, error) { return nil, nil })
	wantCode(t, handle(t, cancel, b.command(b.release, "call-1", order{ID: "a"})), postrider.AlreadyExists, false)
	// A saga's command may be encoded otherwise after an upgrade: to refuse it would say that the action has not run.
	must(t, do("saga/1/do", "c"))
	must(t, do("saga/1/do", "c, encoded otherwise"))
	b.wantEffects("do c, encoded otherwise", 0)

	// Without a key the message is known by source and id.
	m := b.command(b.reserve, "", order{ID: "d"})
	must(t, handle(t, p.do, m))
	must(t, handle(t, p.do, m.Clone()))
	must(t, handle(t, p.do, b.command(b.reserve, "", order{ID: "d"})))
	b.wantEffects("do d", 2)
	m.ID = ""
	wantCode(t, handle(t, p.do, m), postrider.InvalidArgument, false)
	wantCode(t, do(strings.Repeat("x", 5000), "e"), postrider.InvalidArgument, false)
	wantCode(t, handle(t, p.undo, b.command(b.release, "", order{})), postrider.InvalidArgument, false)

	old := b.command(b.reserve, "saga/2/do", order{ID: "f"})
	old.Time = time.Now().Add(-3 * day)
	wantCode(t, handle(t, p.do, old), postrider.OutOfRange, false)
	b.wantEffects("do f", 0)

	// A compensation that cannot read what was done leaves it for a program that can.
	if _, err := b.pool.Exec(ctx, `update effects.postrider_barrier set content_type = 'x/y' where key = 'key:saga/1'`); err != nil {
		t.Fatal(err)
	}
	wantCode(t, handle(t, p.undo, b.command(b.release, "saga/1/undo", order{})), postrider.Internal, true)
	wantCode(t, do("saga/1/do", "c"), postrider.Internal, true)
}

// TestCompensationWaitsForItsAction is the race at the heart of the barrier: the action has not committed when its
// compensation arrives.
func TestCompensationWaitsForItsAction(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		result      error
		done, undos int
	}{"commits": {nil, 1, 1}, "refuses": {postrider.NotFound, 0, 0}, "fails": {errors.New("weather"), 0, 0}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			impatient, patient := b.store(Config{LockTimeout: 20 * time.Millisecond}), b.store(Config{LockTimeout: -1})
			running, finish := make(chan struct{}), make(chan struct{})
			proceed := sync.OnceFunc(func() { close(finish) })
			defer proceed() // or a failed test would never end
			action := Action(patient, b.reserve, func(ctx context.Context, tx pgx.Tx, req *order) (*hold, error) {
				close(running)
				<-finish
				return &hold{ID: "h"}, errors.Join(write(ctx, tx, "do"), test.result)
			})
			undo := func(s *Store) error {
				return handle(t, Compensation(s, b.release, func(ctx context.Context, tx pgx.Tx, _ *order, did *hold) error {
					return write(ctx, tx, "undo "+did.ID)
				}), b.command(b.release, "s/1/undo", order{}))
			}
			acted, undone := make(chan error, 1), make(chan error, 1)
			go func() { acted <- handle(t, action, b.command(b.reserve, "s/1/do", order{})) }()
			<-running
			wantCode(t, undo(impatient), postrider.Aborted, true)
			go func() { undone <- undo(patient) }()
			b.waitForLock()
			proceed()
			if err := <-acted; !errors.Is(err, test.result) {
				t.Fatalf("the action returned %v, want %v", err, test.result)
			}
			must(t, <-undone)
			b.wantEffects("do", test.done)
			b.wantEffects("undo h", test.undos)
			late := b.participant(patient)
			if _, err := late.send("do", "s/1"); err == nil || postrider.Retryable(err) {
				t.Fatalf("a late action returned %v", err)
			}
			b.wantEffects("do", test.done)
		})
	}
}

// waitForLock returns when a statement of this database waits for a lock.
func (b *bench) waitForLock() {
	b.t.Helper()
	postridertest.Eventually(b.t, func() error {
		var n int
		err := b.pool.QueryRow(b.t.Context(), `select count(*) from pg_stat_activity
			where datname = current_database() and wait_event_type = 'Lock'`).Scan(&n)
		if err == nil && n == 0 {
			err = errors.New("nobody waits for a lock")
		}
		return err
	})
}
