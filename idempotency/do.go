package idempotency

import (
	"context"
	"crypto/sha256"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
)

// maxChosenKey is how long a caller's key may be, in bytes. The names of methods are put before it.
const maxChosenKey = 1000

func keyError(method string) error {
	return &postrider.Error{Code: postrider.InvalidArgument, Op: "idempotency: do " + method, Msg: "the key must have 1 to 1,000 bytes"}
}

func missingError(method string) error {
	return &postrider.Error{Code: postrider.InvalidArgument, Op: "idempotency: do " + method, Msg: "the store, the request or the function is nil"}
}

// Do calls fn unless it was called before with this key, and returns what it returned then. It is for effects outside the
// database: a payment at a provider, a mail. Effects in the database belong into the transaction of [Action] or [DoTx].
//
// The key is one of m: the same key of another method is another one. While fn runs its key is leased, and the lease is
// renewed. Whoever comes with the key meanwhile waits for the end of ctx at most, or is refused ([Refuse]). The response is
// written down before Do returns it, and so is a refusal, an error that is not [postrider.Retryable]. After any other
// error, or a panic, the key is free again. m's first codec encodes what is written down.
//
// fn takes effect at least once, not exactly once: if the process dies between the effect and the note, the next caller runs
// fn again once the lease has ended. So give the key to the provider as well, or [FenceFromContext] to a service that
// refuses what is older than what it has seen. When the lease is lost, because this process stood still or the store was away
// for as long as a lease, fn's context ends and another caller may run fn.
//
// Errors beside those of fn: AlreadyExists when the key was used for another request, told by its encoding, which a new version
// of a program should not change; Aborted, to be retried later, when the key is in use and [Refuse] was given, or when the lease was lost before
// the outcome could be written down; Unavailable when the store cannot be reached, in which case fn may have run, unless
// [postrider.Error.Unprocessed] is true; InvalidArgument for an empty key or one of over 1,000 bytes; the context's own when it
// ends while waiting.
func Do[Req, Res any](
	ctx context.Context, r Records, m *postrider.Method[Req, Res], key string, req *Req,
	fn func(ctx context.Context, req *Req) (*Res, error), opts ...DoOption,
) (*Res, error) {
	op := "idempotency: do " + m.Name() + " " + key
	if r == nil || req == nil || fn == nil {
		return nil, missingError(m.Name())
	}
	if key == "" || len(key) > maxChosenKey {
		return nil, keyError(m.Name())
	}
	cd, err := m.Codecs().For("")
	if err != nil {
		return nil, &postrider.Error{Code: postrider.InvalidArgument, Op: op, Err: err}
	}
	request, err := cd.Append(nil, req)
	if err != nil {
		return nil, &postrider.Error{Code: postrider.InvalidArgument, Op: op, Msg: "encode the request: " + err.Error(), Err: err}
	}
	t := task{records: r, op: op, key: m.Name() + " " + key, request: fingerprint(request), lease: defaultLease, wait: true}
	for _, o := range opts {
		o(&t)
	}
	var res *Res
	var refusal error
	o, repeated, err := t.do(ctx, func(ctx context.Context) (Outcome, error) {
		if res, refusal = fn(ctx, req); refusal != nil {
			if postrider.Retryable(refusal) {
				return Outcome{}, refusal
			}
			return Outcome{Refused: true, ContentType: "application/json", Data: postrider.AppendError(nil, refusal)}, nil
		}
		if res == nil {
			res = new(Res)
		}
		data, err := cd.Append(nil, res)
		if err != nil {
			return Outcome{}, &postrider.Error{Code: postrider.Internal, Op: op, Msg: "encode the response: " + err.Error(), Err: err}
		}
		return Outcome{ContentType: cd.ContentType(), Data: data}, nil
	})
	switch {
	case err != nil:
		return nil, err
	case !repeated:
		return res, refusal
	case o.Refused:
		return nil, postrider.ParseError(o.Data)
	}
	res = new(Res)
	return res, decodeStored(m, answer{o.ContentType, o.Data}, res)
}

// DoOption changes how one [Do] treats its key.
type DoOption func(*task)

// Lease is how long a key stays taken when its owner has died, at least a second. The owner renews it every third of that time.
// Default 10 s.
func Lease(d time.Duration) DoOption { return func(t *task) { t.lease = d } }

// Refuse makes [Do] return Aborted when its key is in use, rather than wait.
func Refuse() DoOption { return func(t *task) { t.wait = false } }

// FenceFromContext returns the fencing token of a function that [Do], [HTTP] or [Dedup] runs, or 0. Tokens of a key rise with
// each owner, so that a service which keeps the highest can refuse a caller whose lease was lost without its knowledge (Kleppmann,
// "How to do distributed locking", 2016).
func FenceFromContext(ctx context.Context) int64 {
	fence, _ := ctx.Value(fenceKey{}).(int64)
	return fence
}

type fenceKey struct{}

func fingerprint(parts ...[]byte) []byte {
	h := sha256.New()
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)[:16]
}

// DoTx is [Do] for an effect in the store's own database: what fn writes through tx commits with its response, so that it takes
// effect exactly once. It calls fn as [Action] does, with the same keys and errors; the key is one of all methods, and must not
// end in "/do" or "/undo", which are a saga's.
func DoTx[Req, Res any](
	ctx context.Context, s *Store, m *postrider.Method[Req, Res], key string, req *Req,
	fn func(ctx context.Context, tx pgx.Tx, req *Req) (*Res, error),
) (*Res, error) {
	if s == nil || req == nil || fn == nil {
		return nil, missingError(m.Name())
	}
	msg, err := m.Request(ctx, req)
	if err != nil {
		return nil, err
	}
	if key == "" || len(key) > maxChosenKey {
		return nil, keyError(m.Name())
	}
	if err := msg.SetExtension(postrider.ExtIdempotencyKey, key); err != nil {
		return nil, err
	}
	reply, err := Action(s, m, fn).Handle(ctx, msg)
	if err != nil {
		return nil, err
	}
	return m.Response(reply)
}
