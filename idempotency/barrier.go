package idempotency

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/postrider/postrider"
)

// The states of a row; see the package comment. No row is a state too.
const (
	stateDone    = 1 // the action committed, reply is its answer
	stateRefused = 2 // the action refused, reply is the error
	stateNulled  = 3 // the compensation came, the action had not
	stateUndone  = 4 // the action committed, then the compensation
)

// maxKey bounds a barrier key: PostgreSQL refuses index entries of more than 2,704 bytes.
const maxKey = 1024

// barrierRow is what is known about a key. Its state is 0 when there is no row.
type barrierRow struct {
	state       int16
	request     []byte
	contentType string
	reply       []byte
}

func (r *barrierRow) scan(row pgx.Row) error {
	err := row.Scan(&r.state, &r.request, &r.contentType, &r.reply)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil
	}
	return err
}

// barrierKey identifies an action and its compensation.
type barrierKey struct {
	text string

	// chosen says that the caller of a single call chose the key. Such a key may be used twice by mistake, so it is kept with a
	// fingerprint of the request. For a saga's key that would do harm: after an upgrade a repeated command may be
	// encoded otherwise, and to refuse it would tell the saga that the action has not run.
	chosen bool
}

func newBarrierKey(m *postrider.Message) (barrierKey, error) {
	var k barrierKey
	if key := m.Extension(postrider.ExtIdempotencyKey); key != "" {
		step, saga := strings.CutSuffix(key, "/do")
		if !saga {
			step, saga = strings.CutSuffix(key, "/undo")
		}
		k = barrierKey{"key:" + step, !saga}
	} else if m.ID != "" {
		k.text = "msg:" + strconv.Quote(m.Source) + m.ID
	} else {
		return k, postrider.Errorf(postrider.InvalidArgument, "the message has neither an idempotencykey nor an id to know it by")
	}
	if len(k.text) > maxKey {
		return k, postrider.Errorf(postrider.InvalidArgument, "the idempotency key has %d bytes: at most %d are allowed", len(k.text), maxKey)
	}
	return k, nil
}

// fingerprint is 8 bytes of a hash of method and request, or nil where none is kept.
func (k barrierKey) fingerprint(method string, m *postrider.Message) []byte {
	if !k.chosen {
		return nil
	}
	h := sha256.New()
	h.Write([]byte(method))
	h.Write([]byte{0})
	h.Write(m.Data)
	return h.Sum(nil)[:8]
}

// admit returns the key of a message, or refuses it.
func (s *Store) admit(op string, m *postrider.Message) (barrierKey, error) {
	if age := time.Since(m.Time); s.cfg.Retention > 0 && !m.Time.IsZero() && age > s.cfg.Retention {
		return barrierKey{}, s.outOfRange(op, "it is %v old, older than answers are kept (%v)", age.Round(time.Second), s.cfg.Retention)
	}
	k, err := newBarrierKey(m)
	if err != nil {
		return k, &postrider.Error{Code: postrider.InvalidArgument, Op: op, Err: err}
	}
	return k, nil
}

// answer is an encoded response.
type answer struct {
	contentType string
	data        []byte
}

