package outbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

const (
	// readAhead is how many pages are in memory: one is being published while the next is read.
	readAhead = 2

	pollMin = 2 * time.Millisecond

	// wakeDelay is from a Publish in this process to the look at the database: about the time to a commit, and long
	// enough that many writers share a look.
	wakeDelay = time.Millisecond

	// lookGap is the least time between two looks that found something, for the same reason. A look takes about as long,
	// and a shorter timer may take a millisecond.
	lookGap = 250 * time.Microsecond
)

var errServerRestarted = errors.New("outbox: the database server was restarted")

// lead reads pages and has them sent until stop ends, which is a nil error, or the term does.
func (t *term) lead(stop context.Context) error {
	t.r.oldest.Store(0)
	t.measure()
	t.r.leading.Store(true)
	defer t.r.leading.Store(false)
	defer t.openDirect()()
	defer t.conn.Release()
	defer t.expiry.Stop()

	// Waits between attempts end with quit, publishes only with the lease or the drain time-out.
	quit, cancelQuit := context.WithCancel(t.ctx)
	defer context.AfterFunc(stop, cancelQuit)()
	publishing, cancelPublishing := context.WithCancel(t.ctx)

	var sender sync.WaitGroup
	sender.Go(func() { t.r.listen(quit) })
	sender.Go(func() {
		gaveUp := false // then what follows may not overtake
		for p := range t.pages {
			res := result{page: p, gaveUp: true}
			if !gaveUp {
				res = t.send(publishing, quit, p)
			}
			if gaveUp = res.gaveUp; !gaveUp {
				t.tail.accepted(p)
			}
			t.results <- res
		}
	})

	var watcher sync.WaitGroup
	if t.tail != nil {
		watcher.Go(func() { t.tail.run(t.ctx, func() { t.cancel(errTailLost) }) })
	}

	err := t.loop(stop)
	t.endFeed()
	if err == nil {
		err = t.drain(cancelPublishing)
	}
	if err == nil {
		err = t.seal()
	}
	if err != nil && t.ctx.Err() != nil { // whatever was broken off, this is why
		err = context.Cause(t.ctx)
	}
	t.cancel(err)
	t.closeFeed()
	cancelQuit()
	cancelPublishing()
	close(t.pages)
	sender.Wait()
	if t.tail != nil {
		close(t.tail.jobs)
		watcher.Wait()
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(stop), t.r.cfg.LeaseTTL)
	defer cancel()
	if err := t.lastMark(ctx); err != nil {
		t.r.log.InfoContext(ctx, "no last mark: the next relay sends the last messages again", "error", err)
	}
	if err := t.write(ctx, true); err != nil {
		t.r.log.WarnContext(ctx, "the lease was not given back: the next relay waits until it runs out", "error", err)
	}
	t.expiry.Stop()
	return nil
}

// loop is the work of a term: look, read ahead, settle what was sent, write the cursor, keep the ring.
func (t *term) loop(stop context.Context) error {
	tick := time.NewTicker(writeInterval)
	defer tick.Stop()
	poll := time.NewTimer(0)
	defer poll.Stop()
	due, interval, next, looked := true, pollMin, time.Now(), time.Now()
	soon := func(d time.Duration) { // but never later than planned: wakes may be dense
		if t.feeding.feed != nil { // which tells by itself
			return
		}
		interval = pollMin
		if at := time.Now().Add(d); !due && at.Before(next) {
			next = at
			poll.Reset(d)
		}
	}
	look := func() {
		if wait := time.Until(looked.Add(lookGap)); wait > 0 || t.feeding.feed != nil {
			soon(wait)
		} else {
			due, interval = true, pollMin
		}
	}

	for stop.Err() == nil {
		if err := t.follow(); err != nil {
			return err
		}
		if due && t.feeding.feed != nil {
			pause, err := t.checkFeed()
			if err != nil {
				return err
			}
			due, interval, next = false, pollMin, time.Now().Add(pause)
			poll.Reset(pause)
		}
		for due && t.inFlight < readAhead && stop.Err() == nil {
			found, err := t.read()
			if err != nil {
				return err
			}
			if found == more {
				continue
			}
			if found == some { // what comes now can share a look
				interval, looked = pollMin, time.Now()
			}
			due, next = false, time.Now().Add(interval)
			poll.Reset(interval)
			interval = min(2*interval, t.r.cfg.PollInterval)
			if err := t.seekFeed(); err != nil {
				return err
			}
		}
		if err := t.writeIfDue(); err != nil {
			return err
		}
		t.askForMark()
		if t.r.brief && t.rests() {
			return nil
		}
		select {
		case res := <-t.results:
			if err := t.settle(res); err != nil {
				return err
			}
		case job := <-t.marks():
			if err := t.mark(t.ctx, job); err != nil {
				return err
			}
		case <-poll.C:
			due = true
		case <-t.feeding.came():
		case o := <-t.feeding.opened:
			t.startFeed(o)
		case <-t.r.outbox.wake:
			t.busy = time.Now()
			soon(wakeDelay)
		case <-t.direct.came:
			if !t.sendDirect() {
				look()
			} else if len(t.early) > 0 || t.inFlight > 0 {
				soon(directLook)
			}
		case <-t.r.outbox.committed:
			t.busy = time.Now()
			look()
		case <-tick.C:
			t.keepFeed()
			if err := t.keepRing(); err != nil {
				return err
			}
		case <-stop.Done():
		case <-t.ctx.Done():
			return context.Cause(t.ctx)
		}
	}
	return nil
}

