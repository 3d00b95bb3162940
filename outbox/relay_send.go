package outbox

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/backoff"
)

// result is what became of a page.
type result struct {
	page   page
	dead   []refusal // those of its rows that were refused for good
	kept   int       // those that need not be sent again
	gaveUp bool      // the page is not done
}

// refusal is a row that will never be sent.
type refusal struct {
	row   row
	cause error
}

// warnAfter is how many failed attempts are more than a hiccup.
const warnAfter = 3

// send publishes a page until each message is accepted, or refused for good, or quit ends. Order per key: behind a
// message that failed, those of the same key count as failed too, even if they were accepted; sent again after it they are
// duplicates by their ids, while the consumer that was given them too early is told by none.
func (t *term) send(ctx, quit context.Context, p page) result {
	r := t.r
	res := result{page: p}
	pending := make([]row, 0, len(p.rows))
	for _, row := range p.rows {
		switch {
		case row.err != nil:
			res.dead = append(res.dead, refusal{row, row.err})
		case row.kept != nil && row.kept.holds(ctx, t.tail.pub, row):
			res.kept++
		default:
			pending = append(pending, row)
		}
	}
	for attempt := 1; len(pending) > 0; attempt++ {
		if quit.Err() != nil {
			return result{page: p, gaveUp: true}
		}
		if err := t.tail.look(ctx); errors.Is(err, errTailLost) {
			t.cancel(err)
			return result{page: p, gaveUp: true}
		} else if err != nil {
			r.fail(err)
			_ = backoff.Wait(quit, retry(), attempt)
			continue
		}
		var refused []refusal
		var first error
		began, tried := time.Now(), len(pending)
		pending, refused, first = sift(pending, r.publish(ctx, pending))
		res.dead = append(res.dead, refused...)
		if first != nil {
			r.fail(first)
			t.tail.published(first)
		}
		if r.cfg.Metrics != nil {
			now := time.Now()
			r.cfg.Metrics(ctx, Attempt{
				Began: began, Took: now.Sub(began), Lag: max(0, now.Sub(time.Unix(0, p.since))), Err: first,
				Sent: tried - len(pending) - len(refused), Dead: len(refused), Waiting: len(pending),
			})
		}
		switch {
		case len(pending) == 0 && attempt > warnAfter:
			r.log.LogAttrs(ctx, slog.LevelInfo, "publisher accepts messages again", slog.Int("attempts", attempt))
		case len(pending) > 0 && attempt == warnAfter:
			r.log.LogAttrs(ctx, slog.LevelWarn, "publisher does not accept messages, will try again",
				slog.Int("waiting", len(pending)), slog.Any("error", first))
		}
		if first != nil {
			_ = backoff.Wait(quit, retry(), attempt) // when quit ends, so does the loop
		}
	}
	return res
}

// sift returns the rows that are to be sent again, those that are refused for good, and the first error of the former.
func sift(rows []row, errs []error) (again []row, refused []refusal, first error) {
	held := map[string]bool{} // keys of failed messages
	for i, row := range rows {
		key, err := row.msg.Key(), errs[i]
		switch {
		case err == nil && !held[key]:
		case err == nil:
			again = append(again, row)
		case !postrider.Retryable(err):
			refused = append(refused, refusal{row, err})
		default:
			again = append(again, row)
			if key != "" {
				held[key] = true
			}
			if first == nil {
				first = err
			}
		}
	}
	return again, refused, first
}

// publish makes one attempt and returns what became of each row. A publisher that refuses a whole batch for good does not
// say which of its messages it means, so each is sent alone, up to the first that may succeed later.
func (r *Relay) publish(ctx context.Context, rows []row) []error {
	msgs := make([]*postrider.Message, len(rows))
	for i, row := range rows {
		msgs[i] = row.msg
	}
	publish := r.pub.Publish
	if tailer, ok := r.pub.(Tailer); ok {
		publish = tailer.PublishOnce
	}
	err := publish(ctx, msgs...)
	var batch *postrider.BatchError
	if err == nil || len(rows) == 1 || errors.As(err, &batch) || postrider.Retryable(err) {
		return postrider.PublishErrors(err, len(rows))
	}
	errs := make([]error, len(rows))
	for i, m := range msgs {
		if errs[i] = postrider.PublishErrors(publish(ctx, m), 1)[0]; postrider.Retryable(errs[i]) {
			for j := i + 1; j < len(errs); j++ {
				errs[j] = errs[i]
			}
			break
		}
	}
	return errs
}
