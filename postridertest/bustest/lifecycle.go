package bustest

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

func slowHandlerDoesNotLoseItsBatch(e *env) {
	const ackWait = time.Second
	b := e.open()
	var begun, j journal
	finish := make(chan struct{})
	e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		begun.add(ev)
		if ev.Value.N == 0 {
			<-finish
		}
		j.add(ev)
		return nil
	}), bus.AckWait(ackWait), bus.Concurrency(2), all))
	e.publish(b, numbered(0, 20)...)
	e.run(b)
	e.eventually("neighbours of the slow one", j.count, 19)
	<-time.After(3 * ackWait) // it would come twice meanwhile
	close(finish)
	j.once(e, 20)
	begun.once(e, 20)
}

func closeInMidBatchLosesNothing(e *env) {
	const rounds, each = 5, 60
	const ackWait = 10 * time.Minute // a message that a closed instance kept would come too late
	tokens := make(chan struct{})
	var j journal
	deploy := func() (stop func() error) {
		b := e.open()
		e.must(b.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
			<-tokens
			j.add(ev)
			return nil
		}), bus.AckWait(ackWait), bus.Concurrency(4), all))
		return e.run(b)
	}
	p := e.open()
	for r := range rounds { // rolling deploys in the middle of the work
		e.publish(p, numbered(r*each, each)...)
		stop := deploy()
		for range 20 {
			tokens <- struct{}{}
		}
		done := make(chan error, 1)
		go func() { done <- stop() }()
		for draining := true; draining; {
			select {
			case tokens <- struct{}{}:
			case err := <-done:
				e.must(err)
				draining = false
			}
		}
	}
	deploy()
	close(tokens)
	j.once(e, rounds*each) // and a clean drain doubles nothing
}

func closeUnderLoadDoesNotPanic(e *env) {
	const publishers, each = 8, 40
	var j journal
	var accepted atomic.Int64
	first, second := e.open(), e.open()
	e.must(first.Subscribe(j.handler(), all))
	stop := e.run(first)
	var wg sync.WaitGroup
	for p := range publishers {
		wg.Go(func() {
			for i := range each {
				if err := written.Publish(e.Context(), first, &note{N: p*each + i}); err == nil {
					accepted.Add(1)
				}
			}
		})
	}
	postridertest.Eventually(e.T, func() error {
		if j.count() == 0 {
			return errWeather
		}
		return nil
	})
	e.must(stop())
	wg.Wait()
	e.must(second.Subscribe(j.handler(), all))
	e.run(second)
	j.once(e, int(accepted.Load()))
	if accepted.Load() != publishers*each {
		e.Errorf("%d of %d messages were accepted: a bus publishes also after Run", accepted.Load(), publishers*each)
	}
	if e.Crash == nil {
		return
	}
	// The connection breaks under load: an error, not a panic.
	wg.Go(func() { e.crash(first) })
	for range publishers {
		wg.Go(func() {
			for range each {
				_ = written.Publish(e.Context(), first, &note{N: -1})
			}
		})
	}
	wg.Wait()
	if err := written.Publish(e.Context(), first, &note{N: -1}); err == nil {
		e.Error("a bus without a connection has published")
	}
}

func shutdownDoesNotCancelHandlers(e *env) {
	b := e.open()
	started, finish := make(chan struct{}), make(chan struct{})
	var early, late error
	e.must(b.Subscribe(written.Handler(func(ctx context.Context, _ postrider.Event[note]) error {
		close(started)
		select {
		case <-finish:
		case <-ctx.Done():
			early = ctx.Err()
		}
		late = written.Publish(ctx, b, &note{N: 1}) // its last message goes out
		return nil
	}), bus.Group("slow"), all))
	stop := e.run(b)
	e.publish(b, &note{})
	<-started
	done := make(chan error, 1)
	go func() { done <- stop() }()
	select {
	case err := <-done:
		e.Fatalf("Run returned (%v) while a handler was running", err)
	case <-time.After(100 * time.Millisecond):
	}
	close(finish)
	e.must(<-done)
	e.must(early)
	e.must(late)
	var j journal
	next := e.open()
	e.must(next.Subscribe(j.handler(), bus.Group("slow"), all))
	e.run(next)
	e.eventually("notes for the next instance: not the one that was handled", j.count, 1)
	if got := j.all()[0]; got.N != 1 {
		e.Errorf("the next instance got note %d, which the first one had handled", got.N)
	}
}

