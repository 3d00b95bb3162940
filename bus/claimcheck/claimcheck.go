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

// Middleware is a [postrider.Middleware] for those who handle: it fetches the payload that a message refers to and hands on
// the whole message. References of other kinds are left alone. A large reply is stored: that of a durable command with a topic
// to go to, and that of a call whose caller has [Store.CallMiddleware].
func (s *Store) Middleware(next postrider.HandlerFunc) postrider.HandlerFunc {
	return func(ctx context.Context, m *postrider.Message) (*postrider.Message, error) {
		accepted := m.Extension(postrider.ExtAcceptDataRef) == s.place()
		if refers(m) {
			whole, err := s.get(ctx, m)
			if err != nil {
				return nil, err
			}
			m, ctx = whole, postrider.ContextWithMessage(ctx, whole)
		}
		reply, err := next(ctx, m)
		if err != nil || reply == nil || len(reply.Data) < s.cfg.MinBytes || reply.Topic == "" && !accepted {
			return reply, err
		}
		return s.put(ctx, reply)
	}
}

// CallMiddleware is a [postrider.Middleware] for those who call, in rpc.ClientConfig: it stores a large request and fetches a
// large response. The server needs [Store.Middleware]. Storing and fetching are part of the call's deadline.
func (s *Store) CallMiddleware(next postrider.HandlerFunc) postrider.HandlerFunc {
	return func(ctx context.Context, m *postrider.Message) (*postrider.Message, error) {
		m = m.Clone()
		if err := m.SetExtension(postrider.ExtAcceptDataRef, s.place()); err != nil {
			return nil, err
		}
		if len(m.Data) >= s.cfg.MinBytes {
			claim, err := s.put(ctx, m)
			if err != nil {
				return nil, err
			}
			m = claim
		}
		reply, err := next(ctx, m)
		if err != nil || !refers(reply) {
			return reply, err
		}
		return s.get(ctx, reply)
	}
}

// refers says if a message has a reference of ours in place of its data.
func refers(m *postrider.Message) bool {
	return strings.HasPrefix(m.Extension(postrider.ExtDataRef), scheme)
}
