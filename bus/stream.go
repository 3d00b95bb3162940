package bus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// Stream declares a JetStream stream. It is created when it is missing and updated when it differs; topics that others
// added stay. Every stream has file storage, limits retention, and allows atomic and fast batches.
type Stream struct {
	// Name is the stream's name: letters, digits, "-" and "_", by custom in capitals.
	Name string

	// Topics are the addresses that the stream takes, with wildcards: "orders.>".
	Topics []string

	// MaxAge is how long messages are kept. Zero: without end.
	MaxAge time.Duration

	// MaxBytes bounds the stream's size; a publish beyond it fails with ResourceExhausted rather than pushing out
	// messages that nobody has handled. Zero: no bound.
	MaxBytes int64

	// Replicas is on how many servers the stream is kept, 1 to 5. Default 1; use 3 in a cluster.
	Replicas int

	// DuplicateWindow is how long the server recognises a message id. Default 2 min.
	DuplicateWindow time.Duration

	// Partitions is into how many parts messages are divided by their partition key, 1 to 64, so that the instances of a
	// group can share the keys of an [Ordered] subscription: at most so many work at a time. Each part is a consumer on the
	// server for each such subscription; 16 suit most. The number stays with the stream, where publishers read it: it can
	// be changed only while the stream has neither messages nor consumers, and its publishers rest. Zero: as the stream is,
	// none for a new one.
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
	info, err := b.js.AccountInfo(ctx)
	switch {
	case errors.Is(err, jetstream.ErrJetStreamNotEnabled), errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount):
		return &postrider.Error{
			Code: postrider.FailedPrecondition, Op: "bus: check server",
			Msg: "JetStream is off: start nats-server with -js or a jetstream block, and allow it for the account", Err: err,
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
	return b.declareConfig(ctx, b.streamConfig(s))
}

func (b *Bus) declareConfig(ctx context.Context, want jetstream.StreamConfig) error {
	op := "bus: declare stream " + want.Name
	info, err := b.js.Stream(ctx, want.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		_ = repartition(nil, &want)
		_, err = b.js.CreateStream(ctx, want)
		if !errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			return fromNATS(op, err)
		}
		info, err = b.js.Stream(ctx, want.Name) // another instance was faster
	}
	if err != nil {
		return fromNATS(op, err)
	}
	have := info.CachedInfo().Config
	if have.PersistMode == jetstream.AsyncPersistMode {
		return postrider.Errorf(postrider.FailedPrecondition, "%s: it has persist_mode async and acknowledges messages before it "+
			"writes them, which cannot be changed: make the stream anew with persist_mode default", op)
	}
	if err := repartition(info.CachedInfo(), &want); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	merged, changes := merge(have, want)
	if len(changes) == 0 {
		return nil
	}
	if _, err := b.js.UpdateStream(ctx, merged); err != nil {
		return fromNATS(op+": change "+strings.Join(changes, ", "), err)
	}
	b.log.Info("stream changed", "stream", want.Name, "changes", changes)
	return nil
}

func (b *Bus) streamConfig(s Stream) jetstream.StreamConfig {
	cfg := jetstream.StreamConfig{
		Name:               s.Name,
		Storage:            jetstream.FileStorage,
		Retention:          jetstream.LimitsPolicy,
		Discard:            jetstream.DiscardNew,
		MaxAge:             s.MaxAge,
		MaxBytes:           cmp.Or(s.MaxBytes, -1),
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

// merge returns what the stream should become, and the differences as "field: have -> want". Fields that a Stream does
// not name stay as they are.
func merge(have, want jetstream.StreamConfig) (jetstream.StreamConfig, []string) {
	var changes []string
	merged := have
	for _, s := range want.Subjects {
		if !slices.Contains(have.Subjects, s) {
			merged.Subjects = append(slices.Clone(merged.Subjects), s)
			changes = append(changes, fmt.Sprintf("topics: %v -> with %s", have.Subjects, s))
		}
	}
	if is, n := partitions(have), partitions(want); n != is {
		merged.Metadata = map[string]string{}
		maps.Copy(merged.Metadata, have.Metadata)
		maps.Copy(merged.Metadata, want.Metadata)
		changes = append(changes, fmt.Sprintf("partitions: %d -> %d", is, n))
	}
	apply(&merged.Storage, want.Storage, "storage", &changes)
	apply(&merged.Retention, want.Retention, "retention", &changes)
	apply(&merged.Discard, want.Discard, "discard", &changes)
	apply(&merged.MaxAge, want.MaxAge, "max age", &changes)
	apply(&merged.MaxBytes, want.MaxBytes, "max bytes", &changes)
	apply(&merged.Replicas, want.Replicas, "replicas", &changes)
	apply(&merged.Duplicates, want.Duplicates, "duplicate window", &changes)
	apply(&merged.AllowAtomicPublish, want.AllowAtomicPublish, "atomic publish", &changes)
	apply(&merged.AllowBatchPublish, want.AllowBatchPublish, "batch publish", &changes)
	return merged, changes
}

func apply[T comparable](have *T, want T, name string, changes *[]string) {
	if *have != want {
		*changes = append(*changes, fmt.Sprintf("%s: %v -> %v", name, *have, want))
		*have = want
	}
}
