package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/idempotency"
	"github.com/postrider/postrider/postridertest"
)

// lease is a long one in tests that do not wait for its end, and short the shortest.
const (
	lease = 5 * time.Minute
	short = time.Second
)

var promises = []struct {
	name string
	test func(*env)
}{
	{"OutcomeIsForAll", outcomeIsForAll},
	{"OutcomesComeBackAsTheyWere", outcomesComeBackAsTheyWere},
	{"KeysAreIndependent", keysAreIndependent},
	{"OneOfManyOwnsAKey", oneOfManyOwnsAKey},
	{"ReleasedKeyIsFree", releasedKeyIsFree},
	{"ClaimIsRepeatedByItsOwner", claimIsRepeatedByItsOwner},
	{"StrangersAreRefused", strangersAreRefused},
	{"DeadOwnerIsSucceeded", deadOwnerIsSucceeded},
	{"RenewedLeaseHolds", renewedLeaseHolds},
	{"EndedContextIsNoLoss", endedContextIsNoLoss},
	{"HistoriesAreLinearizable", historiesAreLinearizable},
}

// Run tests a store. open is called once a subtest, at the same time as others, and returns an empty store and a function that
// cuts its connections: they break, with requests and answers on their way, and can be made again at once. Without that function
// nothing breaks.
func Run(t *testing.T, open func(t testing.TB) (store idempotency.Records, cut func())) {
	t.Helper()
	for _, p := range promises {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			store, cut := open(t)
			p.test(&env{T: t, store: store, cut: cut})
		})
	}
}

type env struct {
	*testing.T

	store idempotency.Records
	cut   func()
}

func (e *env) claim(key, request string, lease time.Duration) idempotency.Claim {
	e.Helper()
	return e.claimAs(key, postrider.NewID(), request, lease)
}

func (e *env) claimAs(key, owner, request string, lease time.Duration) idempotency.Claim {
	e.Helper()
	c, err := e.store.Claim(e.Context(), key, owner, []byte(request), lease)
	if err != nil {
		e.Fatalf("claim %q: %v", key, err)
	}
	if (c.Fence != 0) == (c.Request != nil) || c.Fence < 0 || c.Fence != 0 && c.Outcome != nil {
		e.Fatalf("claim %q: %+v is neither ours nor another's", key, c)
	}
	return c
}

// own claims a key that must be free.
func (e *env) own(key, request string, lease time.Duration) (fence int64) {
	e.Helper()
	c := e.claim(key, request, lease)
	if c.Fence == 0 {
		e.Fatalf("claim %q: %+v, want it to be free", key, c)
	}
	return c.Fence
}

// busy claims a key that must have an owner.
func (e *env) busy(key, request string) {
	e.Helper()
	for _, r := range []string{request, "another"} {
		c := e.claim(key, r, lease)
		if c.Fence != 0 || c.Outcome != nil || string(c.Request) != request {
			e.Fatalf("claim %q: %+v, want the owner's request %q", key, c, request)
		}
	}
}

func (e *env) must(err error) {
	e.Helper()
	if err != nil {
		e.Fatal(err)
	}
}

func (e *env) lost(what string, err error) {
	e.Helper()
	if !errors.Is(err, idempotency.ErrLost) || !errors.Is(err, postrider.Aborted) {
		e.Fatalf("%s: error %v, want ErrLost", what, err)
	}
}

// successor claims a key until it has it.
func (e *env) successor(key string) (fence int64) {
	e.Helper()
	postridertest.Eventually(e, func() error {
		c := e.claim(key, "r", lease)
		if fence = c.Fence; fence == 0 {
			return fmt.Errorf("the key is not free: %+v", c)
		}
		return nil
	})
	return fence
}

func outcomeIsForAll(e *env) {
	fence := e.own("k", "r", lease)
	e.busy("k", "r")
	o := idempotency.Outcome{ContentType: "text/plain", Data: []byte("done")}
	e.must(e.store.Complete(e.Context(), "k", fence, o))
	e.must(e.store.Complete(e.Context(), "k", fence, o)) // as after an answer that was lost
	for _, request := range []string{"r", "other"} {
		c := e.claim("k", request, lease)
		if c.Outcome == nil || string(c.Outcome.Data) != "done" || c.Outcome.ContentType != "text/plain" || c.Outcome.Refused || string(c.Request) != "r" {
			e.Fatalf("claim after completion: %+v", c)
		}
	}
	e.lost("renew after completion", e.store.Renew(e.Context(), "k", fence, lease))
	e.lost("release after completion", e.store.Release(e.Context(), "k", fence))
	if c := e.claim("k", "r", lease); c.Outcome == nil {
		e.Fatalf("claim after all that: %+v", c)
	}
}

