package bus

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// Headers that say why a message is in the dead letters. They stand beside the message's own, which stay as they came.
const (
	headerGroup    = "Postrider-Group"
	headerTopic    = "Postrider-Topic"
	headerCode     = "Postrider-Code"
	headerCause    = "Postrider-Cause"
	headerAttempts = "Postrider-Attempts"
	headerStream   = "Postrider-Stream"
	headerSequence = "Postrider-Sequence"
	headerTime     = "Postrider-Time"
)

// maxCause bounds the cause: the server refuses more than 64 KiB of headers.
const maxCause = 8 << 10

// DeadLetter is a message that could not be handled, with the cause.
type DeadLetter struct {
	Sequence uint64 // in the dead letter stream

	Group    string         // the group whose handler failed
	Topic    string         // where the message was published
	Code     postrider.Code // class of the last error
	Cause    string         // text of the last error
	Attempts int            // how often it was delivered
	Stream   string         // the stream it came from
	Origin   uint64         // its sequence there
	At       time.Time      // when it was given up

	// Message is the message as far as it can be read; its Data is always there.
	Message *postrider.Message
}

func (b *Bus) deadLetterStream() Stream {
	return Stream{Name: b.cfg.DeadLetters, Topics: []string{"dead.>"}}
}

// deadLetter stores a message in the dead letters and returns when the server has it.
func (s *subscription) deadLetter(ctx context.Context, msg *nats.Msg, m *postrider.Message, cause error) error {
	header := ownHeaders(msg.Header, 9)
	text := cause.Error()
	if len(text) > maxCause {
		text = strings.ToValidUTF8(text[:maxCause], "") + " ..."
	}
	item := msg.Header.Get(headerItem)
	if item != "" {
		item = "." + item
	}
	for _, h := range [...][2]string{
		{headerGroup, s.cfg.group},
		{headerTopic, m.Topic},
		{headerCode, postrider.CodeOf(cause).String()},
		{headerCause, strconv.Quote(text)}, // a header has one line
		{headerAttempts, strconv.Itoa(m.Delivery.Attempt)},
		{headerStream, m.Delivery.Stream},
		{headerSequence, strconv.FormatUint(m.Delivery.Sequence, 10)},
		{headerTime, time.Now().UTC().Format(time.RFC3339Nano)},
		{headerMsgID, fmt.Sprintf("dead.%s.%s.%d%s", s.cfg.group, m.Delivery.Stream, m.Delivery.Sequence, item)},
	} {
		header[h[0]] = []string{h[1]}
	}
	e := &entry{msg: &nats.Msg{Subject: s.bus.subject("dead." + s.cfg.group + "." + m.Topic), Header: header, Data: msg.Data}}
	if err := s.bus.pub.publish(ctx, []*entry{e})[0]; err != nil {
		return fmt.Errorf("bus: dead letter: %w", err)
	}
	s.bus.stats.deadLettered.Add(1)
	s.log.Warn("message moved to the dead letters", "id", m.ID, "type", m.Type, "attempts", m.Delivery.Attempt,
		"code", postrider.CodeOf(cause), "cause", text)
	return nil
}

// DeadLetters returns up to limit dead letters, oldest first, from a sequence of the dead letter stream on (0: from its
// beginning). It is empty when there are none, or when the stream was never declared.
func (b *Bus) DeadLetters(ctx context.Context, from uint64, limit int) ([]DeadLetter, error) {
	const op = "bus: list dead letters"
	stream, err := b.js.Stream(ctx, b.cfg.DeadLetters)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, nil
	} else if err != nil {
		return nil, fromNATS(op, err)
	}
	var letters []DeadLetter
	for seq := max(from, 1); len(letters) < limit; seq++ {
		raw, err := stream.GetMsg(ctx, seq, jetstream.WithGetMsgSubject(b.subject("dead.>")))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			break
		} else if err != nil {
			return nil, fromNATS(op, err)
		}
		seq = raw.Sequence
		letters = append(letters, parseDeadLetter(raw))
	}
	return letters, nil
}

func parseDeadLetter(raw *jetstream.RawStreamMsg) DeadLetter {
	h := raw.Header
	d := DeadLetter{
		Sequence: raw.Sequence, Group: h.Get(headerGroup), Topic: h.Get(headerTopic), Stream: h.Get(headerStream),
		Cause: h.Get(headerCause),
	}
	d.Code, _ = postrider.ParseCode(h.Get(headerCode))
	if text, err := strconv.Unquote(d.Cause); err == nil {
		d.Cause = text
	}
	d.Attempts, _ = strconv.Atoi(h.Get(headerAttempts))
	d.Origin, _ = strconv.ParseUint(h.Get(headerSequence), 10, 64)
	d.At, _ = time.Parse(time.RFC3339Nano, h.Get(headerTime))
	m, _, err := decode(&nats.Msg{Header: h, Data: raw.Data}, d.Topic)
	if err != nil {
		m = &postrider.Message{Topic: d.Topic, Data: raw.Data}
	}
	d.Message = m
	return d
}
