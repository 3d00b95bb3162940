package kvstore

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/idempotency"
)

const (
	// maxKey is that of the store in PostgreSQL, in bytes.
	maxKey = 1500

	// conflicts bounds how often a change looks again when somebody else was faster. Each time another caller has got on.
	conflicts = 100

	// markerTTL is how long the server keeps the mark of an entry that is gone, the shortest time it can.
	markerTTL = time.Second

	// catchUp is how long an owner waits for a leader that does not know of its claim yet, looking every catchUpPoll.
	catchUp     = time.Second
	catchUpPoll = 50 * time.Millisecond

	// readTimeout bounds the wait for a leader, which nobody answers for while there is none.
	readTimeout = 5 * time.Second
)

// Config configures a Store. The zero value is ready to use.
type Config struct {
	// Bucket is the name of the bucket, which [Open] creates or updates. Default "postrider_requests".
	Bucket string

	// Retention is how long an outcome is known at least, counted from its completion, at least a minute. After it the same key is a
	// new one. Negative: for ever. Default 7 days.
	Retention time.Duration

	// Replicas is how many servers keep the bucket. Default 1.
	Replicas int
}

// Store keeps requests in a bucket. It is safe for concurrent use, and starts no goroutine.
type Store struct {
	js       jetstream.JetStream
	stream   jetstream.Stream
	replicas int
	prefix   string // of subjects
}

var _ idempotency.Records = (*Store)(nil)

// Open returns the store of a bucket, which it creates, or updates to the Config. The error is InvalidArgument and names the field, or
// Unavailable.
func Open(ctx context.Context, nc *nats.Conn, cfg Config) (*Store, error) {
	cfg.Bucket = cmp.Or(cfg.Bucket, "postrider_requests")
	cfg.Retention = cmp.Or(cfg.Retention, 7*24*time.Hour)
	switch {
	case nc == nil:
		return nil, postrider.Errorf(postrider.InvalidArgument, "kvstore: the connection is nil")
	case cfg.Retention > 0 && cfg.Retention < time.Minute:
		return nil, postrider.Errorf(postrider.InvalidArgument, "kvstore: Config.Retention is %v: want at least a minute", cfg.Retention)
	}
	op := "kvstore: open bucket " + cfg.Bucket
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, storeError(ctx, op, err)
	}
	_, err = js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket: cfg.Bucket, Description: "requests with an idempotency key", TTL: max(cfg.Retention, 0), Replicas: max(cfg.Replicas, 1),
		LimitMarkerTTL: markerTTL,
	})
	if errors.Is(err, jetstream.ErrInvalidBucketName) {
		return nil, postrider.Errorf(postrider.InvalidArgument, "kvstore: Config.Bucket is %q: want letters, digits, - and _", cfg.Bucket)
	}
	if err != nil {
		return nil, storeError(ctx, op, err)
	}
	stream, err := js.Stream(ctx, "KV_"+cfg.Bucket)
	if err != nil {
		return nil, storeError(ctx, op, err)
	}
	return &Store{js: js, stream: stream, replicas: stream.CachedInfo().Config.Replicas, prefix: "$KV." + cfg.Bucket + "."}, nil
}

// subject returns where the entry of a key is. A key may have any characters and lengths, a subject may not.
func (s *Store) subject(key string) string {
	sum := sha256.Sum256([]byte(key))
	return s.prefix + base64.RawURLEncoding.EncodeToString(sum[:])
}

// Claim implements [idempotency.Records]: a read, and a write if there is no entry.
func (s *Store) Claim(ctx context.Context, key, owner string, request []byte, lease time.Duration) (idempotency.Claim, error) {
	if key == "" || len(key) > maxKey {
		return idempotency.Claim{}, &postrider.Error{
			Code: postrider.InvalidArgument, Op: "kvstore: claim", Msg: "the key must have 1 to 1,500 bytes",
		}
	}
	var c idempotency.Claim
	err := s.change(ctx, "claim", key, 0, func(at entry) (next *entry, ttl time.Duration, err error) {
		c = idempotency.Claim{}
		switch {
		case at.State == open && at.Owner != "" && at.Owner == owner: // an answer was lost
			c.Fence = at.Fence
			return &at, lease, nil
		case at.exists():
			c.Request = at.Request
			if at.State != open {
				c.Outcome = &idempotency.Outcome{Refused: at.State == refused, ContentType: at.ContentType, Data: at.Data}
			}
			return nil, 0, nil
		}
		return &entry{Key: key, State: open, Owner: owner, Request: request}, lease, nil
	}, func(sequence uint64) { c.Fence = cmp.Or(c.Fence, int64(sequence)) })
	if err != nil {
		return idempotency.Claim{}, err
	}
	return c, nil
}

// Renew implements [idempotency.Records].
func (s *Store) Renew(ctx context.Context, key string, fence int64, lease time.Duration) error {
	return s.change(ctx, "renew", key, fence, func(at entry) (*entry, time.Duration, error) {
		if !at.ownedBy(fence) {
			return nil, 0, idempotency.ErrLost
		}
		return &at, lease, nil
	}, nil)
}

