package idempotency

import (
	"context"
	"time"

	"github.com/postrider/postrider"
)

// Records keeps what became of requests with a key, for [Do], [HTTP] and [Dedup]. [*Store] does it in PostgreSQL and
// kvstore.Store in NATS; postridertest/storetest tests any other. Methods may be added.
//
// A key has at most one owner at a time. Owners are told apart by fences, numbers that rise with each owner of a key. An owner
// keeps its key for the time of its lease, which the store's own clock measures; after it another may have it. An implementation is
// safe for concurrent use, and an error that is not [ErrLost] means that nobody knows whether the method took effect.
type Records interface {
	// Claim makes the caller the owner of a key that has no outcome and no owner, or an owner whose lease has ended and who
	// claimed it for the same request; else it tells what is there. request is a fingerprint of at most 64 bytes. owner names
	// the caller, as no other does: one that owns the key already, and has not heard of it, gets the same fence and a new lease.
	Claim(ctx context.Context, key, owner string, request []byte, lease time.Duration) (Claim, error)

	// Renew makes an owner's lease end a lease from now. The error is [ErrLost] when another has the key.
	Renew(ctx context.Context, key string, fence int64, lease time.Duration) error

	// Complete writes the outcome down for good. An owner may do so twice with the same outcome, when it has not heard of the
	// first time. The error is [ErrLost], and nothing is written, when the owner has lost the key.
	Complete(ctx context.Context, key string, fence int64, o Outcome) error

	// Release gives a key back without an outcome, for any request. The error is [ErrLost] when the owner has lost the key.
	Release(ctx context.Context, key string, fence int64) error
}

// Claim is what [Records.Claim] found. Without Fence and Outcome another has the key.
type Claim struct {
	// Fence is not zero when the caller is now the owner.
	Fence int64

	// Outcome is not nil when the request was completed before.
	Outcome *Outcome

	// Request is the fingerprint of the request that the key belongs to, unless the caller is the owner.
	Request []byte
}

// Outcome is what became of a request.
type Outcome struct {
	Refused     bool   // Data is an error as of [postrider.AppendError]
	ContentType string // of Data
	Data        []byte
}

// ErrLost is returned when the lease of a key was lost: it ran out, and another has the key now. It is Aborted.
var ErrLost error = &postrider.Error{Code: postrider.Aborted, Msg: "the lease of the key was lost to another"}