// do runs an action once. It returns the stored answer if the action ran before, else nil after it ran now.
func (s *Store) do(
	ctx context.Context, method string, m *postrider.Message, run func(pgx.Tx) (answer, error),
) (*answer, error) {
	op := "idempotency: action " + method + " " + m.ID
	key, err := s.admit(op, m)
	if err != nil {
		return nil, err
	}
	request := key.fingerprint(method, m)
	fresh := false
	t, err := s.begin(ctx, func(b *pgx.Batch) {
		b.Queue(s.sql.act, s.sql.lockTimeout, key.text, request).Exec(func(tag pgconn.CommandTag) error {
			fresh = tag.RowsAffected() == 1
			return nil
		})
		b.Queue("savepoint postrider_action")
	})
	if err != nil {
		return nil, s.beginError(ctx, op, err)
	}
	defer s.end(ctx, t)
	if !fresh {
		return s.repeat(ctx, op, t, key, request)
	}

	res, runErr := run(t)
	switch {
	case runErr == nil:
		err = s.commit(ctx, t, 1, func(b *pgx.Batch) {
			b.Queue(s.sql.answer, key.text, stateDone, res.contentType, res.data)
		})
	case postrider.Retryable(runErr):
		return nil, runErr
	default:
		// The refusal is kept, so that no repetition succeeds after the caller was told no. If it cannot be kept the caller
		// must not hear it. A handler that rolled back before it refused got what it wanted.
		t.misuse = nil
		// On its own: in a transaction that a failed statement has aborted nothing else can even be prepared.
		if _, err = t.Exec(ctx, "rollback to savepoint postrider_action"); err != nil {
			break
		}
		err = s.commit(ctx, t, 1, func(b *pgx.Batch) {
			b.Queue(s.sql.answer, key.text, stateRefused, "application/json", postrider.AppendError(nil, runErr))
		})
	}
	if err != nil {
		return nil, commitError(ctx, op, err)
	}
	return nil, runErr
}

// repeat answers an action whose key has a row. READ COMMITTED shows the row that stopped the claim.
func (s *Store) repeat(ctx context.Context, op string, t *tx, key barrierKey, request []byte) (*answer, error) {
	var row barrierRow
	if err := row.scan(t.QueryRow(ctx, s.sql.read, key.text)); err != nil {
		return nil, s.beginError(ctx, op, err)
	}
	s.duplicates.Add(1)
	no := func(code postrider.Code, msg string) (*answer, error) {
		return nil, &postrider.Error{Code: code, Op: op, Msg: msg}
	}
	switch {
	case row.state == stateNulled:
		return no(postrider.FailedPrecondition, "cancelled: its compensation came before it")
	case row.state == stateUndone:
		return no(postrider.FailedPrecondition, "cancelled: it ran before and was compensated")
	case row.request != nil && request != nil && !bytes.Equal(row.request, request):
		return no(postrider.AlreadyExists, "the idempotency key was used for another request: use a new key for each request")
	case row.state == stateDone:
		return &answer{row.contentType, row.reply}, nil
	case row.state == stateRefused:
		return nil, postrider.ParseError(row.reply)
	default: // deleted as too old between the two statements
		return no(postrider.Aborted, "its row has just expired")
	}
}

// undo runs a compensation once, if there is something to undo.
func (s *Store) undo(ctx context.Context, method string, m *postrider.Message, run func(pgx.Tx, answer) error) error {
	op := "idempotency: compensation " + method + " " + m.ID
	if m.Extension(postrider.ExtIdempotencyKey) == "" { // its own id would find nothing to undo, and say so
		return &postrider.Error{Code: postrider.InvalidArgument, Op: op, Msg: "the message has no idempotencykey to know its action by"}
	}
	key, err := s.admit(op, m)
	if err != nil {
		return err
	}
	var row barrierRow
	nulled := false
	// The claim waits for an action that has not ended: then it either finds its row or bars it.
	t, err := s.begin(ctx, func(b *pgx.Batch) {
		b.Queue(s.sql.null, s.sql.lockTimeout, key.text).Exec(func(tag pgconn.CommandTag) error {
			nulled = tag.RowsAffected() == 1
			return nil
		})
		b.Queue(s.sql.lock, key.text).QueryRow(row.scan)
	})
	if err != nil {
		return s.beginError(ctx, op, err)
	}
	defer s.end(ctx, t)

	switch {
	case nulled:
		err = s.commit(ctx, t, 1, nil)
	case row.state == stateDone:
		if err := run(t, answer{row.contentType, row.reply}); err != nil {
			return err
		}
		err = s.commit(ctx, t, 1, func(b *pgx.Batch) { b.Queue(s.sql.undone, key.text) })
	case row.state == 0: // deleted as too old between the two statements
		return &postrider.Error{Code: postrider.Aborted, Op: op, Msg: "its row has just expired"}
	default: // refused, nulled, undone: nothing is in effect
		s.duplicates.Add(1)
	}
	if err != nil {
		return commitError(ctx, op, err)
	}
	return nil
}