// rests says if there is nothing to do, as it is written, and was nothing for a while: outboxNews would not find anything.
func (t *term) rests() bool {
	if t.inFlight > 0 || t.unwritten > 0 || len(t.early) > 0 || time.Since(t.busy) < rest {
		return false
	}
	return t.paused || t.done.scan == nil && t.reading.scan == nil && t.highest <= t.done.floor
}

// drain waits for the pages in flight: one that is being published is finished, one behind it is given up.
func (t *term) drain(cancelPublishing context.CancelFunc) error {
	timeout := time.AfterFunc(t.r.cfg.DrainTimeout, cancelPublishing)
	defer timeout.Stop()
	tick := time.NewTicker(writeInterval)
	defer tick.Stop()
	for t.inFlight > 0 {
		select {
		case res := <-t.results:
			if err := t.settle(res); err != nil {
				return err
			}
		case <-tick.C:
			if err := t.writeIfDue(); err != nil {
				return err
			}
		case <-t.ctx.Done():
			return context.Cause(t.ctx)
		}
	}
	return nil
}

// settle takes the news of a page: the cursor moves behind it, once its dead letters are safe.
func (t *term) settle(res result) error {
	if t.inFlight--; t.inFlight == 0 {
		poke(t.direct.came) // what waited meanwhile
	}
	if res.gaveUp {
		return nil // the term ends; the page is read again by the next one
	}
	if len(res.dead) > 0 {
		if err := t.bury(res.dead); err != nil {
			return err
		}
	}
	t.done = res.page.after
	if len(res.page.rows) > 0 {
		t.busy = time.Now()
	}
	t.tail.note(res)
	t.unwritten += len(res.page.rows)
	t.r.published.Add(uint64(len(res.page.rows) - len(res.dead) - res.kept))
	t.r.died.Add(uint64(len(res.dead)))
	t.settled = max(t.settled, res.page.upTo)
	t.measure()
	if t.inFlight == 0 {
		t.r.oldest.Store(0)
	} else {
		t.r.oldest.Store(t.behind)
	}
	return nil
}

// measure updates the depth that Stats tells.
func (t *term) measure() { t.r.depth.Store(max(0, t.highest-t.settled)) }

// bury copies rows to the dead letters.
func (t *term) bury(dead []refusal) error {
	ids, causes := make([]int64, len(dead)), make([]string, len(dead))
	for i, d := range dead {
		ids[i], causes[i] = d.row.id, text(d.cause)
		t.r.log.LogAttrs(t.ctx, slog.LevelWarn, "message refused for good, moved to the dead letters",
			slog.Int64("number", d.row.id), slog.String("topic", d.row.topic), slog.Any("error", d.cause))
	}
	if _, err := t.conn.Exec(t.ctx, t.r.outbox.q.dead, ids, causes); err != nil {
		return fmt.Errorf("outbox: move %d rows to the dead letters: %w", len(dead), err)
	}
	return nil
}
