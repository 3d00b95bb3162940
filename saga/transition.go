package saga

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
)

// run is one transition under way: the saga's row, the plan, and where its messages go. It feeds events to the core and
// carries out what the core says, until nothing more follows.
type run struct {
	*row
	def     *definition
	engine  *Engine
	publish func(ctx context.Context, m *postrider.Message) error
	value   any     // the row's data, decoded when first needed
	history []Entry // of this transition
	failure error   // the first message that could not be made
}

// advance applies an event and all that follows from it at once. The error is trouble with the database; what goes wrong
// in the user's functions is an event too.
func (r *run) advance(ctx context.Context, e event) error {
	for queue := []event{e}; len(queue) > 0; queue = queue[1:] {
		next, entries := r.def.apply(r.state, queue[0], r.now)
		r.state = next
		r.history = append(r.history, entries...)
		for _, entry := range entries {
			if entry.Kind != EntrySent {
				continue
			}
			follows, err := r.send(ctx, entry)
			if err != nil {
				return err
			}
			queue = append(queue, follows...)
		}
	}
	return nil
}

// send publishes the message of a step's action. What follows at once is that a [Publish] is done, or that the message
// could not be made.
func (r *run) send(ctx context.Context, entry Entry) ([]event, error) {
	i := r.def.index(entry.Step)
	a := r.def.action(i, entry.Op)
	e := event{step: i, op: entry.Op, attempt: entry.Attempt}
	msg, err := r.message(ctx, a, entry)
	if err == nil {
		err = r.publish(ctx, msg)
		if err != nil && postrider.Retryable(err) {
			return nil, err
		}
	}
	switch {
	case err != nil:
		if r.failure == nil {
			r.failure = err
		}
		e.kind, e.cause = failed, clean(err.Error())
	case a.apply == nil:
		e.kind = answeredOK
	default:
		return nil, nil
	}
	return []event{e}, nil
}

// message makes the message of an attempt: its id is the attempt's, its idempotency key that of all attempts.
func (r *run) message(ctx context.Context, a action, entry Entry) (*postrider.Message, error) {
	key := r.id + "/" + entry.Step + "/" + string(entry.Op)
	opts := []postrider.PublishOption{
		postrider.MessageID(key + "/" + strconv.Itoa(entry.Attempt)),
		postrider.IdempotencyKey(key),
		postrider.WithExtension(postrider.ExtSagaID, r.id),
	}
	if a.apply != nil {
		opts = append(opts, postrider.ReplyTo(r.engine.replyTopic()))
	}
	var msg *postrider.Message
	err := guard("the message of step "+entry.Step, func() (err error) {
		if err = r.decode(); err == nil {
			msg, err = a.message(ctx, r.value, opts...)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return msg, r.link.join(msg)
}

// join makes a message part of the saga's conversation. The first message tells what that is: it was made in the context
// in which the saga began, while later ones may follow from a timer.
func (l *link) join(m *postrider.Message) error {
	if l.correlation == "" {
		l.correlation = m.Extension(postrider.ExtCorrelationID)
		l.traceparent = m.Extension(postrider.ExtTraceParent)
		l.tracestate = m.Extension(postrider.ExtTraceState)
	}
	if l.correlation == "" {
		l.correlation = m.Extension(postrider.ExtSagaID)
	}
	err := m.SetExtension(postrider.ExtCorrelationID, l.correlation)
	if m.Extension(postrider.ExtTraceParent) == "" {
		err = errors.Join(err, m.SetExtension(postrider.ExtTraceParent, l.traceparent),
			m.SetExtension(postrider.ExtTraceState, l.tracestate))
	}
	return err
}

func (r *run) decode() (err error) {
	if r.value == nil {
		r.value, err = r.def.decode(r.data)
	}
	return err
}

// receive makes an event of a reply and takes an answer that the saga waits for into its data. An answer that cannot be
// taken is a failed attempt: the participant did its work, so it is no refusal.
func (r *run) receive(a address, reply *postrider.Message) (event, error) {
	i := r.def.index(a.step)
	if i < 0 || a.op == OpUndo && r.def.nodes[i].undo == nil {
		return event{}, postrider.Errorf(postrider.InvalidArgument, "plan %s version %d has no %s of step %q", r.plan, r.version, a.op, a.step)
	}
	e := event{step: i, op: a.op, attempt: a.attempt}
	if reply.Extension(postrider.ExtErrorCode) != "" {
		err := postrider.ParseError(reply.Data)
		e.kind, e.cause = answeredNo, clean(err.Error())
		if postrider.Retryable(err) {
			e.kind = failed
		}
		e.after, _ = postrider.RetryDelay(err)
		return e, nil
	}
	e.kind = answeredOK
	step := r.state.Steps[i]
	if step.Phase != inHand(a.op) {
		return e, nil
	}
	err := guard("the reply to step "+a.step, func() error {
		if err := r.decode(); err != nil {
			return err
		}
		if err := r.def.action(i, a.op).apply(r.value, reply); err != nil {
			return err
		}
		data, err := encode(r.value, r.engine.cfg.MaxData)
		if err == nil {
			r.data = data
		}
		return err
	})
	if err != nil {
		e.kind, e.attempt, e.cause = failed, step.Attempt, clean(err.Error())
		r.value = nil // half changed
	}
	return e, nil
}

// address says which attempt a reply belongs to.
type address struct {
	saga, step string
	op         Op
	attempt    int // 0 when the reply does not tell
}

// addressOf reads the idempotency key that replies keep, "saga/step/op", and the attempt from the command's id.
func addressOf(m *postrider.Message) (address, error) {
	key := m.Extension(postrider.ExtIdempotencyKey)
	parts := strings.Split(key, "/")
	if len(parts) != 3 || !isUUID(parts[0]) || parts[2] != string(OpDo) && parts[2] != string(OpUndo) {
		return address{}, postrider.Errorf(postrider.InvalidArgument,
			"idempotencykey %q is none of a saga's, \"saga/step/do\" or \"saga/step/undo\": replies must keep that of their command", key)
	}
	a := address{saga: parts[0], step: parts[1], op: Op(parts[2])}
	if n, ok := strings.CutPrefix(m.Extension(postrider.ExtCausationID), key+"/"); ok {
		a.attempt, _ = strconv.Atoi(n)
	}
	return a, nil
}

func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		if dash := i == 8 || i == 13 || i == 18 || i == 23; dash != (s[i] == '-') || !dash && !strings.ContainsRune("0123456789abcdef", rune(s[i])) {
			return false
		}
	}
	return true
}

// handleReply applies a reply. Trouble with the database is an error to be retried, so that the bus delivers the reply
// again; one that belongs to no saga is an error for the dead letters.
func (e *Engine) handleReply(ctx context.Context, m *postrider.Message) error {
	a, err := addressOf(m)
	if err != nil {
		return fmt.Errorf("saga: reply %s: %w", m.ID, err)
	}
	saga, err := e.transact(ctx, func(r *run) (event, error) { return r.receive(a, m) }, e.sql.load, a.saga, e.cfg.Name)
	if err == nil && saga == nil {
		err = postrider.Errorf(postrider.NotFound, "engine %s has no saga %s", e.cfg.Name, a.saga)
	}
	if err != nil {
		return fmt.Errorf("saga: reply %s: %w", m.ID, err)
	}
	return nil
}

// transact is one transition: it reads and locks a saga with the given query, applies an event, and commits the new
// state, its history and its messages. It returns the saga, nil when the query found none.
func (e *Engine) transact(ctx context.Context, what func(*run) (event, error), query string, args ...any) (*row, error) {
	conn, err := e.pool.Acquire(ctx)
	if err != nil {
		return nil, unavailable("connect", err)
	}
	defer conn.Release()
	tx, err := conn.Begin(ctx)
	if err != nil {
		return nil, unavailable("begin", err)
	}
	loaded, err := scanRow(tx.QueryRow(ctx, query, args...))
	r := &run{row: loaded, engine: e}
	if err == nil {
		err = r.perform(ctx, conn, tx, what)
	}
	if err != nil { // a connection that cannot roll back is closed by its release
		_ = tx.Rollback(context.WithoutCancel(ctx))
	}
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, nil
	case err != nil && postrider.Retryable(err):
		return loaded, unavailable("transition", err)
	case err != nil:
		return loaded, err
	}
	e.told(ctx, r)
	return loaded, nil
}

