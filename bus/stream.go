package bus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// Stream declares a JetStream stream. It is created when it is missing, with file storage and limits retention. One that
// exists, whoever made it, is changed where it differs from what is declared here: it takes the topics beside those that it
// has, it has the limits that are not zero, and it allows atomic and fast batches. Everything else stays as it is. A change
// that the server refuses is an error with both values, and so is a stream that acknowledges before it writes, or not at all.
// What a stream that others made does not keep, in memory, without interest, beyond its limits, Run tells the log.
//
// A stream that must not be changed need not be declared: publishers and subscriptions find the one that takes their topic.
type Stream struct {
	// Name is the stream's name: letters, digits, "-" and "_", by custom in capitals.
	Name string

	// Topics are the addresses that the stream takes, with wildcards: "orders.>".
	Topics []string

	// MaxAge is how long messages are kept. Zero: as the stream is, a new one without end. Negative: without end. A stream
	// that has messages older than that is not changed, which would delete them: FailedPrecondition.
	MaxAge time.Duration

	// MaxBytes bounds the stream's size; a publish beyond it fails with ResourceExhausted rather than pushing out
	// messages that nobody has handled. Zero: as the stream is, a new one without bound. Negative: without bound.
	MaxBytes int64

	// Replicas is on how many servers the stream is kept, 1 to 5; use 3 in a cluster. Zero: as the stream is, a new one
	// on 1.
	Replicas int

	// DuplicateWindow is how long the server recognises a message id. Zero: as the stream is, a new one 2 min.
	DuplicateWindow time.Duration

	// Partitions is into how many parts messages are divided by their partition key, 1 to 64, so that the instances of a
	// group can share the keys of an [Ordered] subscription: at most so many work at a time. Messages without a key are all in
	// the first part. Each part is a consumer on the server for each such subscription; 16 suit most. The number stays
	// with the stream, where publishers read it: it can be changed only while the stream has neither messages nor
	// consumers, and its publishers rest. Zero: as the stream is, a new one has none.
	Partitions int
}

// minAPILevel is JetStream's API level of nats-server 2.14, which brought what the bus needs.
const minAPILevel = 4

// declare makes the declared streams exist, once; a failure is tried again at the next use.
func (b *Bus) declare(ctx context.Context) error {
	if b.declared.Load() {
		return nil
	}
	b.declaring.Lock()
	defer b.declaring.Unlock()
	if b.declared.Load() {
		return nil
	}
	if len(b.cfg.Streams) > 0 {
		if err := b.checkServer(ctx); err != nil {
			return err
		}
	}
	for _, s := range b.cfg.Streams {
		if err := b.declareStream(ctx, s); err != nil {
			return err
		}
	}
	b.declared.Store(true)
	return nil
}

func (b *Bus) checkServer(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, ackTimeout)
	defer cancel()
	info, err := b.js.AccountInfo(ctx)
	switch {
	case errors.Is(err, jetstream.ErrJetStreamNotEnabled), errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount):
		return &postrider.Error{
			Code: postrider.FailedPrecondition, Op: "bus: check server",
			Msg: "JetStream is off: start nats-server with -js or a jetstream block, and allow it for the account", Err: err,
		}
	case err != nil && !b.nc.IsConnected():
		return &postrider.Error{
			Code: postrider.Unavailable, Op: "bus: check server", Unprocessed: true, Err: err,
			Msg: "not connected to NATS (" + strings.ToLower(b.nc.Status().String()) + ")",
		}
	case err != nil:
		return fromNATS("bus: check server", err)
	case info.API.Level < minAPILevel:
		return postrider.Errorf(postrider.FailedPrecondition,
			"bus: nats-server %s has JetStream API level %d, level %d is needed: run nats-server 2.14 or newer",
			b.nc.ConnectedServerVersion(), info.API.Level, minAPILevel)
	}
	return nil
}

func (b *Bus) declareStream(ctx context.Context, s Stream) error {
	return b.declareConfig(ctx, b.streamConfig(s), func(want *jetstream.StreamConfig, have jetstream.StreamConfig) {
		s.keepLimits(want, have)
		keepKind(want, have)
		if s.MaxBytes > 0 {
			want.Discard = jetstream.DiscardNew
		}
	})
}

// declareConfig makes a stream exist. Before one that exists is changed, keep takes over into what is wanted what shall
// stay as it is.
func (b *Bus) declareConfig(ctx context.Context, want jetstream.StreamConfig, keep func(want *jetstream.StreamConfig, have jetstream.StreamConfig)) error {
	op := "bus: declare stream " + want.Name
	for round := 0; ; round++ {
		began := time.Now()
		info, err := b.js.Stream(ctx, want.Name)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			fresh := want
			_ = repartition(nil, &fresh)
			_, err = b.js.CreateStream(ctx, fresh)
			if !errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
				return refused(op, err)
			}
			info, err = b.js.Stream(ctx, want.Name) // another instance was faster
		}
		if err != nil {
			return fromNATS(op, err)
		}
		have, want := info.CachedInfo().Config, want
		if err := usable(have); err != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
		keep(&want, have)
		if err := repartition(info.CachedInfo(), &want); err != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
		merged, changes := merge(have, want)
		if len(changes) == 0 || round > 0 && len(merged.Subjects) == len(have.Subjects) {
			b.warn(merged)
			return nil
		}
		if err := keepsMessages(info.CachedInfo(), merged); err != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
		if _, err := b.js.UpdateStream(ctx, merged); err != nil {
			return refused(op+": change "+strings.Join(changes, ", "), err)
		}
		b.log.Info("stream changed", "stream", want.Name, "changes", changes)
		// Another service that has read the stream before our change may write after it, without our topics: the server has no
		// conditional update. So we look again after several times as long as that takes.
		if err := pause(ctx, max(minLook, 5*time.Since(began))); err != nil {
			return fromNATS(op, err)
		}
	}
}

func (b *Bus) streamConfig(s Stream) jetstream.StreamConfig {
	cfg := jetstream.StreamConfig{
		Name:               s.Name,
		Storage:            jetstream.FileStorage,
		Retention:          jetstream.LimitsPolicy,
		Discard:            jetstream.DiscardNew,
		MaxAge:             max(s.MaxAge, 0),
		MaxBytes:           cmp.Or(max(s.MaxBytes, 0), -1),
		Replicas:           cmp.Or(s.Replicas, 1),
		Duplicates:         cmp.Or(s.DuplicateWindow, 2*time.Minute),
		AllowDirect:        true,
		AllowAtomicPublish: true,
		AllowBatchPublish:  true,
	}
	if cfg.MaxAge > 0 {
		cfg.Duplicates = min(cfg.Duplicates, cfg.MaxAge)
	}
	if s.Partitions > 0 {
		cfg.Metadata = map[string]string{metadataPartition: strconv.Itoa(s.Partitions)}
	}
	for _, t := range s.Topics {
		cfg.Subjects = append(cfg.Subjects, b.subject(t))
	}
	return cfg
}
