package bus

import (
	"errors"
	"time"

	"github.com/postrider/postrider"
)

// Settings are what the options of a [Bus.Subscribe] say, defaults filled in. A bus of another kind that takes the same
// options reads them: the one in memory, package postridertest/membus. [CircuitBreaker], [RateLimit] and [Prefetch] are not among them:
// they change when a message is handled, and not what becomes of it.
type Settings struct {
	Group        string                // the group, never empty
	Concurrency  int                   // how many messages at once, or batches
	Batch        int                   // how many messages a batch has at most; 0: the handler takes one at a time
	BatchWait    time.Duration         // how long a batch waits for more
	Retry        postrider.RetryPolicy // as given: the zero value is the default policy
	AckWait      time.Duration         // when the messages of a silent process come back
	Ordered      bool                  // one message of a key at a time, in order
	ParkFailures bool                  // what would be a dead letter parks its key
	Broadcast    bool                  // every instance handles every message

	config subscribeConfig
}

// ReadSettings returns the settings that [Bus.Subscribe] makes of a handler's options, group being that of
// [Config.Group], or the error with which it refuses them.
func ReadSettings(h postrider.Handler, group string, opts ...SubscribeOption) (Settings, error) {
	c, err := readOptions(h, group, opts)
	return Settings{
		Group: c.group, Concurrency: c.concurrency, Batch: c.batch, BatchWait: c.batchWait,
		Retry: c.retry, AckWait: c.ackWait, Ordered: c.ordered, ParkFailures: c.parkFailures, Broadcast: c.broadcast,
		config: c,
	}, err
}

// Wants asks the [Filter] about a message. The error is that of a filter that panicked.
func (s Settings) Wants(m *postrider.Message) (bool, error) {
	err := s.config.wants(m)
	if errors.Is(err, errUnwanted) {
		return false, nil
	}
	return true, err
}

// Begins says if a group that did not exist before handles a message that the stream had then: its sequence in the
// stream, and when it was stored.
func (s Settings) Begins(sequence uint64, stored time.Time) bool {
	switch s.config.from {
	case DeliverAll:
		return true
	case fromSequence:
		return sequence >= s.config.sequence
	case fromTime:
		return !stored.Before(s.config.since)
	default:
		return false
	}
}

// Checked returns the configuration with its defaults filled in, or the error with which [New] refuses it.
func (c Config) Checked() (Config, error) {
	c = c.withDefaults()
	return c, c.validate()
}
