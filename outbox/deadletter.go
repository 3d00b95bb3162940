package outbox

import (
	"context"
	"errors"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/envelope"
)

// DeadLetters reads the messages that the publisher refused for good and acts on them. It is to an outbox what
// bus.DeadLetters is to a group, and safe for concurrent use, by several operators at once as well.
type DeadLetters struct {
	outbox *Outbox
	pool   *pgxpool.Pool
}

// DeadLetters returns the dead letters of the outbox. The pool is one on its database. No relay need run.
func (o *Outbox) DeadLetters(pool *pgxpool.Pool) *DeadLetters { return &DeadLetters{o, pool} }

// DeadLetter is a message that was refused for good, with the cause.
type DeadLetter struct {
	Number    int64     // of the message in the outbox
	Topic     string    // where it was to be published
	Key       string    // its partition key, "" for none
	Cause     string    // why it was refused
	Published time.Time // when it was inserted into the outbox
	At        time.Time // when it was given up

	// Message is the message as far as it can be read. One whose attributes cannot be has a Topic and Data only, and so has
	// one that was inserted without attributes.
	Message *postrider.Message

	attributes []byte
}

// Filter selects messages: those for which all that is set holds. The zero value selects all.
type Filter struct {
	Topic    string    // to be published to this address; wildcards as in NATS: "orders.>"
	Key      string    // with this partition key
	Cause    string    // of dead letters: with this text in their cause
	From, To time.Time // inserted into the outbox at From or later, and before To
}

// args are the parameters 1 to 4 of the queries that select.
func (f Filter) args() []any {
	at := func(t time.Time) *time.Time {
		if t.IsZero() {
			return nil
		}
		return &t
	}
	tokens := strings.Split(regexp.QuoteMeta(f.Topic), `\.`)
	for i, token := range tokens {
		switch {
		case token == `\*`:
			tokens[i] = `[^.]+`
		case token == ">" && i == len(tokens)-1:
			tokens[i] = `.+`
		}
	}
	pattern := "^" + strings.Join(tokens, `\.`) + "$"
	if f.Topic == "" {
		pattern = ""
	}
	return []any{pattern, f.Cause, at(f.From), at(f.To)}
}

// actBatch is how many messages an action takes in one transaction.
const actBatch = 50

// List returns up to limit dead letters, by their numbers, from above after, and where the next page begins: pass next as
// after; it is 0 when there are no more. Limit is 1 to 1000, 0 means 100.
func (d *DeadLetters) List(ctx context.Context, f Filter, after int64, limit int) (letters []DeadLetter, next int64, err error) {
	if limit == 0 {
		limit = 100
	}
	if limit < 0 || limit > 1000 {
		return nil, 0, postrider.Errorf(postrider.InvalidArgument, "outbox: list dead letters: limit is %d: want 1 to 1000", limit)
	}
	for {
		page, err := d.outbox.letters(ctx, d.pool, d.outbox.q.deadList, append(f.args(), after, limit+1)...)
		if err != nil {
			return nil, 0, d.outbox.unusable("list dead letters", err)
		}
		for _, l := range page {
			switch {
			case f.Key != "" && f.Key != l.Key:
			case len(letters) == limit:
				return letters, letters[limit-1].Number, nil
			default:
				letters = append(letters, l)
			}
		}
		if len(page) <= limit {
			return letters, 0, nil
		}
		after = page[len(page)-1].Number
	}
}

// querier is a pool or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

func (o *Outbox) letters(ctx context.Context, db querier, sql string, args ...any) ([]DeadLetter, error) {
	rows, err := db.Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (l DeadLetter, err error) {
		l.Message = &postrider.Message{}
		var data []byte
		if err := row.Scan(&l.Number, &l.Published, &l.Topic, &l.attributes, &data, &l.Cause, &l.At); err != nil {
			return l, err
		}
		if envelope.ParseProto(l.attributes, l.Message) != nil {
			l.Message = &postrider.Message{}
		}
		l.Message.Topic, l.Message.Data = l.Topic, data
		l.Key = l.Message.Key()
		return l, nil
	})
}

// Replay publishes dead letters again, each with its id and source as the newest message of the outbox: after those of its key
// that have been published meanwhile. The result is how many were taken, each of which is a dead letter no more; one that is
// refused again comes back with another number. Those that are not there, for somebody else was faster, are a NotFound
// error, and the others are taken.
func (d *DeadLetters) Replay(ctx context.Context, numbers []int64, a Action) (int, error) {
	return d.act(ctx, "replay", numbers, a)
}

// ReplayAll publishes again what a filter selects now. See [DeadLetters.Replay].
func (d *DeadLetters) ReplayAll(ctx context.Context, f Filter, a Action) (int, error) {
	return d.actAll(ctx, "replay", f, a)
}

// Discard removes dead letters for good. The log keeps their attributes and causes, not their data. The results are those of
// [DeadLetters.Replay].
func (d *DeadLetters) Discard(ctx context.Context, numbers []int64, a Action) (int, error) {
	return d.act(ctx, "discard", numbers, a)
}

// DiscardAll removes what a filter selects now. See [DeadLetters.Discard].
func (d *DeadLetters) DiscardAll(ctx context.Context, f Filter, a Action) (int, error) {
	return d.actAll(ctx, "discard", f, a)
}

