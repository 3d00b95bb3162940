package outbox

import (
	"context"
	"crypto/sha256"
	"fmt"
	"iter"
	"math"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
)

// AuditConfig says what an [Audit] looks at. Only Streams is required.
type AuditConfig struct {
	// From and To bound the messages that are looked for by the time at which they were published: From or later, and
	// before To. Default: all that the tables have, that is what was published since about [RelayConfig.Retain], and every
	// dead message.
	From, To time.Time

	// Streams are where the messages go, each read from before From, or from its beginning, to its end, in its order: bus.Bus.Read
	// is one. All streams that the outbox's topics go to belong here, for what is in none is lost. A stream that has
	// lost messages to its own limits has lost them here too. They are looped over several times if there are many rows.
	Streams []iter.Seq2[*postrider.Message, error]

	// Inbox, if not nil, is asked which of the messages in the streams were handled by Consumer. idempotency.Store is one.
	Inbox    Inbox
	Consumer string

	// Examples is how many messages of each kind the report names, those with the lowest numbers. Default 10. Negative:
	// none.
	Examples int

	memory int // how many messages to know at a time; 0: auditMemory
}

// Inbox knows what a consumer has handled, one answer for each message.
type Inbox interface {
	Handled(ctx context.Context, consumer string, msgs ...*postrider.Message) ([]bool, error)
}

const (
	// auditMemory is how many messages are known at a time, in about 100 bytes each.
	auditMemory = 500_000

	// inboxBatch is how many messages the inbox is asked about at once.
	inboxBatch = 1000

	// auditGrace is how late a delayed message may come without being lost.
	auditGrace = time.Minute
)

// Audit compares the rows of an outbox with the streams that its messages went to, and tells what is lost, doubled or out of
// order. It may run beside writers and relays: its view of the tables is that of one moment, before it reads the
// streams, and what the relay has not sent by then is in flight. While it runs sent rows are not removed.
//
// It knows messages by source and id, and reads rows and streams as often as it must to hold half a million of them at a
// time, some 50 MB (the partitioning of a GRACE hash join, Kitsuregawa and others 1983, that reads again instead of
// writing).
//
// Errors: InvalidArgument without streams, FailedPrecondition for an outbox that was restored from another database
// cluster and that no relay has taken over yet, those of the database, the streams and the inbox.
func Audit(ctx context.Context, pool *pgxpool.Pool, ob *Outbox, cfg AuditConfig) (*AuditReport, error) {
	if len(cfg.Streams) == 0 {
		return nil, postrider.Errorf(postrider.InvalidArgument, "outbox: AuditConfig.Streams is empty: want the streams that the messages go to")
	}
	a := audit{ob: ob, cfg: cfg}
	if a.cfg.memory == 0 {
		a.cfg.memory = auditMemory
	}
	if a.cfg.Examples == 0 {
		a.cfg.Examples = 10
	}
	err := pgx.BeginTxFunc(ctx, pool, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		return a.run(ctx, tx)
	})
	if err != nil {
		return nil, fmt.Errorf("outbox: audit: %w", err)
	}
	return &a.report, nil
}

// audit is one Audit at work.
type audit struct {
	ob     *Outbox
	cfg    AuditConfig
	report AuditReport

	identity string
	now      time.Time // by the database's clock
	passes   uint64    // how many parts the messages are divided into
	pass     uint64    // the part at hand

	known    map[digest]*traced
	order    map[orderKey]int64 // the highest number so far of each key
	delivery []*postrider.Message
	numbers  []int64 // of the messages in delivery
}

// digest stands for a message or a key. Half of a SHA-256: that two of a billion are the same is as likely as a broken
// memory.
type digest [16]byte

type orderKey struct {
	stream int
	key    digest
}

// traced is what is known of one message, which may have several rows: it was published twice, or sent again from the dead.
type traced struct {
	number    int64 // the lowest
	unordered bool  // it has no place in the order of its key
	waits     bool  // a row is not sent yet
	sent      bool  // a row is
	seen      bool  // a stream has it
}

func (a *audit) run(ctx context.Context, tx pgx.Tx) error {
	if _, err := tx.Exec(ctx, a.ob.q.auditLock); err != nil {
		return err
	}
	var home bool
	var rows int
	if err := tx.QueryRow(ctx, a.ob.q.auditBegin).Scan(&a.identity, &home, &a.now, &rows); err != nil {
		return err
	}
	if !home {
		return postrider.Errorf(postrider.FailedPrecondition,
			"the outbox comes from another database cluster, its cursor means nothing here: run a relay first, which sends all again")
	}
	a.passes = uint64(rows/a.cfg.memory + 1)
	for a.pass = range a.passes {
		a.known, a.order = map[digest]*traced{}, map[orderKey]int64{}
		if err := a.readRows(ctx, tx); err != nil {
			return err
		}
		for i, stream := range a.cfg.Streams {
			if err := a.readStream(ctx, i, stream); err != nil {
				return err
			}
		}
		a.judge()
	}
	return a.describe(ctx, tx)
}

// inPass says if a message belongs to the part at hand, and returns the digest of its key. A key is in one part.
func (a *audit) inPass(m *postrider.Message, id digest) (digest, bool) {
	key := id
	if k := m.Key(); k != "" {
		key = digestOf(k)
	}
	part := uint64(key[0])<<24 | uint64(key[1])<<16 | uint64(key[2])<<8 | uint64(key[3])
	return key, part%a.passes == a.pass
}

