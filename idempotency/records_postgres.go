package idempotency

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
)

// The states of a request's row.
const (
	requestOpen    = 0 // it has an owner until its lease ends
	requestDone    = 1
	requestRefused = 2
	requestClaimed = -1 // not in the table: the claim has just inserted the row
)

// maxRequestKey bounds a key: PostgreSQL refuses index entries of more than 2,704 bytes.
const maxRequestKey = 1500

// claimTries bounds how often a claim looks again when somebody else was faster. Each time another caller has got on.
const claimTries = 100

// Claim implements [Records]: one statement, and another one when a lease has ended or is the caller's.
func (s *Store) Claim(ctx context.Context, key, owner string, request []byte, lease time.Duration) (Claim, error) {
	op := "idempotency: claim " + key
	if key == "" || len(key) > maxRequestKey || !utf8.ValidString(key) || strings.ContainsRune(key, 0) {
		return Claim{}, &postrider.Error{
			Code: postrider.InvalidArgument, Op: "idempotency: claim", Msg: "the key must be text of 1 to 1,500 bytes without zeros",
		}
	}
	for range claimTries {
		c, again, err := s.claim(ctx, key, owner, request, lease)
		if err != nil {
			return Claim{}, s.recordError(ctx, op, err)
		}
		if again {
			continue
		}
		switch {
		case c.Outcome != nil:
			s.duplicates.Add(1)
		case c.Fence == 0:
			s.busy.Add(1)
		}
		return c, nil
	}
	return Claim{}, &postrider.Error{Code: postrider.Aborted, Op: op, Msg: "too many others claim the key"}
}

func (s *Store) claim(ctx context.Context, key, owner string, request []byte, lease time.Duration) (c Claim, again bool, _ error) {
	var state int16
	var fence, left int64
	var mine bool
	var o Outcome
	err := s.pool.QueryRow(ctx, s.sql.claimRequest, key, request, lease.Microseconds(), owner).
		Scan(&state, &fence, &left, &mine, &c.Request, &o.ContentType, &o.Data)
	switch {
	case errors.Is(err, pgx.ErrNoRows): // it was inserted after the statement had begun
		return c, true, nil
	case err != nil:
		return c, false, err
	case state == requestClaimed:
		c.Fence = fence
		return c, false, nil
	case state != requestOpen:
		o.Refused = state == requestRefused
		c.Outcome = &o
		return c, false, nil
	case mine:
		err := s.Renew(ctx, key, fence, lease)
		if errors.Is(err, ErrLost) { // another one took it
			return c, true, nil
		}
		return Claim{Fence: fence}, false, err
	case left > 0 || c.Request != nil && !bytes.Equal(c.Request, request):
		return c, false, nil
	}
	err = s.pool.QueryRow(ctx, s.sql.takeRequest, key, request, lease.Microseconds(), fence, owner).Scan(&fence)
	if errors.Is(err, pgx.ErrNoRows) { // another one took it
		return c, true, nil
	}
	return Claim{Fence: fence}, false, err
}

// Renew implements [Records].
func (s *Store) Renew(ctx context.Context, key string, fence int64, lease time.Duration) error {
	return s.own(ctx, "renew", s.sql.renewRequest, key, fence, lease.Microseconds())
}

// Complete implements [Records].
func (s *Store) Complete(ctx context.Context, key string, fence int64, o Outcome) error {
	state := requestDone
	if o.Refused {
		state = requestRefused
	}
	err := s.own(ctx, "complete", s.sql.completeRequest, key, fence, state, o.ContentType, o.Data)
	if err == nil {
		s.handled.Add(1)
	}
	return err
}

// Release implements [Records].
func (s *Store) Release(ctx context.Context, key string, fence int64) error {
	return s.own(ctx, "release", s.sql.releaseRequest, key, fence)
}

// own runs a statement that finds no row when the owner has lost the key.
func (s *Store) own(ctx context.Context, verb, sql, key string, args ...any) error {
	tag, err := s.pool.Exec(ctx, sql, append([]any{key}, args...)...)
	switch {
	case err != nil:
		return s.recordError(ctx, "idempotency: "+verb+" "+key, err)
	case tag.RowsAffected() == 0:
		return ErrLost
	default:
		return nil
	}
}

func (s *Store) recordError(ctx context.Context, op string, err error) error {
	e := &postrider.Error{Code: postrider.Unavailable, Op: op, Err: err}
	switch {
	case sqlState(err) == undefinedTable, sqlState(err) == invalidSchema:
		e.Code, e.Msg = postrider.Internal, "the tables are missing in schema "+s.cfg.Schema+": call idempotency.Migrate first"
	case ctx.Err() != nil:
		e.Code = postrider.CodeOf(ctx.Err())
	}
	return e
}
