package main

import (
	"context"
	"encoding/json"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/synadia-io/orbit.go/jetstreamext"
)

// The raw peers do half of the work, as fast as their libraries can: a ceiling for the others.

const rawGroup = 1000

// headers are those of a CloudEvent in binary mode, and the message id.
func headers(prefix string, id int64) nats.Header {
	name := prefix + "-" + strconv.FormatInt(id, 10)
	return nats.Header{
		"ce-specversion":     {"1.0"},
		"ce-id":              {name},
		"ce-source":          {source},
		"ce-type":            {subject},
		"ce-time":            {time.Now().UTC().Format(time.RFC3339Nano)},
		"ce-datacontenttype": {"application/json"},
		nats.MsgIdHdr:        {source + "#" + name},
	}
}

// stock has its messages in memory and sends them.
type stock struct {
	site
	msgs []*nats.Msg
	send func(context.Context, jetstream.JetStream, []*nats.Msg) error
}

func openAsync(_ context.Context, s site) (session, error) {
	return &stock{site: s, send: sendAsync}, nil
}

func openFast(_ context.Context, s site) (session, error) {
	return &stock{site: s, send: sendFast}, nil
}

func (s *stock) publish(_ context.Context, _ pgx.Tx, orders []*order) error {
	for _, o := range orders {
		data, err := json.Marshal(o)
		if err != nil {
			return err
		}
		s.msgs = append(s.msgs, &nats.Msg{Subject: subject, Header: headers("raw", o.Number), Data: data})
	}
	return nil
}

func (s *stock) relay(ctx context.Context) (func() error, error) {
	return start(ctx, func(context.Context) error {
		for msgs := s.msgs; len(msgs) > 0; {
			group := msgs[:min(rawGroup, len(msgs))]
			if err := s.send(ctx, s.js, group); err != nil {
				return err
			}
			msgs = msgs[len(group):]
		}
		return nil
	}), nil
}

func (s *stock) table() string { return "" }

func sendAsync(ctx context.Context, js jetstream.JetStream, msgs []*nats.Msg) error {
	futures := make([]jetstream.PubAckFuture, len(msgs))
	for i, m := range msgs {
		var err error
		if futures[i], err = js.PublishMsgAsync(m); err != nil {
			return err
		}
	}
	for _, f := range futures {
		select {
		case <-f.Ok():
		case err := <-f.Err():
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func sendFast(ctx context.Context, js jetstream.JetStream, msgs []*nats.Msg) error {
	fast, err := jetstreamext.NewFastPublisher(js, jetstreamext.FastPublishFlowControl{Flow: rawGroup / 4, MaxOutstandingAcks: 4})
	if err != nil {
		return err
	}
	last := len(msgs) - 1
	for _, m := range msgs[:last] {
		if _, err := fast.AddMsg(m); err != nil {
			return err
		}
	}
	_, err = fast.CommitMsg(ctx, msgs[last])
	return err
}

// copier copies messages into a table.
type copier struct{ site }

func openCopy(ctx context.Context, s site) (session, error) {
	_, err := s.pool.Exec(ctx, `create table copied (id bigint generated always as identity primary key, data bytea)`)
	return copier{s}, err
}

func (copier) publish(ctx context.Context, tx pgx.Tx, orders []*order) error {
	_, err := tx.CopyFrom(ctx, pgx.Identifier{"copied"}, []string{"data"}, pgx.CopyFromSlice(len(orders), func(i int) ([]any, error) {
		data, err := json.Marshal(orders[i])
		return []any{data}, err
	}))
	return err
}

func (copier) relay(context.Context) (func() error, error) { return func() error { return nil }, nil }
func (copier) table() string                               { return "copied" }
