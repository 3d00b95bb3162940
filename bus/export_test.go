package bus

import (
	"context"
	"time"

	"github.com/nats-io/nats.go"
)

// SendToGroup lets tests give one group a message without the wait of a retry.
func (b *Bus) SendToGroup(ctx context.Context, group, topic string, msg *nats.Msg, at time.Time) error {
	return b.sendToGroup(ctx, group, topic, msg, at)
}
