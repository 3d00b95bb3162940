package bus

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// minLook is how soon a stream that was changed is looked at again.
const minLook = 100 * time.Millisecond

// pause waits, or returns the error of ctx if that ends first.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// usable refuses a stream whose acknowledgements mean nothing.
func usable(have jetstream.StreamConfig) error {
	switch {
	case have.PersistMode == jetstream.AsyncPersistMode:
		return postrider.Errorf(postrider.FailedPrecondition, "it has persist_mode async and acknowledges messages before it "+
			"writes them, which cannot be changed: make the stream anew with persist_mode default")
	case have.NoAck:
		return postrider.Errorf(postrider.FailedPrecondition,
			"it has no_ack and acknowledges nothing, so that no publish can succeed: update the stream with no_ack false")
	}
	return nil
}

// refused is the error for a stream that the server does not make. Room that it lacks is no weather here.
func refused(op string, err error) error {
	if api, ok := errors.AsType[*jetstream.APIError](err); ok && api.ErrorCode == errNoResources {
		return &postrider.Error{Code: postrider.FailedPrecondition, Op: op, Err: err}
	}
	return fromNATS(op, err)
}

// keepLimits has a stream that exists keep the limits that its declaration does not name.
func (s Stream) keepLimits(want *jetstream.StreamConfig, have jetstream.StreamConfig) {
	keepIf(s.MaxAge == 0, &want.MaxAge, have.MaxAge)
	keepIf(s.MaxBytes == 0, &want.MaxBytes, have.MaxBytes)
	keepIf(s.Replicas == 0, &want.Replicas, have.Replicas)
	keepIf(s.DuplicateWindow == 0, &want.Duplicates, have.Duplicates)
	if want.MaxAge > 0 {
		want.Duplicates = min(want.Duplicates, want.MaxAge)
	}
	want.AllowMsgTTL, want.AllowMsgSchedules, want.AllowRollup = have.AllowMsgTTL, have.AllowMsgSchedules, have.AllowRollup
}

// keepsMessages refuses a change by which the server deletes messages that are there: a lower max age.
func keepsMessages(have *jetstream.StreamInfo, want jetstream.StreamConfig) error {
	was, now := have.Config.MaxAge, want.MaxAge
	oldest := have.State.FirstTime
	if now <= 0 || was > 0 && was <= now || have.State.Msgs == 0 || have.TimeStamp.Sub(oldest) < now {
		return nil
	}
	return postrider.Errorf(postrider.FailedPrecondition, "change max age: %v -> %v: it would delete messages, the oldest is of %s: "+
		"if they may go, do it with nats stream edit --max-age=%v", was, now, oldest.UTC().Format(time.RFC3339), now)
}

// keepKind has a stream that exists keep what it is, by which others may rely on it.
func keepKind(want *jetstream.StreamConfig, have jetstream.StreamConfig) {
	want.Storage, want.Retention, want.Discard, want.AllowDirect = have.Storage, have.Retention, have.Discard, have.AllowDirect
}

func keepIf[T any](keep bool, want *T, have T) {
	if keep {
		*want = have
	}
}

// merge returns what the stream should become, and the differences as "field: have -> want".
func merge(have, want jetstream.StreamConfig) (jetstream.StreamConfig, []string) {
	var changes []string
	merged := have
	if merged.Subjects = withTopics(have.Subjects, want.Subjects); !slices.Equal(merged.Subjects, have.Subjects) {
		changes = append(changes, fmt.Sprintf("topics: %v -> %v", have.Subjects, merged.Subjects))
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
	apply(&merged.AllowDirect, want.AllowDirect, "direct get", &changes)
	apply(&merged.AllowAtomicPublish, want.AllowAtomicPublish, "atomic publish", &changes)
	apply(&merged.AllowBatchPublish, want.AllowBatchPublish, "batch publish", &changes)
	apply(&merged.AllowMsgTTL, want.AllowMsgTTL, "message TTL", &changes)
	apply(&merged.AllowMsgSchedules, want.AllowMsgSchedules, "message schedules", &changes)
	apply(&merged.AllowRollup, want.AllowRollup, "rollup", &changes)
	return merged, changes
}

func apply[T comparable](have *T, want T, name string, changes *[]string) {
	if *have != want {
		*changes = append(*changes, fmt.Sprintf("%s: %v -> %v", name, *have, want))
		*have = want
	}
}

// withTopics adds subjects to those of a stream. None may cover another: the server refuses that.
func withTopics(have, more []string) []string {
	for _, s := range more {
		if slices.ContainsFunc(have, func(h string) bool { return covers(h, s) }) {
			continue
		}
		have = slices.DeleteFunc(slices.Clone(have), func(h string) bool { return covers(s, h) })
		have = append(have, s)
	}
	return have
}

// covers says if a pattern matches all that another one matches.
func covers(pattern, other string) bool {
	p, o := strings.Split(pattern, "."), strings.Split(other, ".")
	for i, token := range p {
		switch {
		case i == len(o):
			return false
		case token == ">":
			return true
		case o[i] == ">", token != "*" && token != o[i]:
			return false
		}
	}
	return len(p) == len(o)
}

// warn tells once what a stream does not promise: one that others have made may be of any kind.
func (b *Bus) warn(cfg jetstream.StreamConfig) {
	if _, told := b.warned.LoadOrStore(cfg.Name, true); told || cfg.Name == b.ownStreamName() {
		return
	}
	tell := func(consequence string) { b.log.Warn("stream "+cfg.Name+": "+consequence, "stream", cfg.Name) }
	if cfg.Storage == jetstream.MemoryStorage {
		tell("it is kept in memory: messages that it has acknowledged are lost when its server stops")
	}
	switch cfg.Retention {
	case jetstream.InterestPolicy:
		tell("it has interest retention: what is published while no group exists is acknowledged and dropped, and after a " +
			"restart of the server a message that was handled is not known as a duplicate")
	case jetstream.WorkQueuePolicy:
		tell("it is a work queue: it has one group for each topic, no other reader, and after a restart of the server a " +
			"message that was handled is not known as a duplicate")
	case jetstream.LimitsPolicy:
	}
	if cfg.Discard == jetstream.DiscardOld && (cfg.MaxBytes > 0 || cfg.MaxMsgs > 0) || cfg.MaxMsgsPerSubject > 0 && !cfg.DiscardNewPerSubject {
		tell("at its limits it drops the oldest messages, whether they were handled or not")
	}
	if !b.cfg.AllowDuplicates && cfg.Duplicates < b.cfg.PublishTimeout {
		tell(fmt.Sprintf("its duplicate window of %v is shorter than Config.PublishTimeout (%v): what is published again after "+
			"a lost acknowledgement may be stored twice", cfg.Duplicates, b.cfg.PublishTimeout))
	}
}