func outcomesComeBackAsTheyWere(e *env) {
	for i, want := range []idempotency.Outcome{
		{},
		{Refused: true, ContentType: "application/json", Data: []byte(`{"code":"NOT_FOUND","message":"Größe"}`)},
		{ContentType: "application/octet-stream", Data: []byte{0, 255, '\r', '\n', 0}},
		{ContentType: "text/plain", Data: bytes.Repeat([]byte("0123456789abcdef"), 1<<14)}, // 256 KiB
	} {
		key := fmt.Sprint("k", i)
		e.must(e.store.Complete(e.Context(), key, e.own(key, "r", lease), want))
		c := e.claim(key, "r", lease)
		if o := c.Outcome; o == nil || o.Refused != want.Refused || o.ContentType != want.ContentType || !bytes.Equal(o.Data, want.Data) {
			e.Errorf("outcome %d came back as %.100v", i, o)
		}
	}
}

func keysAreIndependent(e *env) {
	fences := map[string]int64{}
	for _, key := range []string{
		"k", "K", "k ", " k", "k.", "k.*", "k.>", "*", ">", "k/1", "größe", "Größe", "'", `"`, `\`, "%", "k\n", "a=b",
		strings.Repeat("long ", 200), strings.Repeat("long ", 199) + "longe",
	} {
		fences[key] = e.own(key, "r"+key[:1], lease)
	}
	for key, fence := range fences {
		e.busy(key, "r"+key[:1])
		e.must(e.store.Complete(e.Context(), key, fence, idempotency.Outcome{Data: []byte(key)}))
	}
	for key := range fences {
		if c := e.claim(key, "r", lease); c.Outcome == nil || string(c.Outcome.Data) != key {
			e.Errorf("key %q: %+v", key, c)
		}
	}
	for _, key := range []string{"", strings.Repeat("k", 10_000)} {
		if _, err := e.store.Claim(e.Context(), key, "me", []byte("r"), lease); !errors.Is(err, postrider.InvalidArgument) {
			e.Errorf("a key of %d bytes: error %v, want InvalidArgument", len(key), err)
		}
	}
}

func oneOfManyOwnsAKey(e *env) {
	var last int64
	for round := range 5 {
		var mu sync.Mutex
		var fences []int64
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				c, err := e.store.Claim(e.Context(), "k", postrider.NewID(), []byte("r"), lease)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err != nil:
					e.Errorf("claim: %v", err)
				case c.Fence != 0:
					fences = append(fences, c.Fence)
				}
			})
		}
		wg.Wait()
		if len(fences) != 1 || fences[0] <= last {
			e.Fatalf("round %d: owners %v after %d, want a single higher one", round, fences, last)
		}
		last = fences[0]
		e.must(e.store.Release(e.Context(), "k", last))
	}
}

func releasedKeyIsFree(e *env) {
	first := e.own("k", "r", lease)
	e.must(e.store.Release(e.Context(), "k", first))
	e.lost("a second release", e.store.Release(e.Context(), "k", first))
	e.lost("complete after release", e.store.Complete(e.Context(), "k", first, idempotency.Outcome{}))
	e.lost("renew after release", e.store.Renew(e.Context(), "k", first, lease))
	second := e.own("k", "other", lease)
	if second <= first {
		e.Fatalf("fence %d after %d", second, first)
	}
	e.lost("release of another's key", e.store.Release(e.Context(), "k", first))
	e.lost("completion of another's key", e.store.Complete(e.Context(), "k", first, idempotency.Outcome{}))
	e.busy("k", "other")
	e.must(e.store.Complete(e.Context(), "k", second, idempotency.Outcome{}))
}

// claimIsRepeatedByItsOwner is about an owner that has not heard that it is.
func claimIsRepeatedByItsOwner(e *env) {
	began := time.Now()
	fence := e.claimAs("k", "me", "r", short).Fence
	for range 2 {
		if c := e.claimAs("k", "me", "r", lease); c.Fence != fence {
			e.Fatalf("claim again: %+v, want fence %d", c, fence)
		}
	}
	e.busy("k", "r")
	e.must(e.store.Renew(e.Context(), "k", fence, lease))
	<-time.After(time.Until(began.Add(2 * short))) // the first lease has ended, the last one has not
	e.busy("k", "r")
	e.must(e.store.Release(e.Context(), "k", fence))
	next := e.claimAs("k", "me", "r", lease)
	if next.Fence <= fence {
		e.Fatalf("fence %d after %d", next.Fence, fence)
	}
	e.must(e.store.Complete(e.Context(), "k", next.Fence, idempotency.Outcome{Data: []byte("done")}))
	if c := e.claimAs("k", "me", "r", lease); c.Outcome == nil {
		e.Fatalf("claim after completion: %+v", c)
	}
	if first, second := e.claimAs("unnamed", "", "r", lease), e.claimAs("unnamed", "", "r", lease); first.Fence == 0 || second.Fence != 0 {
		e.Fatalf("callers without a name: %+v, %+v", first, second)
	}
}

func strangersAreRefused(e *env) {
	fence := e.own("k", "r", lease)
	for _, tt := range []struct {
		key   string
		fence int64
	}{{"nobody's", 1}, {"nobody's", 0}, {"k", fence + 1}, {"k", fence - 1}, {"k", 0}, {"k", -1}} {
		what := fmt.Sprintf(" of %q with fence %d", tt.key, tt.fence)
		e.lost("renew"+what, e.store.Renew(e.Context(), tt.key, tt.fence, lease))
		e.lost("complete"+what, e.store.Complete(e.Context(), tt.key, tt.fence, idempotency.Outcome{}))
		e.lost("release"+what, e.store.Release(e.Context(), tt.key, tt.fence))
	}
	e.busy("k", "r")
	e.must(e.store.Renew(e.Context(), "k", fence, lease))
}

func deadOwnerIsSucceeded(e *env) {
	began := time.Now()
	first := e.own("k", "r", short)
	second := e.successor("k")
	if took := time.Since(began); took < short || second <= first {
		e.Fatalf("fence %d after %d, and %v after a lease of %v was given", second, first, took, short)
	}
	e.lost("renew of the dead", e.store.Renew(e.Context(), "k", first, lease))
	e.lost("release of the dead", e.store.Release(e.Context(), "k", first))
	e.lost("complete of the dead", e.store.Complete(e.Context(), "k", first, idempotency.Outcome{Data: []byte("first")}))
	e.must(e.store.Complete(e.Context(), "k", second, idempotency.Outcome{Data: []byte("second")}))
	e.lost("complete of the dead, too late", e.store.Complete(e.Context(), "k", first, idempotency.Outcome{Data: []byte("first")}))
	if c := e.claim("k", "r", lease); c.Outcome == nil || string(c.Outcome.Data) != "second" {
		e.Fatalf("the outcome is %+v", c)
	}
}

func renewedLeaseHolds(e *env) {
	renewed := time.Now()
	fence := e.own("k", "r", 2*short)
	for began := renewed; time.Since(began) < 4*short; {
		c := e.claim("k", "r", 2*short)
		switch stalled := time.Since(renewed) >= 2*short; {
		case stalled:
			e.Skip("this machine stood still for as long as a lease")
		case c.Fence != 0:
			e.Fatalf("it was taken %v after a renewal for %v", time.Since(renewed), 2*short)
		}
		if time.Since(renewed) > short/2 {
			sent := time.Now()
			e.must(e.store.Renew(e.Context(), "k", fence, 2*short))
			renewed = sent
		}
		<-time.After(20 * time.Millisecond)
	}
	next := e.successor("k")
	if took := time.Since(renewed); took < 2*short || next <= fence {
		e.Fatalf("fence %d after %d, and %v after a renewal for %v", next, fence, took, 2*short)
	}
}

func endedContextIsNoLoss(e *env) {
	fence := e.own("k", "r", lease)
	ctx, cancel := context.WithCancel(e.Context())
	cancel()
	_, err := e.store.Claim(ctx, "k", "me", []byte("r"), lease)
	for what, err := range map[string]error{
		"claim": err, "renew": e.store.Renew(ctx, "k", fence, lease),
		"complete": e.store.Complete(ctx, "k", fence, idempotency.Outcome{}), "release": e.store.Release(ctx, "k", fence),
	} {
		if errors.Is(err, idempotency.ErrLost) || !errors.Is(err, postrider.Canceled) {
			e.Errorf("%s with an ended context: %v, want Canceled", what, err)
		}
	}
	e.busy("k", "r")
	e.must(e.store.Complete(e.Context(), "k", fence, idempotency.Outcome{}))
}
