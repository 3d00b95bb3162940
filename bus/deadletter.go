package bus

import (
	"context"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/fingerprint"
)

// Headers of dead letters, of what is re-driven, and of the log of actions (docs/wire.md, "Dead letters"). They stand
// beside the message's own, which stay as they came.
const (
	headerOwn = "Postrider-" // what all of them begin with

	headerGroup       = headerOwn + "Group"
	headerTopic       = headerOwn + "Topic"
	headerSubscribed  = headerOwn + "Subscription"
	headerCode        = headerOwn + "Code"
	headerCause       = headerOwn + "Cause"
	headerFingerprint = headerOwn + "Fingerprint"
	headerAttempts    = headerOwn + "Attempts"
	headerStream      = headerOwn + "Stream"
	headerSequence    = headerOwn + "Sequence"
	headerTime        = headerOwn + "Time"
	headerPayload     = headerOwn + "Payload"
	headerRedrives    = headerOwn + "Redrives"
	headerCopyOf      = headerOwn + "Copy-Of"

	headerAction     = headerOwn + "Action"
	headerBy         = headerOwn + "By"
	headerWhy        = headerOwn + "Why"
	headerActionTime = headerOwn + "Action-Time"
	headerLetter     = headerOwn + "Letter"
	headerCopy       = headerOwn + "Copy"
)

// Addresses of dead letters, and of the log of what was done with them.
const (
	deadPrefix    = "dead."
	deadLogPrefix = "deadlog."
)

// payloadAtOrigin is the Postrider-Payload of a letter that is too large with its headers: its payload is read from the
// stream that it came from.
const payloadAtOrigin = "origin"

// maxCause bounds the cause: the server refuses more than 64 KiB of headers.
const maxCause = 8 << 10

// DeadLetter is a message that could not be handled, with the cause.
type DeadLetter struct {
	Sequence uint64 // in the dead letter stream

	Group        string         // the group whose handler failed
	Topic        string         // where the message was published
	Key          string         // its partition key, "" for none
	Subscription string         // the topic that the group has subscribed to: Topic, or wildcards
	Code         postrider.Code // class of the last error
	Cause        string         // text of the last error
	Fingerprint  string         // the same for causes that differ in numbers, ids and quoted text only
	Attempts     int            // how often it was delivered, since it was last re-driven
	Redrives     int            // how often it was re-driven before
	Stream       string         // the stream it came from
	Origin       uint64         // its sequence there
	At           time.Time      // when it was given up
	CopyOf       uint64         // the letter that this one is an edited copy of, 0 for none

	// Header has the message's headers and Data its payload, as they came.
	Header map[string][]string
	Data   []byte

	// Message is the message as far as it can be read. One that is no CloudEvent has a Topic and Data only.
	Message *postrider.Message

	notes nats.Header // ours
}

// declareDeadLetters makes the dead letter stream exist. It is never of a kind that drops letters.
func (b *Bus) declareDeadLetters(ctx context.Context) error {
	s := b.cfg.DeadLetters
	s.Topics = []string{deadPrefix + ">", deadLogPrefix + ">"}
	return b.declareConfig(ctx, b.streamConfig(s), s.keepLimits)
}

// deadLetter stores a message in the dead letters and returns when the server has it.
func (s *subscription) deadLetter(ctx context.Context, msg *nats.Msg, m *postrider.Message, cause error) error {
	header := ownHeaders(msg.Header, 11)
	text := setCause(header, cause, m.Delivery.Attempt)
	item := msg.Header.Get(headerItem)
	if item != "" {
		item = "." + item
	}
	item += life(msg.Header)
	for _, h := range [...][2]string{
		{headerGroup, s.cfg.group},
		{headerTopic, m.Topic},
		{headerSubscribed, s.handler.Topic()},
		{headerStream, m.Delivery.Stream},
		{headerSequence, strconv.FormatUint(m.Delivery.Sequence, 10)},
		{headerTime, formatTime(time.Now())},
		{headerMsgID, fmt.Sprintf("dead.%s.%s.%d%s", s.durable, m.Delivery.Stream, m.Delivery.Sequence, item)},
	} {
		header[h[0]] = []string{h[1]}
	}
	letter := &nats.Msg{Subject: s.bus.subject(deadPrefix + s.cfg.group + "." + m.Topic), Header: header, Data: msg.Data}
	s.bus.fit(letter)
	if err := s.bus.pub.publish(ctx, []*entry{{msg: letter}})[0]; err != nil {
		return fmt.Errorf("bus: dead letter: %w", err)
	}
	s.bus.stats.deadLettered.Add(1)
	s.log.Warn("message moved to the dead letters", "id", m.ID, "type", m.Type, "attempts", m.Delivery.Attempt,
		"code", postrider.CodeOf(cause), "cause", text)
	return nil
}

