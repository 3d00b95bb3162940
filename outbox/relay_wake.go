package outbox

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/backoff"
)

// What wakes a relay, each without the others: a Publish in its process, a poke, a notification, and the time.

// listenChannel is where SQL writers notify, with the schema as the payload.
const listenChannel = "postrider_outbox"

// deafAfter is how long a notification of our own may take.
const deafAfter = 10 * time.Second

var errDeaf = errors.New("a notification did not arrive: RelayConfig.Listen must connect to the server, not to a pooler")

// hearPokes has pokes wake the relay until stop is called.
func (r *Relay) hearPokes(ctx context.Context) (stop func()) {
	if r.outbox.cfg.Poker == nil {
		return func() {}
	}
	stop, err := r.outbox.cfg.Poker.OnPoke(func() { poke(r.outbox.wake) })
	if err != nil {
		r.log.WarnContext(ctx, "pokes are not heard, messages of other processes wait for the next poll", "error", err)
		return func() {}
	}
	return stop
}

// listen has notifications wake the relay until ctx ends.
func (r *Relay) listen(ctx context.Context) {
	if r.cfg.Listen == nil {
		return
	}
	for attempt := 1; ctx.Err() == nil; attempt++ {
		began := time.Now()
		err := r.listenOnce(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > 2*deafAfter {
			attempt = 1
		}
		if attempt == 1 {
			r.log.WarnContext(ctx, "notifications are not heard, messages of SQL writers wait for the next poll", "error", err)
		}
		_ = backoff.Wait(ctx, postrider.RetryPolicy{Attempts: -1, Initial: time.Second, Max: time.Minute}, attempt)
	}
}

// listenOnce listens on one connection, until that breaks or turns out to be deaf: a pooler takes LISTEN and passes nothing on.
func (r *Relay) listenOnce(ctx context.Context) error {
	pooled, err := r.cfg.Listen.Acquire(ctx)
	if err != nil {
		return err
	}
	conn := pooled.Hijack() // it listens to its end, so nobody else may get it
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, "listen "+listenChannel); err != nil {
		return err
	}
	test := postrider.NewID()
	if _, err := r.cfg.Listen.Exec(ctx, "select pg_notify($1, $2)", listenChannel, test); err != nil {
		return err
	}
	if err := r.hear(ctx, conn, test); err != nil {
		return err
	}
	poke(r.outbox.committed) // there may have been one before
	return r.hear(ctx, conn, "")
}

// hear waits for notifications: for that of a test at most as long as it may take.
func (r *Relay) hear(ctx context.Context, conn *pgx.Conn, test string) error {
	if test != "" {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, deafAfter, errDeaf)
		defer cancel()
	}
	for {
		n, err := conn.WaitForNotification(ctx)
		switch {
		case err != nil && errors.Is(context.Cause(ctx), errDeaf):
			return errDeaf
		case err != nil:
			return err
		case test != "" && n.Payload == test:
			return nil
		case n.Payload == r.outbox.cfg.Schema:
			poke(r.outbox.committed)
		}
	}
}
