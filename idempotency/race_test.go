package idempotency

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
)

// trial is the history of one key in TestBarrierHoldsUnderRaces.
type trial struct {
	mu       sync.Mutex
	acted    map[string]bool // the distinct replies of actions that succeeded
	refused  bool            // an action returned the participant's refusal
	undone   bool            // a compensation succeeded
	lateDone bool            // an action that began after that succeeded
}

// TestBarrierHoldsUnderRaces lets actions and compensations of the same keys run against each other, duplicated, with
// refusals and failures drawn at random, and checks every key's history: an effect at most once, never more undos than
// effects, none left when a compensation has succeeded, and one answer for all.
func TestBarrierHoldsUnderRaces(t *testing.T) {
	t.Parallel()
	const keys, workers = 40, 12
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	b := setup(t)
	s := b.store(Config{LockTimeout: -1})
	refusal, weather := postrider.Errorf(postrider.ResourceExhausted, "sold out"), errors.New("weather")
	var mu sync.Mutex
	rnd, serial := rand.New(rand.NewPCG(seed, 1)), 0
	draw := func(n int) int {
		mu.Lock()
		defer mu.Unlock()
		return rnd.IntN(n)
	}
	do := Action(s, b.reserve, func(ctx context.Context, tx pgx.Tx, req *order) (*hold, error) {
		mu.Lock()
		serial++
		h := &hold{ID: fmt.Sprint(serial)} // another one each time it runs
		mu.Unlock()
		if err := write(ctx, tx, "do "+req.ID); err != nil {
			return nil, err
		}
		switch draw(5) {
		case 0:
			return nil, postrider.Permanent(refusal)
		case 1:
			return nil, weather
		}
		return h, nil
	})
	undo := Compensation(s, b.release, func(ctx context.Context, tx pgx.Tx, req *order, did *hold) error {
		if err := errors.Join(write(ctx, tx, "undo "+req.ID), write(ctx, tx, "released "+req.ID+" "+did.ID)); err != nil || draw(4) > 0 {
			return err
		}
		return weather
	})

	trials := make([]trial, keys)
	act := func(id string, tr *trial) {
		tr.mu.Lock()
		late := tr.undone
		tr.mu.Unlock()
		reply, err := do.Handle(t.Context(), b.command(b.reserve, id+"/do", order{ID: id}))
		tr.mu.Lock()
		defer tr.mu.Unlock()
		if err == nil {
			tr.acted[string(reply.Data)] = true
			tr.lateDone = tr.lateDone || late
		}
		tr.refused = tr.refused || errors.Is(err, postrider.ResourceExhausted)
	}
	compensate := func(id string, tr *trial) {
		_, err := undo.Handle(t.Context(), b.command(b.release, id+"/undo", order{ID: id}))
		tr.mu.Lock()
		defer tr.mu.Unlock()
		tr.undone = tr.undone || err == nil
	}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range keys {
				id, tr := fmt.Sprintf("s/%d", i), &trials[i]
				tr.mu.Lock()
				if tr.acted == nil {
					tr.acted = map[string]bool{}
				}
				tr.mu.Unlock()
				// A quarter of the keys is never compensated; for the others it is a matter of luck who comes first.
				if i%4 != 0 && (w+draw(3))%3 == 0 {
					compensate(id, tr)
				} else {
					act(id, tr)
				}
			}
		})
	}
	wg.Wait()

	var saw struct{ done, undone, nulled, refused int }
	for i := range trials {
		id, tr := fmt.Sprintf("s/%d", i), &trials[i]
		dones, undos := b.effects("do "+id), b.effects("undo "+id)
		left := dones - undos
		switch {
		case dones > 1, undos > dones, len(tr.acted) > 1, tr.lateDone,
			tr.undone && left != 0,
			!tr.undone && len(tr.acted) > 0 && left != 1,
			tr.refused && (dones > 0 || len(tr.acted) > 0):
			t.Errorf("key %s: %d effects, %d undos, history %+v", id, dones, undos, tr)
		case tr.refused:
			saw.refused++
		case undos == 1:
			saw.undone++
		case tr.undone:
			saw.nulled++
		case dones == 1:
			saw.done++
		}
	}
	t.Logf("saw %+v", saw)
}

// TestBarrierFollowsItsModel runs random histories one step at a time and compares each answer with the model.
func TestBarrierFollowsItsModel(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 2))
	b := setup(t)
	p := b.participant(b.store(Config{}))
	results := []error{nil, postrider.Errorf(postrider.NotFound, "no"), errors.New("weather")}
	for k := range 60 {
		key := fmt.Sprintf("k%d", k)
		var state, dones, undos int
		history := ""
		for range 6 {
			op, result := [...]string{"do", "undo"}[rnd.IntN(2)], results[rnd.IntN(len(results))]
			history += fmt.Sprintf(" %s(%v)", op, result)
			want := postrider.OK
			p.next, p.nextUndo = result, result
			switch op {
			case "do":
				switch state {
				case 0:
					want = postrider.CodeOf(result)
					if result == nil {
						state, dones = stateDone, 1
					} else if !postrider.Retryable(result) {
						state = stateRefused
					}
				case stateRefused:
					want = postrider.NotFound
				case stateNulled, stateUndone:
					want = postrider.FailedPrecondition
				}
			case "undo":
				switch state {
				case 0:
					state = stateNulled
				case stateDone:
					if want = postrider.CodeOf(result); result == nil {
						state, undos = stateUndone, 1
					}
				}
			}
			_, err := p.send(op, key)
			if got := postrider.CodeOf(err); got != want {
				t.Fatalf("key %s:%s: %v, want %v", key, history, err, want)
			}
		}
		b.wantEffects("do "+key, dones)
		b.wantEffects("undo "+key+"-hold", undos)
	}
}
