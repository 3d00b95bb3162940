package bus

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/postrider/postrider"
)

// Prefetch bounds what this process holds of a subscription, being handled or waiting for that: messages, 1 to 10,000, and
// bytes, at least 1024. A message that exceeds the bytes comes as long as they are not used up, and so does one that is larger
// than all of them; where messages grow suddenly, those on their way may exceed them once. The partitions of an [Ordered]
// subscription share the bytes. Zero is the default: what the handlers take in 50 ms, but twice as many messages as they
// handle at once at least and about 2000 at most; 16 MiB.
func Prefetch(messages, bytes int) SubscribeOption {
	return func(c *subscribeConfig) { c.prefetch, c.prefetchBytes = messages, bytes }
}

const (
	defaultPrefetchBytes = 16 << 20
	leastPrefetchBytes   = 1024
)

// checkPrefetch checks what was given.
func (c *subscribeConfig) checkPrefetch() error {
	if c.prefetch < 0 || c.prefetch > 10_000 || c.prefetchBytes != 0 && c.prefetchBytes < leastPrefetchBytes {
		return postrider.Errorf(postrider.InvalidArgument, "Prefetch is %d messages and %d bytes: want 1 to 10,000 and at least %d, or 0",
			c.prefetch, c.prefetchBytes, leastPrefetchBytes)
	}
	return nil
}

// holdings are the bytes of the messages that a subscription holds. The subscription's lock guards them.
type holdings struct {
	bytes   int
	average int  // of a message, lately
	beyond  bool // the next message is larger than what was asked for
}

// arrived notes the size of a message.
func (h *holdings) arrived(size int) {
	if h.average == 0 {
		h.average = size
	}
	h.average += (size - h.average) / 16
	h.beyond = false
}

// limitBytes bounds a pull request for a number of messages, by its field max_bytes, and returns how many messages are asked
// for: none if it is better to wait. Where a full queue would be more than half of the bytes one request is out at a time,
// so that together they ask for no more than there is room for. The server ends a request at a message that does not fit into
// what is left of it; that one is then asked for by itself, without a bound. The lock is held.
func (s *subscription) limitBytes(room, capacity int) (messages int, field string) {
	budget := cmp.Or(s.cfg.prefetchBytes, defaultPrefetchBytes)
	if s.partition != "" {
		budget = max(budget/max(s.shares, 1), leastPrefetchBytes)
	}
	free := budget - s.holdings.bytes
	worth := free >= budget/2 || len(s.held)+s.asked < s.cfg.atOnce() // which leaves handlers idle
	switch {
	case free <= 0 || !worth:
		return 0, ""
	case s.asked > 0 && (s.holdings.beyond || capacity*s.holdings.average > budget/2):
		return 0, ""
	case s.holdings.beyond:
		return 1, ""
	default:
		return room, fmt.Sprintf(`,"max_bytes":%d`, free)
	}
}

// endedByBytes notes that the server ended a request because of a message that is too large for it. The lock is held.
func (s *subscription) endedByBytes(description string) {
	if strings.Contains(description, "MaxBytes") {
		s.holdings.beyond = true
	}
}