// Complete implements [idempotency.Records].
func (s *Store) Complete(ctx context.Context, key string, fence int64, o idempotency.Outcome) error {
	return s.change(ctx, "complete", key, fence, func(at entry) (*entry, time.Duration, error) {
		switch {
		case at.State != open && at.exists() && at.Fence == fence: // an answer was lost
			return nil, 0, nil
		case !at.ownedBy(fence):
			return nil, 0, idempotency.ErrLost
		}
		at.State, at.ContentType, at.Data = done, o.ContentType, o.Data
		if o.Refused {
			at.State = refused
		}
		return &at, 0, nil
	}, nil)
}

// Release implements [idempotency.Records].
func (s *Store) Release(ctx context.Context, key string, fence int64) error {
	return s.change(ctx, "release", key, fence, func(at entry) (*entry, time.Duration, error) {
		if !at.ownedBy(fence) {
			return nil, 0, idempotency.ErrLost
		}
		return &entry{}, markerTTL, nil
	}, nil)
}

// change reads the entry of a key and replaces it by what decide says: nil leaves it, one without a state deletes it. It looks
// again if somebody else was faster, and if the entry is older than the claim that the fence is of: a leader that was elected a
// moment ago may not have applied all that is committed.
func (s *Store) change(
	ctx context.Context, verb, key string, fence int64, decide func(at entry) (next *entry, ttl time.Duration, err error), stored func(sequence uint64),
) error {
	op, subject := "kvstore: "+verb+" "+key, s.subject(key)
	began := time.Now()
	for range conflicts {
		at, err := s.read(ctx, subject)
		if err != nil {
			return storeError(ctx, op, err)
		}
		next, ttl, err := decide(at)
		if errors.Is(err, idempotency.ErrLost) && s.replicas > 1 && at.sequence < uint64(fence) && time.Since(began) < catchUp {
			select {
			case <-time.After(catchUpPoll):
				continue
			case <-ctx.Done():
				return storeError(ctx, op, ctx.Err())
			}
		}
		if next == nil {
			return err
		}
		msg, err := next.message(subject)
		if err != nil {
			return storeError(ctx, op, err)
		}
		opts := []jetstream.PublishOpt{jetstream.WithExpectLastSequencePerSubject(at.sequence)}
		if ttl > 0 {
			opts = append(opts, jetstream.WithMsgTTL((ttl + time.Second - 1).Truncate(time.Second)))
		}
		ack, err := s.js.PublishMsg(ctx, msg, opts...)
		switch {
		case err == nil:
			if stored != nil {
				stored(ack.Sequence)
			}
			return nil
		case !isConflict(err):
			return storeError(ctx, op, err)
		}
	}
	return &postrider.Error{Code: postrider.Aborted, Op: op, Msg: "too many others change the key"}
}

// read returns the entry of a key: one that does not exist has the sequence of the mark that it left, or 0.
func (s *Store) read(ctx context.Context, subject string) (entry, error) {
	msg, err := s.last(ctx, subject)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return entry{}, nil
	}
	if err != nil {
		return entry{}, err
	}
	return parseEntry(msg.Sequence, msg.Header, msg.Data)
}

// last returns the last message of a subject. With several replicas the leader is asked: a replica that is behind, as after a restart,
// would tell an owner that it has lost its key.
func (s *Store) last(ctx context.Context, subject string) (*jetstream.RawStreamMsg, error) {
	if s.replicas == 1 {
		return s.stream.GetLastMsgForSubject(ctx, subject)
	}
	request, err := json.Marshal(map[string]string{"last_by_subj": subject})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	reply, err := s.js.Conn().RequestWithContext(ctx, "$JS.API.STREAM.MSG.GET."+s.stream.CachedInfo().Config.Name, request)
	if err != nil {
		return nil, err
	}
	var r struct {
		Error   *jetstream.APIError `json:"error"`
		Message *struct {
			Seq  uint64 `json:"seq"`
			Hdrs []byte `json:"hdrs"`
			Data []byte `json:"data"`
		} `json:"message"`
	}
	switch err := json.Unmarshal(reply.Data, &r); {
	case err != nil:
		return nil, err
	case r.Error != nil && r.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound:
		return nil, jetstream.ErrMsgNotFound
	case r.Error != nil:
		return nil, r.Error
	case r.Message == nil:
		return nil, jetstream.ErrInvalidJetStreamResponse
	}
	msg := &jetstream.RawStreamMsg{Sequence: r.Message.Seq, Data: r.Message.Data}
	if len(r.Message.Hdrs) > 0 {
		msg.Header, err = nats.DecodeHeadersMsg(r.Message.Hdrs)
	}
	return msg, err
}

// isConflict says if a message was refused because the entry that it replaces is not the last one.
func isConflict(err error) bool {
	e, ok := errors.AsType[*jetstream.APIError](err)
	return ok && (e.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || e.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}

func storeError(ctx context.Context, op string, err error) error {
	e := &postrider.Error{Code: postrider.Unavailable, Op: op, Err: err}
	var known *postrider.Error
	switch {
	case errors.As(err, &known):
		e.Code = known.Code
	case errors.Is(err, nats.ErrMaxPayload):
		e.Code, e.Msg = postrider.InvalidArgument, "the outcome is larger than the server's max_payload"
	case errors.Is(err, jetstream.ErrStreamNotFound):
		e.Code, e.Msg = postrider.Internal, "the bucket is gone: call kvstore.Open again"
	case ctx.Err() != nil:
		e.Code = postrider.CodeOf(ctx.Err())
	}
	return e
}