func restartReplaysNothing(e *env) {
	var j journal
	first := e.open()
	e.must(first.Subscribe(j.handler(), all, bus.Concurrency(1)))
	stop := e.run(first)
	e.publish(first, numbered(0, 20)...)
	e.eventually("notes", j.count, 20)
	e.must(stop())
	e.publish(first, numbered(20, 5)...) // while nobody is there
	if e.Restart != nil {
		e.Restart()
	}
	second := e.open()
	e.must(second.Subscribe(j.handler(), all, bus.Concurrency(1)))
	e.run(second)
	e.publish(second, numbered(25, 5)...)
	j.once(e, 30)
}

func crashedWorkersMessagesComeBack(e *env) {
	if e.Crash == nil {
		e.Skip("this implementation cannot crash")
	}
	const ackWait, messages = time.Second, 20
	opts := []bus.SubscribeOption{bus.AckWait(ackWait), bus.Concurrency(4), all}
	victim, heir := e.open(), e.open()
	var begun, j journal
	finish := make(chan struct{})
	e.must(victim.Subscribe(written.Handler(func(_ context.Context, ev postrider.Event[note]) error {
		begun.add(ev)
		<-finish
		return nil
	}), opts...))
	e.publish(heir, numbered(0, messages)...)
	e.run(victim)
	e.eventually("notes in the hands of the one that will crash", begun.count, 4)
	e.crash(victim)
	crashed := time.Now()
	e.must(heir.Subscribe(j.handler(), opts...))
	e.run(heir)
	j.once(e, messages)
	took := time.Since(crashed)
	e.Logf("with an AckWait of %v all messages were handled %v after the crash", ackWait, took)
	if e.bubble && took > ackWait+ackWait/2 {
		e.Errorf("they came back only after %v", took)
	}
	again := 0
	for _, s := range j.all() {
		if s.attempt > 1 {
			again++
		}
	}
	if again < 4 {
		e.Errorf("%d messages say that they were delivered before, want those that the dead process held", again)
	}
	close(finish) // what the dead still return counts for nothing
}

func faultsLoseNothing(e *env) {
	const messages = 100
	faults := postridertest.Faults{Seed: 1, Duplicate: 0.2, Delay: 5 * time.Millisecond, Reorder: 0.2, FailAck: 0.2}
	b := e.open(func(c *bus.Config) { c.Middleware = []postrider.Middleware{faults.Middleware()} })
	var j journal
	e.must(b.Subscribe(j.handler(), quick, all))
	e.run(b)
	p := faults.Publisher(b)
	for i := range messages {
		m, err := written.Message(e.Context(), &note{N: i})
		e.must(err)
		for err = p.Publish(e.Context(), m); err != nil; { // the same message until it is acknowledged
			err = p.Publish(e.Context(), m)
		}
	}
	e.eventually("notes", j.distinct, messages)
	// Publishing twice is stored once; each message is handled at most four times: twice, and all again.
	if n := j.count(); n <= messages || n > 4*messages {
		e.Errorf("%d notes were handled %d times: want more, since a fifth comes twice and a fifth is tried again", messages, n)
	}
	e.letters(b, 0)
}

// fencesGrow has the handler of an ordered subscription tell a new owner of its key from an old one.
func fencesGrow(e *env) {
	if e.Crash == nil {
		e.Skip("the broker has no Crash")
	}
	var first, second, none journal
	fence := func(j *journal) postrider.Handler {
		return written.Handler(func(_ context.Context, v postrider.Event[note]) error {
			v.Value.N = int(v.Delivery.Fence)
			j.add(v)
			return nil
		})
	}
	old, replacement := e.open(), e.open()
	e.must(old.Subscribe(fence(&first), bus.Ordered(), all))
	e.must(old.Subscribe(fence(&none), bus.Group("unordered"), all))
	e.must(replacement.Subscribe(fence(&second), bus.Ordered(), all))
	_ = e.run(old)
	e.publish(old, numbered(0, 1)...)
	e.eventually("handled by the first", first.count, 1)
	e.eventually("handled without order", none.count, 1)
	e.crash(old)
	_ = e.run(replacement)
	e.publish(replacement, numbered(1, 1)...)
	e.eventually("handled by the second", func() int { return min(second.count(), 1) }, 1)
	if f, s := first.all()[0].N, second.all()[0].N; f == 0 || s <= f {
		e.Errorf("the fence was %d, and %d for another owner: want it to grow", f, s)
	}
	if n := none.all()[0].N; n != 0 {
		e.Errorf("without order the fence is %d, want 0", n)
	}
}
