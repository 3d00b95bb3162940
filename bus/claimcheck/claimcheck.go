package claimcheck

import (
	"context"
	"slices"
	"strings"

	"github.com/postrider/postrider"
)

// Publisher returns a publisher that stores large payloads and publishes references to them through next: a bus, or
// outbox.In(tx). When one of several payloads cannot be stored, none of the messages is published. Like next it is safe for
// concurrent use, or not.
func (s *Store) Publisher(next postrider.Publisher) postrider.Publisher { return publisher{s, next} }

type publisher struct {
	store *Store
	next  postrider.Publisher
}

// Publish implements [postrider.Publisher]; see [Store.Publisher].
func (p publisher) Publish(ctx context.Context, msgs ...*postrider.Message) error {
	out := slices.Clone(msgs)
	for i, m := range msgs {
		if len(m.Data) < p.store.cfg.MinBytes {
			continue
		}
		claim, err := p.store.put(ctx, m)
		if err != nil {
			return err
		}
		out[i] = claim
	}
	err := p.next.Publish(ctx, out...)
	for i, m := range msgs {
		m.Source = out[i].Source // which next fills in
	}
	return err
}

// Middleware is a [postrider.Middleware]: it fetches the payload that a message refers to and hands on the whole message.
// References of other kinds are left alone. A large reply with a topic to go to, that of a durable command, is stored.
func (s *Store) Middleware(next postrider.HandlerFunc) postrider.HandlerFunc {
	return func(ctx context.Context, m *postrider.Message) (*postrider.Message, error) {
		if strings.HasPrefix(m.Extension(postrider.ExtDataRef), scheme) {
			whole, err := s.get(ctx, m)
			if err != nil {
				return nil, err
			}
			m, ctx = whole, postrider.ContextWithMessage(ctx, whole)
		}
		reply, err := next(ctx, m)
		if err != nil || reply == nil || reply.Topic == "" || len(reply.Data) < s.cfg.MinBytes {
			return reply, err
		}
		return s.put(ctx, reply)
	}
}
