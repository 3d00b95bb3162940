package storetest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/idempotency"
)

// patience bounds the wait for an answer. A store may not learn that it was lost.
const patience = time.Second

// event is one call and its answer. Times count from the beginning of the history.
type event struct {
	call
	answer

	client       int
	asked, heard time.Duration
}

// history is what the callers did, by key.
type history struct {
	env   *env
	began time.Time

	mu     sync.Mutex
	events map[string][]event
}

func (h *history) now() time.Duration { return time.Since(h.began) }

func historiesAreLinearizable(e *env) {
	const workers, keys, lasting = 8, 16, 4 * time.Second
	seed := rand.Uint64()
	e.Logf("seed %d", seed)
	h := &history{env: e, began: time.Now(), events: map[string][]event{}}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(w)))
			for h.now() < lasting {
				h.live(rnd, w, fmt.Sprint("k", rnd.IntN(keys)))
			}
		})
	}
	if e.cut != nil {
		wg.Go(func() {
			for rnd := rand.New(rand.NewPCG(seed, workers)); h.now() < lasting; e.cut() {
				<-time.After(time.Duration(rnd.IntN(400)) * time.Millisecond)
			}
		})
	}
	wg.Wait()
	h.check()
}

// do runs a call and writes it down.
func (h *history) do(client int, c call, run func(context.Context) (answer, error)) answer {
	ctx, cancel := context.WithTimeout(h.env.Context(), patience)
	defer cancel()
	ev := event{call: c, client: client, asked: h.now()}
	a, err := run(ctx)
	ev.answer, ev.heard = a, h.now()
	switch {
	case errors.Is(err, idempotency.ErrLost):
		ev.answer = answer{lost: true}
	case err != nil:
		ev.answer, ev.heard = answer{unknown: true}, math.MaxInt64 // it may still take effect
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.events[c.key] = append(h.events[c.key], ev)
	return ev.answer
}

// live claims a key once and, as its owner, does with it what comes to mind.
func (h *history) live(rnd *rand.Rand, client int, key string) {
	store, owner := h.env.store, postrider.NewID()
	claim := func() answer {
		return h.do(client, call{verb: claims, key: key}, func(ctx context.Context) (answer, error) {
			c, err := store.Claim(ctx, key, owner, []byte("r"), short)
			if c.Outcome != nil {
				return answer{done: true, data: string(c.Outcome.Data)}, err
			}
			return answer{fence: c.Fence}, err
		})
	}
	got := claim()
	for got.unknown && rnd.IntN(3) > 0 {
		got = claim() // it may own the key by now
	}
	fence := got.fence
	if fence == 0 {
		<-time.After(time.Duration(rnd.IntN(20)) * time.Millisecond)
		return
	}
	for {
		c := call{key: key, fence: fence}
		var a answer
		switch n := rnd.IntN(20); {
		case n < 8:
			c.verb = releases
			a = h.do(client, c, func(ctx context.Context) (answer, error) { return answer{}, store.Release(ctx, key, fence) })
		case n < 9:
			c.verb, c.data = completes, fmt.Sprint(fence)
			a = h.do(client, c, func(ctx context.Context) (answer, error) {
				return answer{}, store.Complete(ctx, key, fence, idempotency.Outcome{Data: []byte(c.data)})
			})
		case n < 17:
			c.verb = renews
			a = h.do(client, c, func(ctx context.Context) (answer, error) { return answer{}, store.Renew(ctx, key, fence, short) })
		case n < 19: // a stall that may outlive the lease
			<-time.After(time.Duration(rnd.IntN(1500)) * time.Millisecond)
			continue
		default: // death
			return
		}
		ended := a.lost || c.verb != renews && !a.unknown
		if ended && rnd.IntN(4) > 0 { // else a zombie goes on
			return
		}
	}
}

// check fails the test if what the callers saw has no order, or an owner was succeeded, or called a loser, before its lease had ended.
func (h *history) check() {
	e, saw := h.env, map[string]int{}
	for key, events := range h.events {
		var ops []porcupine.Operation
		for _, ev := range events {
			ops = append(ops, porcupine.Operation{
				ClientId: ev.client, Input: ev.call, Output: ev.answer, Call: int64(ev.asked), Return: int64(ev.heard),
			})
			saw[string(ev.verb)]++
			for what, is := range map[string]bool{
				"owned": ev.answer.fence != 0, "lost": ev.lost, "unknown": ev.unknown, "done": ev.done,
			} {
				if is {
					saw[what]++
				}
			}
		}
		if text := tooEarly(events); text != "" {
			e.Errorf("key %s: %s", key, text)
		}
		switch porcupine.CheckOperationsTimeout(model(), ops, 30*time.Second) {
		case porcupine.Illegal:
			e.Errorf("the history of key %s has no order:", key)
			for _, ev := range events {
				e.Logf("  %d: %v..%v %+v: %+v", ev.client, ev.asked, ev.heard, ev.call, ev.answer)
			}
		case porcupine.Unknown:
			e.Logf("the history of key %s, %d calls, takes too long to check", key, len(events))
		case porcupine.Ok:
		}
	}
	e.Logf("saw %v", saw)
	if saw["owned"] == 0 {
		e.Error("nobody ever owned a key")
	}
}

// tooEarly finds an owner that was succeeded, or told that it had lost its key, before its lease had ended. The lease was given, or
// renewed, after it was asked for; the successor was the owner before it heard of it.
func tooEarly(events []event) string {
	type owner struct {
		fence        int64
		heard, until time.Duration
	}
	var owners []owner
	for _, ev := range events {
		if fence := ev.answer.fence; fence != 0 {
			owners = append(owners, owner{fence, ev.heard, ev.asked + short})
		}
	}
	slices.SortFunc(owners, func(a, b owner) int { return int(a.fence - b.fence) })
	for _, ev := range events {
		i := slices.IndexFunc(owners, func(o owner) bool { return o.fence == ev.call.fence })
		switch {
		case i < 0:
		case ev.lost && ev.heard < owners[i].until:
			return fmt.Sprintf("owner %d had it until %v, and was told at %v that it has lost it", owners[i].fence, owners[i].until, ev.heard)
		case ev.lost:
		case ev.verb == releases, ev.verb == completes:
			owners[i].until = 0
		case ev.verb == renews && !ev.unknown && owners[i].until > 0:
			owners[i].until = max(owners[i].until, ev.asked+short)
		}
	}
	for i := range owners {
		if i > 0 && owners[i].heard < owners[i-1].until {
			return fmt.Sprintf("owner %d had it until %v, owner %d before %v",
				owners[i-1].fence, owners[i-1].until, owners[i].fence, owners[i].heard)
		}
	}
	return ""
}
