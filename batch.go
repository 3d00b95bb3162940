package postrider

import (
	"context"
	"slices"
	"time"
)

// batch is what a handler of batches does with the events of one.
type batch struct {
	run func(ctx context.Context, events []any) error
}

// BatchHandler makes a handler of fn that gets several events at a time, for work that costs less when it is done for many
// at once. It is for a bus; the option bus.Batch says how many, and how long they are waited for. When fn returns nil all
// are acknowledged. A *[BatchError] with one entry for each event, in their order, tells the fate of each: those without an
// error are acknowledged, each other one is retried or ends in the dead letters by its own error. Any other error, a wrapped
// *BatchError too, and a panic is that of all of them. fn must be safe for concurrent use.
// BatchHandler panics if it is nil.
//
// What an event fails by itself, such as data that cannot be decoded, is settled without fn, which gets the others.
// Middleware stands around each event, and around all events of a batch at the same time: fn runs when all have come through
// it, or after 100 ms with those that have. So middleware that lets only a few through at a time makes the batches small,
// and blocks nobody. The context of fn has the earliest deadline that middleware has set, and nothing else from there. It is
// that of no one event: what fn publishes is linked to an event under [ContextWithMessage](ctx, e.Message).
func (t *Topic[T]) BatchHandler(fn func(ctx context.Context, events []Event[T]) error) Handler {
	needFunction(t.name, fn == nil)
	b := &batch{run: func(ctx context.Context, items []any) error {
		events := make([]Event[T], len(items))
		for i, item := range items {
			events[i] = item.(Event[T]) //nolint:forcetypeassert // decoded below
		}
		return fn(ctx, events)
	}}
	h := newHandler(t.name, t.name, false, func(ctx context.Context, m *Message) (*Message, error) {
		e, err := t.Decode(m)
		if err != nil {
			return nil, err
		}
		return nil, b.join(ctx, e)
	})
	h.batch = b
	return h
}

// IsBatch reports whether it takes several events at a time: see [Handler.HandleBatch].
func (h Handler) IsBatch() bool { return h.batch != nil }

// HandleBatch runs a handler made by [Topic.BatchHandler] on messages, and returns what became of each. Those that its
// middleware sends on are handled together. The errors of a handler that is none of batches are FailedPrecondition.
func (h Handler) HandleBatch(ctx context.Context, msgs []*Message) []error {
	errs := make([]error, len(msgs))
	if h.batch == nil {
		err := Errorf(FailedPrecondition, "handle %d messages: %q takes one at a time: make it with Topic.BatchHandler", len(msgs), h.name)
		for i := range errs {
			errs[i] = err
		}
		return errs
	}
	if len(msgs) == 1 {
		_, errs[0] = h.Handle(ctx, msgs[0])
		return errs
	}
	t := &table{arrived: make(chan *guest), left: make(chan struct{}), over: make(chan struct{})}
	defer close(t.over)
	for i, m := range msgs {
		errs[i] = errNoOutcome
		go func() {
			defer func() { t.left <- struct{}{} }()
			_, errs[i] = h.Handle(context.WithValue(ctx, h.batch, seat{t, i}), m)
		}()
	}
	t.serve(ctx, h, len(msgs))
	return errs
}

// errNoOutcome stays that of a message whose goroutine was ended, by runtime.Goexit.
var errNoOutcome = Errorf(Internal, "the handler has not returned") //nolint:gochecknoglobals // constant

// table is where the messages of a batch meet. Each goes its own way through the middleware, in its own goroutine, and at
// the end of it waits until those that are still on their way have come too, or have turned back. Then the function runs
// once for all that wait, and each takes its own outcome on its way back.
//
//	message --middleware--> join --+
//	message --middleware--> join --+--> run --> outcomes
//	message --middleware (a duplicate, cannot be decoded)--> left
type table struct {
	arrived chan *guest
	left    chan struct{}
	over    chan struct{} // closed when all messages have left
}

// seat is the place of a message in its batch.
type seat struct {
	*table
	place int
}

// guest is an event that waits for its outcome.
type guest struct {
	place   int
	ctx     context.Context //nolint:containedctx // for its deadline, while join waits
	event   any
	outcome chan error
}

// lateAfter is how long those that have come wait for those that have not.
const lateAfter = 100 * time.Millisecond

// serve runs the function for those that have come, again and again until all n have left: middleware may come twice.
func (t *table) serve(ctx context.Context, h Handler, n int) {
	var waiting []*guest
	var late <-chan time.Time
	for n > 0 {
		full := false
		select {
		case g := <-t.arrived:
			if waiting = append(waiting, g); late == nil {
				late = time.After(lateAfter)
			}
		case <-t.left:
			n--
		case <-late:
			full = true
		}
		if len(waiting) > 0 && (full || len(waiting) >= n) {
			h.runBatch(ctx, waiting)
			waiting, late = nil, nil
		}
	}
}

// join waits for the outcome of an event. One that is handled by itself is a batch of one.
func (b *batch) join(ctx context.Context, event any) error {
	s, ok := ctx.Value(b).(seat)
	if !ok {
		return batchOutcomes(b.run(ctx, []any{event}), 1)[0]
	}
	g := &guest{place: s.place, ctx: ctx, event: event, outcome: make(chan error, 1)}
	select {
	case s.arrived <- g:
	case <-s.over:
		return errNoOutcome
	}
	select {
	case err := <-g.outcome:
		return err
	case <-s.over: // middleware went on without it
		return errNoOutcome
	}
}

// runBatch runs the function and tells each event its outcome.
func (h Handler) runBatch(ctx context.Context, guests []*guest) {
	slices.SortFunc(guests, func(a, b *guest) int { return a.place - b.place })
	events := make([]any, len(guests))
	var earliest time.Time
	for i, g := range guests {
		events[i] = g.event
		if d, ok := g.ctx.Deadline(); ok && (earliest.IsZero() || d.Before(earliest)) {
			earliest = d
		}
	}
	if !earliest.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, earliest)
		defer cancel()
	}
	run := func(ctx context.Context, _ *Message) (*Message, error) { return nil, h.batch.run(ctx, events) }
	_, err := protect(h.name, run)(ctx, nil)
	for i, err := range batchOutcomes(err, len(guests)) {
		guests[i].outcome <- err
	}
}

// batchOutcomes returns what a function for n events has said about each. A *BatchError that it has wrapped is of something
// else, or of all: no event is taken for handled by mistake.
func batchOutcomes(err error, n int) []error {
	if b, ok := err.(*BatchError); ok { //nolint:errorlint // see above
		if len(b.Errs) == n {
			return b.Errs
		}
		err = Errorf(Internal, "the BatchError has %d entries for %d events: want one for each, in their order: %w", len(b.Errs), n, err)
	}
	errs := make([]error, n)
	for i := range errs {
		errs[i] = err
	}
	return errs
}