// setCause writes why a message could not be handled into its headers. It returns the text, cut to what they hold.
func setCause(header nats.Header, cause error, attempts int) string {
	text, code := cause.Error(), postrider.CodeOf(cause)
	header[headerFingerprint] = []string{fingerprint.Of(code, text)}
	if len(text) > maxCause {
		text = strings.ToValidUTF8(text[:maxCause], "") + " ..."
	}
	header[headerCode] = []string{code.String()}
	header[headerCause] = []string{strconv.Quote(text)} // a header has one line
	header[headerAttempts] = []string{strconv.Itoa(attempts)}
	return text
}

// original returns the headers with which a letter is tried again: as it came, and where it came from.
func (d *DeadLetter) original() nats.Header {
	header := nats.Header(maps.Clone(d.Header))
	for _, k := range [...]string{headerTopic, headerStream, headerSequence, headerItem, headerRedrives, headerLetter} {
		if v, ok := d.notes[k]; ok {
			header[k] = v
		}
	}
	return header
}

// life tells the ids of a re-driven message from those that it had before: it ends in the same place, after the same
// attempts.
func life(h nats.Header) string {
	if letter := h.Get(headerLetter); letter != "" {
		return ".letter-" + letter
	}
	return ""
}

// fit leaves the payload out if a message has become too large by our headers. It is still where the letter came from.
func (b *Bus) fit(msg *nats.Msg) {
	if limit := b.nc.MaxPayload(); limit > 0 && int64(msg.Size()) > limit {
		msg.Header[headerPayload], msg.Data = []string{payloadAtOrigin}, nil
	}
}

func formatTime(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// parseDeadLetter reads what deadLetter stored.
func parseDeadLetter(sequence uint64, h nats.Header, data []byte) DeadLetter {
	d := DeadLetter{
		Sequence: sequence, Group: h.Get(headerGroup), Topic: h.Get(headerTopic), Subscription: h.Get(headerSubscribed),
		Cause: unquote(h.Get(headerCause)), Fingerprint: h.Get(headerFingerprint), Stream: h.Get(headerStream),
		Header: map[string][]string{}, Data: data, notes: nats.Header{},
	}
	if code := h.Get(headerCode); code != "" {
		d.Code, _ = postrider.ParseCode(code)
	}
	d.Attempts, _ = strconv.Atoi(h.Get(headerAttempts))
	d.Redrives, _ = strconv.Atoi(h.Get(headerRedrives))
	d.Origin, _ = strconv.ParseUint(h.Get(headerSequence), 10, 64)
	d.At, _ = time.Parse(time.RFC3339Nano, h.Get(headerTime))
	d.CopyOf, _ = strconv.ParseUint(h.Get(headerCopyOf), 10, 64)
	for k, v := range h {
		switch {
		case strings.HasPrefix(k, headerOwn):
			d.notes[k] = v
		case !strings.HasPrefix(k, "Nats-"):
			d.Header[k] = v
		}
	}
	m, _, err := decode(&nats.Msg{Header: d.Header, Data: data}, d.Topic)
	if err != nil {
		m = &postrider.Message{Topic: d.Topic, Data: data}
	}
	d.Message = m
	if key := h.Get(headerParkedKey); key != "" { // the payload may be elsewhere
		d.Key = unquote(key)
	} else {
		d.Key = newDelivered(&nats.Msg{Header: d.Header, Data: data}).key()
	}
	return d
}

// unquote reads a header that was quoted to have one line.
func unquote(s string) string {
	if text, err := strconv.Unquote(s); err == nil {
		return text
	}
	return s
}
