package bus

import (
	"context"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/backoff"
	"github.com/postrider/postrider/internal/envelope"
)

// maxBatchEvents bounds how many events one message may carry.
const maxBatchEvents = 10_000

// headerItem says which event of a batch a dead letter was, counted from 0.
const headerItem = "Postrider-Item"

// splitBatch returns the events of a message in a batch mode, each as a message of its own in structured mode, and nil for
// any other message.
func splitBatch(msg *nats.Msg, f format) ([]*nats.Msg, error) {
	var events [][]byte
	var err error
	contentType := envelope.ContentTypeJSON
	switch f {
	case formatJSONBatch:
		events, err = envelope.SplitJSON(msg.Data)
	case formatProtoBatch:
		contentType = envelope.ContentTypeProto
		events, err = envelope.SplitProto(msg.Data)
	default:
		return nil, nil
	}
	if err == nil && len(events) > maxBatchEvents {
		err = postrider.Errorf(postrider.InvalidArgument, "the batch has %d events, at most %d are taken", len(events), maxBatchEvents)
	}
	if err != nil {
		return nil, err
	}
	items := make([]*nats.Msg, len(events))
	for i, event := range events {
		items[i] = &nats.Msg{
			Subject: msg.Subject, Reply: msg.Reply, Data: event,
			Header: nats.Header{headerContentType: {contentType}, headerItem: {strconv.Itoa(i)}},
		}
	}
	return items, nil
}

// handleBatch hands the events of one message to the handler and settles the message when all are done. While attempts are
// left, one event that fails brings the whole message again, and with it the events that were done: at least once is what
// the bus promises. In the end only the events that failed go to the dead letters, each by itself.
func (s *subscription) handleBatch(ctx context.Context, d *delivered, items []*nats.Msg, delivery postrider.Delivery) bool {
	var failed []outcome
	var again error
	var delay time.Duration
	repeat := func(err error, d time.Duration) { again, delay = err, max(delay, d) }
	for _, o := range s.attemptItems(ctx, items, delivery) {
		if o.err == nil {
			if _, err := s.conclude(o.Msg, o.message, o.reply, nil); err != nil {
				repeat(err, backoff.Delay(s.cfg.retry, delivery.Attempt))
			}
		} else if d, retry := backoff.Next(s.cfg.retry, delivery.Attempt, o.err); retry {
			repeat(o.err, d)
		} else {
			failed = append(failed, o)
		}
	}
	for _, f := range failed {
		if again != nil {
			break // they fail again with the others
		}
		f.Header = withItem(d.Header, f.Header)
		if _, err := s.conclude(f.Msg, f.message, nil, f.err); err != nil {
			repeat(err, backoff.Delay(s.cfg.retry, delivery.Attempt))
		}
	}
	s.broken(again)
	if again != nil {
		return s.retry(d, &postrider.Message{Type: "batch", Delivery: delivery}, delay, again)
	}
	s.answer(d.Msg, nil)
	return true
}

// withItem returns the headers of a batch, but for its content type, with those of one of its events.
func withItem(batch, item nats.Header) nats.Header {
	header := make(nats.Header, len(batch)+len(item))
	for key, values := range batch {
		if !strings.EqualFold(key, headerContentType) {
			header[key] = values
		}
	}
	maps.Copy(header, item)
	return header
}
