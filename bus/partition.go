package bus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// In a stream with partitions a message that has a partition key is stored under <topic>.partition.<n>, so that each
// partition can have a consumer of its own, and with it an owner among the instances of a group. The rest of the bus
// knows the topic only.
const (
	partitionToken    = ".partition"
	metadataPartition = "postrider.partitions" // of a stream: how many it has
	maxPartitions     = 64
)

// partitionOf returns the partition of a key, of n: FNV-1a of 32 bits, as in the server's own subject mapping.
func partitionOf(key string, n int) int {
	h := uint32(2166136261)
	for i := range len(key) {
		h = (h ^ uint32(key[i])) * 16777619
	}
	return int(h % uint32(n))
}

// inPartition returns where the messages of a topic, which may have wildcards, are in a partition, "*" for any.
func inPartition(subject, partition string) string { return subject + partitionToken + "." + partition }

// withoutPartition returns the subject that a message has outside of partitions.
func withoutPartition(subject string) string {
	i := strings.LastIndexByte(subject, '.')
	if i < 0 || len(subject)-i > 3 || !strings.HasSuffix(subject[:i], partitionToken) || strings.Trim(subject[i+1:], "0123456789") != "" {
		return subject
	}
	return subject[:i-len(partitionToken)]
}

// wanted is the subject whose stream the entry goes to.
func (e *entry) wanted() string { return cmp.Or(e.via, withoutPartition(e.msg.Subject)) }

// divide gives an entry with a key its place in a stream with n partitions.
func (e *entry) divide(n int) {
	if n > 0 && e.key != "" && e.via == "" {
		e.msg.Subject = inPartition(e.wanted(), strconv.Itoa(partitionOf(e.key, n)))
	}
}

// bothForms returns what to read of a stream with partitions to get all messages of a topic.
func bothForms(subject string) []string {
	if strings.HasSuffix(subject, ">") {
		return []string{subject}
	}
	return []string{subject, inPartition(subject, "*")}
}

// filters are what the subscription's consumer reads of a stream with partitions.
func (s *subscription) filters() []string {
	switch s.partition {
	case "":
		return bothForms(s.subject)
	case "0":
		return []string{s.subject, inPartition(s.subject, "0")}
	default:
		return []string{inPartition(s.subject, s.partition)}
	}
}

// groupConsumer returns the consumer of the group, which read everything before it was divided, for one of its parts.
func (s *subscription) groupConsumer(ctx context.Context, stream jetstream.Stream) (jetstream.Consumer, error) {
	durable := durableName(s.cfg.group, s.handler.Topic())
	if s.partition == "" || durable == s.durable {
		return nil, jetstream.ErrConsumerNotFound
	}
	return stream.Consumer(ctx, durable)
}

// undivided makes sure that the group of a subscription that reads all partitions has not been divided: what its parts have
// before them would be lost.
func (s *subscription) undivided(ctx context.Context, stream jetstream.Stream) error {
	op := "bus: subscribe " + s.handler.Name()
	_, err := stream.Consumer(ctx, shareName(s.durable, 1))
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		return nil
	}
	if err != nil {
		return fromNATS(op, err)
	}
	return postrider.Errorf(postrider.FailedPrecondition, "%s: group %s was Ordered and has a consumer for each partition: "+
		"have it finish as Ordered and delete consumers %s to %s of stream %s, or take another group", op, s.cfg.group,
		shareName(s.durable, 1), shareName(s.durable, partitions(stream.CachedInfo().Config)-1), s.stream)
}

// takes says if a message that came for the subscription's subject is one of its topic: with wildcards, what looks like a
// token may be the partition of a shorter topic.
func (s *subscription) takes(subject string) bool {
	bare := withoutPartition(subject)
	return len(bare) == len(subject) || strings.HasSuffix(s.subject, ">") || strings.Count(bare, ".") == strings.Count(s.subject, ".")
}

// partitions returns how many partitions a stream has, 0 for none.
func partitions(cfg jetstream.StreamConfig) int {
	n, _ := strconv.Atoi(cfg.Metadata[metadataPartition])
	return min(max(n, 0), maxPartitions)
}

// repartition adds to what a stream shall become what follows from its partitions. It fails if their number would change
// and somebody relies on it.
func repartition(have *jetstream.StreamInfo, want *jetstream.StreamConfig) error {
	n := partitions(*want)
	if have != nil {
		is := partitions(have.Config)
		switch {
		case n == 0:
			n = is
		case n != is && have.State.Msgs+uint64(have.State.Consumers) > 0:
			return postrider.Errorf(postrider.FailedPrecondition, "partitions: %d -> %d: the stream has %d messages and %d consumers, "+
				"and keys would lose their order: let the groups finish and stop, then delete the consumers and purge the stream, "+
				"or declare another stream", is, n, have.State.Msgs, have.State.Consumers)
		}
	}
	if n == 0 {
		return nil
	}
	want.Metadata = map[string]string{metadataPartition: strconv.Itoa(n)}
	for _, subject := range slices.Clone(want.Subjects) {
		for _, form := range bothForms(subject) {
			if !slices.Contains(want.Subjects, form) {
				want.Subjects = append(want.Subjects, form)
			}
		}
	}
	return nil
}

// checkPartitions refuses a topic that looks like the partition of another.
func checkPartitions(topic string) error {
	if bare := withoutPartition(topic); bare != topic {
		return fmt.Errorf("%q is taken for a partition of %s", topic, bare)
	}
	return nil
}