// perform is what happens in a transition's transaction once the saga is loaded. It commits.
func (r *run) perform(ctx context.Context, conn *pgxpool.Conn, tx pgx.Tx, what func(*run) (event, error)) error {
	if r.def = r.engine.plans[r.hash]; r.def == nil {
		return postrider.Errorf(postrider.Unavailable,
			"saga %s runs plan %s version %d with hash %s, which this engine does not have: keep old plans registered until their sagas have ended",
			r.id, r.plan, r.version, r.hash)
	}
	outbox := r.engine.outbox.In(tx)
	r.publish = func(ctx context.Context, m *postrider.Message) error { return outbox.Publish(ctx, m) }
	e, err := what(r)
	if err != nil {
		return err
	}
	if err := r.advance(ctx, e); err != nil {
		return err
	}
	return r.engine.save(ctx, conn, r.row, r.history)
}

// told lets those know who wait for what has been committed.
func (e *Engine) told(ctx context.Context, r *run) {
	for _, h := range r.history {
		if h.Kind == EntryAlarm {
			e.log.WarnContext(ctx, "saga: an operator should look", slog.String("saga", r.id), slog.String("plan", r.plan),
				slog.String("key", r.key), slog.String("step", h.Step), slog.String("op", string(h.Op)), slog.String("cause", h.Cause))
		}
	}
	if at := r.state.wakeAt(); !at.IsZero() {
		e.timers.earlier(at.Sub(r.now))
	}
	if r.state.Status.Ended() {
		e.waiters.notify(r.id)
	}
}

// clean makes a text of others fit for the database: valid, without zero bytes, not too long.
func clean(text string) string {
	const limit = 2000
	if len(text) > limit {
		text = text[:limit]
	}
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", "\uFFFD")
}

// action returns what is done for an op on a step.
func (d *definition) action(i int, op Op) action {
	if op == OpUndo {
		return d.actions[i][1]
	}
	return d.actions[i][0]
}