// digestOf keeps the parts apart: neither a source nor a key has a zero byte.
func digestOf(parts ...string) (d digest) {
	buf := make([]byte, 0, 256)
	for _, p := range parts {
		buf = append(append(buf, p...), 0)
	}
	sum := sha256.Sum256(buf)
	copy(d[:], sum[:])
	return d
}

func (a *audit) readRows(ctx context.Context, tx pgx.Tx) error {
	bound := func(t time.Time) *time.Time {
		if t.IsZero() {
			return nil
		}
		return &t
	}
	rows, err := tx.Query(ctx, a.ob.q.auditRows, bound(a.cfg.From), bound(a.cfg.To))
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var id int64
		var at time.Time
		var topic string
		var attributes []byte
		var done, dead bool
		if err := rows.Scan(&id, &at, &topic, &attributes, &done, &dead); err != nil {
			return err
		}
		m, err := a.ob.message(a.identity, id, at, topic, attributes, nil)
		if err != nil {
			m = &postrider.Message{ID: fmt.Sprint("unreadable ", id)} // it can only be dead, or in flight
		}
		d := digestOf(m.Source, m.ID)
		if _, mine := a.inPass(m, d); !mine {
			continue
		}
		one := a.known[d]
		if one == nil {
			one = &traced{number: math.MaxInt64}
			a.known[d] = one
		} else {
			one.unordered = true
		}
		one.number = min(one.number, id)
		due, err := time.Parse(time.RFC3339, m.Extension(postrider.ExtDeliverAt))
		delayed := err == nil
		one.unordered = one.unordered || delayed
		switch {
		case dead:
		case !done, delayed && due.After(a.now.Add(-auditGrace)):
			one.waits = true
		default:
			one.sent = true
		}
	}
	return rows.Err()
}

func (a *audit) readStream(ctx context.Context, stream int, messages iter.Seq2[*postrider.Message, error]) error {
	for m, err := range messages {
		if err != nil {
			return err
		}
		d := digestOf(m.Source, m.ID)
		key, mine := a.inPass(m, d)
		if !mine {
			continue
		}
		one := a.known[d]
		switch {
		case one == nil:
			a.report.Others++
			continue
		case one.seen:
			a.add(&a.report.Doubled, one.number)
			continue
		}
		one.seen = true
		if m.Key() != "" && !one.unordered {
			if k := (orderKey{stream, key}); one.number < a.order[k] {
				a.add(&a.report.OutOfOrder, one.number)
			} else {
				a.order[k] = one.number
			}
		}
		if a.cfg.Inbox == nil {
			continue
		}
		head := *m
		head.Data = nil
		a.delivery, a.numbers = append(a.delivery, &head), append(a.numbers, one.number)
		if len(a.delivery) == inboxBatch {
			if err := a.askInbox(ctx); err != nil {
				return err
			}
		}
	}
	return a.askInbox(ctx)
}

func (a *audit) askInbox(ctx context.Context) error {
	if len(a.delivery) == 0 {
		return nil
	}
	handled, err := a.cfg.Inbox.Handled(ctx, a.cfg.Consumer, a.delivery...)
	if err != nil {
		return err
	}
	for i, yes := range handled {
		if !yes {
			a.add(&a.report.Unhandled, a.numbers[i])
		}
	}
	a.delivery, a.numbers = a.delivery[:0], a.numbers[:0]
	return nil
}

// judge counts the messages of a part.
func (a *audit) judge() {
	a.report.Messages += len(a.known)
	for _, one := range a.known {
		switch {
		case one.seen:
			a.report.Delivered++
		case one.waits:
			a.add(&a.report.InFlight, one.number)
		case one.sent:
			a.add(&a.report.Lost, one.number)
		default:
			a.add(&a.report.Dead, one.number)
		}
	}
}

// add counts a message, and keeps its number if it is among the lowest.
func (a *audit) add(to *AuditFinding, number int64) {
	to.Count++
	i, found := slices.BinarySearchFunc(to.Examples, number, func(m AuditMessage, n int64) int { return int(m.Number - n) })
	if found || i >= a.cfg.Examples {
		return
	}
	to.Examples = slices.Insert(to.Examples, i, AuditMessage{Number: number})
	to.Examples = to.Examples[:min(len(to.Examples), a.cfg.Examples)]
}

// describe fills in the examples.
func (a *audit) describe(ctx context.Context, tx pgx.Tx) error {
	wanted := map[int64][]*AuditMessage{}
	var numbers []int64
	for _, f := range a.report.findings() {
		for i := range f.Examples {
			m := &f.Examples[i]
			wanted[m.Number], numbers = append(wanted[m.Number], m), append(numbers, m.Number)
		}
	}
	rows, err := tx.Query(ctx, a.ob.q.auditFind, numbers)
	if err != nil {
		return err
	}
	var id int64
	var at time.Time
	var topic string
	var attributes []byte
	_, err = pgx.ForEachRow(rows, []any{&id, &at, &topic, &attributes}, func() error {
		m, err := a.ob.message(a.identity, id, at, topic, attributes, nil)
		if err != nil {
			m = &postrider.Message{Topic: topic} // what it was before is not to be known
		}
		for _, w := range wanted[id] {
			w.At, w.Message = at, m
		}
		return nil
	})
	return err
}