// actAll acts on the letters that are there now: what comes back has a higher number.
func (d *DeadLetters) actAll(ctx context.Context, what string, f Filter, a Action) (int, error) {
	if err := a.validate(what); err != nil {
		return 0, err
	}
	var numbers []int64
	for after := int64(0); ; {
		letters, next, err := d.List(ctx, f, after, 1000)
		if err != nil {
			return 0, err
		}
		for _, l := range letters {
			numbers = append(numbers, l.Number)
		}
		if after = next; next == 0 {
			break
		}
	}
	n, err := d.act(ctx, what, numbers, a)
	if errors.Is(err, postrider.NotFound) {
		err = nil
	}
	return n, err
}

func (d *DeadLetters) act(ctx context.Context, what string, numbers []int64, a Action) (done int, err error) {
	if err := a.validate(what); err != nil {
		return 0, err
	}
	for batch := range slices.Chunk(numbers, actBatch) {
		n, err := d.actBatch(ctx, what, batch, a)
		if err != nil {
			return done, d.outbox.unusable(what+" dead letters", err)
		}
		done += n
	}
	if missing := len(numbers) - done; missing > 0 {
		return done, postrider.Errorf(postrider.NotFound, "outbox: %s dead letters: %d of %d are not there any more", what, missing, len(numbers))
	}
	return done, nil
}

func (d *DeadLetters) actBatch(ctx context.Context, what string, numbers []int64, a Action) (n int, err error) {
	o := d.outbox
	err = pgx.BeginTxFunc(ctx, d.pool, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error {
		letters, err := o.letters(ctx, tx, o.q.deadTake, numbers, what, a.By, a.Why)
		if n = len(letters); err != nil || n == 0 || what == "discard" {
			return err
		}
		var r rows
		for _, l := range letters {
			r.append(o.again(l.Topic, l.attributes, l.Message.Data, l.Key))
		}
		return o.insert(ctx, tx, r, false)
	})
	if err != nil {
		return 0, err
	}
	poke(o.wake)
	return n, nil
}

// again is a row as it was inserted before.
func (o *Outbox) again(topic string, attributes, data []byte, key string) rows {
	r := rows{topics: []string{topic}, attributes: [][]byte{attributes}, data: [][]byte{data}}
	if key != "" && !o.cfg.NoKeyLock {
		r.keys = []string{o.cfg.Schema + "." + key}
	}
	return r
}

// Resend publishes messages that were sent, as far as the outbox retains them, once more, in their order, each as the
// newest message of its key. They have the ids that they had, so that a group which remembers them (package idempotency) does
// not handle them twice, while the broker, for the extension "redrive" ([postrider.ExtRedrive]), does not take them
// for duplicates; or, with newIDs, ids of their own, so that all groups handle them. The result is how many were taken. Those
// that are sent while it works are not.
func (o *Outbox) Resend(ctx context.Context, pool *pgxpool.Pool, f Filter, newIDs bool, a Action) (done int, err error) {
	if err := a.validate("resend"); err != nil {
		return 0, err
	}
	if f.Cause != "" {
		return 0, postrider.Errorf(postrider.InvalidArgument, "outbox: resend: Filter.Cause is set: only dead letters have one")
	}
	var identity string
	var after, end int64
	if err := pool.QueryRow(ctx, o.q.resendEnd).Scan(&identity, &end); err != nil {
		return 0, o.unusable("resend", err)
	}
	redrive := postrider.NewID()
	for more := true; more && after < end; {
		taken := 0
		err := pgx.BeginTxFunc(ctx, pool, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, o.q.plan); err != nil {
				return err
			}
			found, err := o.retained(ctx, tx, identity, append(f.args(), after, actBatch, end)...)
			if err != nil || len(found) == 0 {
				more = false
				return err
			}
			more, after = len(found) == actBatch, found[len(found)-1].id
			var r rows
			for _, row := range found {
				m := row.msg
				if row.err != nil || f.Key != "" && f.Key != m.Key() { // what cannot be read was not sent
					continue
				}
				if err := m.SetExtension(postrider.ExtRedrive, redrive); err != nil {
					return err
				}
				if newIDs {
					m.ID = postrider.NewID()
				}
				bare := *m
				bare.Data = nil
				r.append(o.again(row.topic, envelope.AppendProto(nil, &bare), m.Data, m.Key()))
			}
			if taken = len(r.topics); taken == 0 {
				return nil
			}
			if err := o.insert(ctx, tx, r, false); err != nil {
				return err
			}
			_, err = tx.Exec(ctx, o.q.resendNote, a.By, a.Why, f.Topic, taken)
			return err
		})
		if err != nil {
			return done, o.unusable("resend", err)
		}
		if done += taken; taken > 0 {
			poke(o.wake)
		}
	}
	return done, nil
}

// retained reads rows that were sent.
func (o *Outbox) retained(ctx context.Context, tx pgx.Tx, identity string, args ...any) ([]row, error) {
	found, err := tx.Query(ctx, o.q.resendRows, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(found, func(r pgx.CollectableRow) (row, error) {
		var id int64
		var at time.Time
		var topic string
		var attributes, data []byte
		if err := r.Scan(&id, &at, &topic, &attributes, &data); err != nil {
			return row{}, err
		}
		m, err := o.message(identity, id, at, topic, attributes, data)
		return row{id: id, topic: topic, msg: m, err: err}, nil
	})
}
