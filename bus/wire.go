package bus

import (
	"fmt"
	"strings"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/envelope"
)

// headerPrefix stands before attribute names in binary mode (cloudevents/spec: nats-protocol-binding, section 3.1.3).
const headerPrefix = "ce-"

// Header keys as they go out. They are made once: a key is a string that the header map holds.
const (
	headerID     = headerPrefix + "id"
	headerMsgID  = nats.MsgIdHdr
	headerSpec   = headerPrefix + "specversion"
	headerKey    = headerPrefix + postrider.ExtPartitionKey
	headerStruct = "Content-Type"
)

// encode writes m in binary mode: attributes as ce- headers with percent-encoded values, data as the payload.
func encode(m *postrider.Message, subject string) *nats.Msg {
	n := 8 + len(m.Extensions)
	values := make([]string, 0, n) // one backing array for all header values
	header := make(nats.Header, n)
	set := func(key, value string) {
		values = append(values, value)
		header[key] = values[len(values)-1 : len(values) : len(values)]
	}
	envelope.Headers(m, func(name, value string) { set(headerPrefix+name, envelope.Escape(value)) })
	set(headerMsgID, envelope.Escape(m.Source)+"#"+envelope.Escape(m.ID))
	return &nats.Msg{Subject: subject, Header: header, Data: m.Data}
}

// partitionKey reads the key of a message that is not decoded yet.
func partitionKey(msg *nats.Msg) string {
	if values := msg.Header[headerKey]; len(values) > 0 {
		return envelope.Unescape(values[0])
	}
	if len(msg.Header[headerSpec]) > 0 { // binary mode
		return ""
	}
	m, _, _ := decode(msg, "") // what cannot be read has no key, and ends in the dead letters
	return m.Key()
}

// decode reads what a stream delivered: binary mode, structured JSON, or structured protobuf. The last result is false,
// with no error, for a message that is no CloudEvent at all; then only Data, ContentType and Topic are set.
func decode(msg *nats.Msg, topic string) (*postrider.Message, bool, error) {
	m := &postrider.Message{Topic: topic}
	contentType, binary := "", false
	for key, values := range msg.Header {
		if len(values) == 0 {
			continue
		}
		if key == headerSpec || strings.EqualFold(key, headerSpec) {
			binary = true
		} else if strings.EqualFold(key, headerStruct) {
			contentType = values[0]
		}
	}
	switch {
	case strings.HasPrefix(contentType, envelope.ContentTypeProto):
		return m, true, envelope.ParseProto(msg.Data, m)
	case strings.HasPrefix(contentType, envelope.ContentTypeJSON):
		return m, true, envelope.ParseJSON(msg.Data, m)
	case !binary:
		m.Data, m.ContentType = msg.Data, contentType
		return m, false, nil
	}
	m.Data = msg.Data
	for key, values := range msg.Header {
		if len(key) <= len(headerPrefix) || len(values) == 0 || !strings.EqualFold(key[:len(headerPrefix)], headerPrefix) {
			continue
		}
		name := strings.ToLower(key[len(headerPrefix):])
		if err := envelope.SetHeader(m, name, envelope.Unescape(values[0])); err != nil {
			return m, true, fmt.Errorf("header %s: %w", key, err)
		}
	}
	return m, true, nil
}
