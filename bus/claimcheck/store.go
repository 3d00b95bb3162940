package claimcheck

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// Config configures a [Store]. Only MaxAge is required. All services that share payloads share the Bucket.
type Config struct {
	// MaxAge is how long a payload is kept, at least as long as its message in stream, outbox and dead letters. A bucket
	// that keeps longer stays as it is. Negative: without end. Required.
	MaxAge time.Duration

	// Bucket is the object store. It is made at the first use. Default "CLAIMS".
	Bucket string

	// MinBytes is the size from which a payload is stored; smaller ones stay in their messages. Default 256 KiB.
	MinBytes int

	// MaxBytes is the largest payload that is stored or fetched; a handler that runs holds it in memory. Default 64 MiB.
	MaxBytes int

	// Replicas is on how many servers a new bucket is kept, 1 to 5. Default 1; use that of the streams.
	Replicas int

	// Timeout bounds storing or fetching one payload, as the context's deadline does. Default 30 s.
	Timeout time.Duration
}

func (c Config) withDefaults() Config {
	c.Bucket = cmp.Or(c.Bucket, "CLAIMS")
	c.MinBytes = cmp.Or(c.MinBytes, 256<<10)
	c.MaxBytes = cmp.Or(c.MaxBytes, 64<<20)
	c.Replicas = cmp.Or(c.Replicas, 1)
	c.Timeout = cmp.Or(c.Timeout, 30*time.Second)
	return c
}

func (c Config) validate() error {
	bad := func(field, format string, args ...any) error {
		return postrider.Errorf(postrider.InvalidArgument, "claimcheck: Config.%s %s", field, fmt.Sprintf(format, args...))
	}
	switch {
	case c.MaxAge == 0:
		return bad("MaxAge", "is required: at least that of the streams that carry the messages, or a negative value to keep payloads without end")
	case strings.Trim(c.Bucket, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "":
		return bad("Bucket", "is %q: want letters, digits, - and _", c.Bucket)
	case c.MinBytes < 1:
		return bad("MinBytes", "is %d: want at least 1", c.MinBytes)
	case c.MaxBytes < c.MinBytes:
		return bad("MaxBytes", "is %d: want at least MinBytes, %d", c.MaxBytes, c.MinBytes)
	case c.Replicas < 1 || c.Replicas > 5:
		return bad("Replicas", "is %d: want 1 to 5", c.Replicas)
	case c.Timeout < 0:
		return bad("Timeout", "is %v: want a positive duration", c.Timeout)
	default:
		return nil
	}
}

// Store stores and fetches payloads. It is safe for concurrent use.
type Store struct {
	nc  *nats.Conn
	js  jetstream.JetStream
	cfg Config

	mu     sync.Mutex
	bucket jetstream.ObjectStore // nil until it is known to exist
}

// New returns a store. It does no I/O; the connection stays the caller's. The error is InvalidArgument and names the field.
func New(nc *nats.Conn, cfg Config) (*Store, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, &postrider.Error{Code: postrider.InvalidArgument, Op: "claimcheck: new", Err: err}
	}
	return &Store{nc: nc, js: js, cfg: cfg}, nil
}

// scheme begins the dataref of a payload, which goes on with bucket, "/" and name.
const scheme = "nats-object:"

// place begins the dataref of every payload in the bucket.
func (s *Store) place() string { return scheme + s.cfg.Bucket + "/" }

// digestPrefix begins the digest of a payload.
const digestPrefix = "sha-256="

