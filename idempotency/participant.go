package idempotency

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
)

// Action makes a handler of fn that takes effect once per key, for calls, durable commands and the steps of sagas alike.
// The key is the message's idempotencykey without a trailing "/do", or else its source and id. What fn writes through tx
// commits with its response, and a duplicate is answered with the stored response. An error of fn that is not
// [postrider.Retryable] is a refusal: what fn wrote is rolled back, the refusal is stored, and a duplicate gets it again.
// After any other error, or a panic, nothing is stored and a repetition runs again. fn must not end tx, and must be safe
// for concurrent use; a nil response is the zero one. Action and Compensation panic if s or fn is nil.
//
// Errors beside those of fn: FailedPrecondition when the [Compensation] of the key came first; AlreadyExists when a key that
// is not a saga's was used before with another method or request; Aborted, to be retried later, while another copy is being
// handled; OutOfRange when the message is older than [Config.Retention]; InvalidArgument when it has no key and no id, or a
// key of over 1,000 bytes; Unavailable when the database cannot be reached or the connection broke in COMMIT.
func Action[Req, Res any](
	s *Store, m *postrider.Method[Req, Res], fn func(ctx context.Context, tx pgx.Tx, req *Req) (*Res, error),
) postrider.Handler {
	need("Action of "+m.Name(), s, fn == nil)
	return m.Handler(func(ctx context.Context, req *Req) (*Res, error) {
		msg := postrider.MessageFromContext(ctx)
		var res *Res
		stored, err := s.do(ctx, m.Name(), msg, func(tx pgx.Tx) (a answer, err error) {
			if res, err = fn(ctx, tx, req); err != nil {
				return a, err
			}
			if res == nil {
				res = new(Res)
			}
			// The codec in which the caller is answered, so that a duplicate gets the same bytes.
			cd, err := m.Codecs().For(msg.ContentType)
			if err == nil {
				a.contentType = cd.ContentType()
				a.data, err = cd.Append(nil, res)
			}
			if err != nil { // not a refusal
				return a, &postrider.Error{Code: postrider.Internal, Op: "encode response of " + m.Name(), Err: err}
			}
			return a, nil
		})
		if err != nil || stored == nil {
			return res, err
		}
		res = new(Res)
		return res, decodeStored(m, *stored, res)
	})
}

// Compensation makes a handler of fn that undoes what an [Action] of the same key did, once. The key is the message's
// idempotencykey without a trailing "/undo"; m is a method of its own. fn gets the stored response of the action as did,
// whose type must be the action's response type and whose encoding m must be able to read; what fn writes through tx
// commits with the note that it is undone. If the action never ran, fn does not run either: the compensation succeeds and an
// action that comes later is refused. The same holds for an action that was refused and for a repetition. An action that is
// running is waited for, up to [Config.LockTimeout]. The response is the zero one. After an error of fn, of whatever
// class, a repetition runs fn again.
//
// Errors beside those of fn: as for [Action], without FailedPrecondition and AlreadyExists; Internal when the stored response
// cannot be read.
func Compensation[Req, Res, Did any](
	s *Store, m *postrider.Method[Req, Res], fn func(ctx context.Context, tx pgx.Tx, req *Req, did *Did) error,
) postrider.Handler {
	need("Compensation of "+m.Name(), s, fn == nil)
	return m.Handler(func(ctx context.Context, req *Req) (*Res, error) {
		err := s.undo(ctx, m.Name(), postrider.MessageFromContext(ctx), func(tx pgx.Tx, stored answer) error {
			did := new(Did)
			if err := decodeStored(m, stored, did); err != nil {
				return err
			}
			return fn(ctx, tx, req, did)
		})
		if err != nil {
			return nil, err
		}
		return new(Res), nil
	})
}

// decodeStored reads a stored response with the codecs of a method. What cannot be read is no refusal: a program that has
// the codec may.
func decodeStored[Req, Res any](m *postrider.Method[Req, Res], stored answer, v any) error {
	cd, err := m.Codecs().For(stored.contentType)
	if err == nil {
		err = cd.Unmarshal(stored.data, v)
	}
	if err != nil {
		return &postrider.Error{Code: postrider.Internal, Op: "decode stored response for " + m.Name(), Err: err}
	}
	return nil
}