// put stores the data of m and returns m with a reference in its place.
func (s *Store) put(ctx context.Context, m *postrider.Message) (*postrider.Message, error) {
	op := "claimcheck: store the data of " + m.Type + " " + m.ID
	if len(m.Data) > s.cfg.MaxBytes {
		return nil, postrider.Permanent(&postrider.Error{
			Code: postrider.ResourceExhausted, Op: op, Unprocessed: true,
			Msg: fmt.Sprintf("it has %d bytes, Config.MaxBytes is %d: send less, or raise the limit for all who read", len(m.Data), s.cfg.MaxBytes),
		})
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
	defer cancel()
	bucket, err := s.open(ctx)
	if err != nil {
		return nil, unsent(weather(op, err))
	}
	name := postrider.NewID() // never written twice: whoever reads it while it is replaced would get neither
	if _, err := bucket.Put(ctx, jetstream.ObjectMeta{Name: name}, bytes.NewReader(m.Data)); err != nil {
		s.forget()
		return nil, unsent(weather(op, err))
	}
	digest := sha256.Sum256(m.Data)
	claim := m.Clone()
	claim.Data = nil
	err = errors.Join(
		claim.SetExtension(postrider.ExtDataRef, s.place()+name),
		claim.SetExtension(postrider.ExtDataDigest, digestPrefix+hex.EncodeToString(digest[:])))
	return claim, err
}

// get fetches the data that m refers to and returns m with it in the reference's place.
func (s *Store) get(ctx context.Context, m *postrider.Message) (*postrider.Message, error) {
	op := "claimcheck: fetch the data of " + m.Type + " " + m.ID
	ref := m.Extension(postrider.ExtDataRef)
	bucketName, name, _ := strings.Cut(strings.TrimPrefix(ref, scheme), "/")
	if bucketName != s.cfg.Bucket { // not any bucket that somebody may name
		return nil, &postrider.Error{
			Code: postrider.FailedPrecondition, Op: op, Msg: fmt.Sprintf("it is at %s, and Config.Bucket is %s", ref, s.cfg.Bucket),
		}
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
	defer cancel()
	data, err := s.read(ctx, op, name)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(data)
	if want := m.Extension(postrider.ExtDataDigest); want != digestPrefix+hex.EncodeToString(digest[:]) {
		return nil, &postrider.Error{
			Code: postrider.DataLoss, Op: op, Msg: fmt.Sprintf("what is at %s is not what was stored: want %q, have sha-256=%x", ref, want, digest),
		}
	}
	whole := m.Clone()
	whole.Data = data
	err = errors.Join(whole.SetExtension(postrider.ExtDataRef, ""), whole.SetExtension(postrider.ExtDataDigest, ""))
	return whole, err
}

// read returns an object.
func (s *Store) read(ctx context.Context, op, name string) ([]byte, error) {
	bucket, err := s.open(ctx)
	if err != nil {
		return nil, weather(op, err)
	}
	object, err := bucket.Get(ctx, name)
	if errors.Is(err, jetstream.ErrObjectNotFound) {
		return nil, &postrider.Error{
			Code: postrider.Unavailable, Op: op, Err: err,
			Msg: fmt.Sprintf("bucket %s has no object %q: a replica may lag, or it is older than the bucket's MaxAge", s.cfg.Bucket, name),
		}
	} else if err != nil {
		s.forget()
		return nil, weather(op, err)
	}
	defer object.Close()
	info, err := object.Info()
	if err != nil {
		return nil, weather(op, err)
	}
	if info.Size > uint64(s.cfg.MaxBytes) {
		return nil, postrider.Permanent(&postrider.Error{
			Code: postrider.ResourceExhausted, Op: op,
			Msg: fmt.Sprintf("it has %d bytes, Config.MaxBytes is %d: raise the limit and replay the message", info.Size, s.cfg.MaxBytes),
		})
	}
	data := make([]byte, info.Size)
	if n, err := io.ReadFull(object, data); err != nil { // the client library ends in the same way when time or connection ran out
		return nil, weather(op, fmt.Errorf("read %d of %d bytes: %w", n, len(data), err))
	}
	return data, nil
}

// open returns the bucket, and makes it if it does not exist.
func (s *Store) open(ctx context.Context) (jetstream.ObjectStore, error) {
	if !s.nc.IsConnected() { // the client library would wait, and send later what the caller has given up
		return nil, fmt.Errorf("not connected to NATS (%s)", strings.ToLower(s.nc.Status().String()))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bucket != nil {
		return s.bucket, nil
	}
	maxAge := max(s.cfg.MaxAge, 0)
	bucket, err := s.js.ObjectStore(ctx, s.cfg.Bucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		bucket, err = s.js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: s.cfg.Bucket, TTL: maxAge, Replicas: s.cfg.Replicas})
		if errors.Is(err, jetstream.ErrBucketExists) { // another instance was faster
			bucket, err = s.js.ObjectStore(ctx, s.cfg.Bucket)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", s.cfg.Bucket, err)
	}
	if err := s.keepFor(ctx, maxAge); err != nil {
		return nil, fmt.Errorf("have bucket %s keep payloads for %v: %w", s.cfg.Bucket, s.cfg.MaxAge, err)
	}
	s.bucket = bucket
	return bucket, nil
}

// keepFor raises the bucket's age limit, if it has one that is lower, and leaves everything else in it as it is: hence the
// stream under it (nats-architecture-and-design: ADR-20). Services that share a bucket come to the longest age so.
func (s *Store) keepFor(ctx context.Context, maxAge time.Duration) error {
	stream, err := s.js.Stream(ctx, "OBJ_"+s.cfg.Bucket)
	if err != nil {
		return err
	}
	cfg := stream.CachedInfo().Config
	if cfg.MaxAge == 0 || maxAge > 0 && cfg.MaxAge >= maxAge {
		return nil
	}
	cfg.MaxAge = maxAge
	_, err = s.js.UpdateStream(ctx, cfg)
	return err
}

// forget has the bucket looked up again: it may have gone.
func (s *Store) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bucket = nil
}

// unsent says of an error that its message was not published, and no call made.
func unsent(err *postrider.Error) *postrider.Error {
	err.Unprocessed = true
	return err
}

// weather is an error that may be gone at the next attempt.
func weather(op string, err error) *postrider.Error {
	code := postrider.Unavailable
	switch {
	case errors.Is(err, context.Canceled):
		code = postrider.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		code = postrider.DeadlineExceeded
	}
	return &postrider.Error{Code: code, Op: op, Err: err}
}
