package bus

import (
	"bytes"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/envelope"
)

// headerPrefix stands before attribute names in binary mode (cloudevents/spec: nats-protocol-binding, section 3.1.3).
const headerPrefix = "ce-"

// Header keys as they go out.
const (
	headerMsgID       = nats.MsgIdHdr
	headerSpec        = headerPrefix + "specversion"
	headerKey         = headerPrefix + postrider.ExtPartitionKey
	headerContentType = "Content-Type"
)

// attributeHeader returns the key of an attribute's header; those of the common attributes are constants.
func attributeHeader(name string) string {
	switch name {
	case "specversion":
		return headerSpec
	case "id":
		return headerPrefix + "id"
	case "source":
		return headerPrefix + "source"
	case "type":
		return headerPrefix + "type"
	case "datacontenttype":
		return headerPrefix + "datacontenttype"
	case "subject":
		return headerPrefix + "subject"
	case "time":
		return headerPrefix + "time"
	case postrider.ExtCorrelationID:
		return headerPrefix + postrider.ExtCorrelationID
	case postrider.ExtCausationID:
		return headerPrefix + postrider.ExtCausationID
	case postrider.ExtPartitionKey:
		return headerKey
	case postrider.ExtTraceParent:
		return headerPrefix + postrider.ExtTraceParent
	default:
		return headerPrefix + name
	}
}

// Mode is how a bus writes events: cloudevents/spec, nats-protocol-binding, section 3.
type Mode int

// Modes.
const (
	// Binary has the attributes in headers and the data as the payload.
	Binary Mode = iota

	// Compact is structured mode in the CloudEvents protobuf format: the whole event in the payload, beside one header for the
	// content type. Headers cost client and server more than the payload of a small event. Readers in other languages need
	// the protobuf format, and nats sub shows the data less well.
	Compact

	// JSON is structured mode in the CloudEvents JSON format, for readers that know no other. Data that is no JSON and no
	// text is a third larger in it.
	JSON
)

// Content types of the structured modes, as headers hold them. Nobody changes them.
var (
	typeCompact = []string{envelope.ContentTypeProto} //nolint:gochecknoglobals // a constant in all but syntax
	typeJSON    = []string{envelope.ContentTypeJSON}  //nolint:gochecknoglobals // the same
)

// encode writes m for a subject, in the mode of the bus.
func (b *Bus) encode(m *postrider.Message, subject string) *nats.Msg {
	e := &entry{msg: &nats.Msg{Header: nats.Header{}}}
	b.encodeTo(e, m, subject)
	return e.msg
}

// encodeTo writes m into the message of e: in binary mode, attributes as ce- headers with percent-encoded values and data as
// the payload, or in a structured mode.
func (b *Bus) encodeTo(e *entry, m *postrider.Message, subject string) {
	msg := e.msg
	msg.Subject = subject
	if n := 10 + len(m.Extensions); cap(e.values) < n { // one backing array: it must not move
		e.values = make([]string, 0, n)
	}
	values := e.values[:0]
	set := func(key, value string) {
		values = append(values, value)
		msg.Header[key] = values[len(values)-1 : len(values) : len(values)]
	}
	switch b.cfg.Mode {
	case Compact:
		msg.Header[headerContentType] = typeCompact
		e.data = envelope.AppendProto(e.data[:0], m)
		msg.Data = e.data
	case JSON:
		msg.Header[headerContentType] = typeJSON
		e.data = envelope.AppendJSON(e.data[:0], m)
		msg.Data = e.data
	default:
		envelope.Headers(m, func(name, value string) { set(attributeHeader(name), envelope.Escape(value)) })
		msg.Data = m.Data
	}
	if !b.cfg.AllowDuplicates {
		set(headerMsgID, messageID(m))
	}
	e.values = values
}

// messageID is what the server knows a message by. A "#" may stand in source and id; only the last one parts them, lest
// //a#b with the id c be taken for //a with the id b#c. What is published once more on purpose is another message to the server.
func messageID(m *postrider.Message) string {
	id := envelope.Escape(m.Source) + "#" + strings.ReplaceAll(envelope.Escape(m.ID), "#", "%23")
	if again := m.Extension(postrider.ExtRedrive); again != "" {
		id += "#" + strings.ReplaceAll(envelope.Escape(again), "#", "%23")
	}
	return id
}

// format is how a message carries its events.
type format int

const (
	formatNone       format = iota // no CloudEvent
	formatBinary                   // attributes in headers
	formatJSON                     // structured modes
	formatProto                    //
	formatJSONBatch                // several events in structured mode
	formatProtoBatch               //
	formatUnknown                  // structured, in a format that the bus does not know
	formatMaybeJSON                // perhaps structured, without a content type
)

// structuredType begins the content type of every structured mode; alone it means JSON.
const structuredType = "application/cloudevents"

// formatOf tells how a message is to be read. The binding knows structured mode by its content type, and takes everything
// else for binary; the CloudEvents Go SDK, and the binding before 1.0.3, send structured JSON without any header.
func formatOf(msg *nats.Msg) (f format, contentType string) {
	_, binary := msg.Header[headerSpec]
	if values := msg.Header[headerContentType]; len(values) > 0 {
		contentType = values[0]
	} else if !binary {
		for key, values := range msg.Header { // names have no case in the binding, and have in NATS
			switch {
			case len(values) == 0:
			case strings.EqualFold(key, headerSpec):
				binary = true
			case strings.EqualFold(key, headerContentType):
				contentType = values[0]
			}
		}
	}
	media, _, _ := strings.Cut(contentType, ";")
	switch media = strings.ToLower(strings.TrimSpace(media)); {
	case media == envelope.ContentTypeProto:
		return formatProto, contentType
	case media == envelope.ContentTypeJSON, media == structuredType:
		return formatJSON, contentType
	case media == envelope.ContentTypeJSONBatch:
		return formatJSONBatch, contentType
	case media == envelope.ContentTypeProtoBatch:
		return formatProtoBatch, contentType
	case strings.HasPrefix(media, structuredType):
		return formatUnknown, contentType
	case binary:
		return formatBinary, contentType
	case contentType == "" && bytes.HasPrefix(bytes.TrimLeft(msg.Data, " \t\r\n"), []byte("{")) &&
		bytes.Contains(msg.Data, []byte(`"specversion"`)):
		return formatMaybeJSON, contentType
	default:
		return formatNone, contentType
	}
}

// decode reads what a stream delivered: binary mode, structured JSON or structured protobuf. The last result is false,
// with no error, for a message that is no CloudEvent at all; then only Data, ContentType and Topic are set. A batch is
// for [subscription.handleBatch].
func decode(msg *nats.Msg, topic string) (*postrider.Message, bool, error) {
	m := &postrider.Message{Topic: topic}
	f, contentType := formatOf(msg)
	isEvent, err := decodeAs(m, msg, f, contentType)
	return m, isEvent, err
}

// decodeAs is decode into a message whose fields are empty but for the topic, of a known format.
func decodeAs(m *postrider.Message, msg *nats.Msg, f format, contentType string) (isEvent bool, err error) {
	topic := m.Topic
	switch f {
	case formatBinary:
		err = decodeHeaders(msg, contentType, m)
	case formatJSON:
		err = envelope.ParseJSON(msg.Data, m)
	case formatProto:
		err = envelope.ParseProto(msg.Data, m)
	case formatMaybeJSON:
		if err = envelope.ParseJSON(msg.Data, m); err == nil {
			break
		}
		*m = postrider.Message{Topic: topic}
		fallthrough
	case formatNone:
		m.Data, m.ContentType = msg.Data, contentType
		return false, nil
	default:
		if _, err = splitBatch(msg, f); err == nil {
			err = fmt.Errorf("the content type is %q: want one event, in JSON or protobuf", contentType)
		}
	}
	if err == nil {
		err = checkRequired(m)
	}
	return true, err
}

// decodeHeaders reads binary mode.
func decodeHeaders(msg *nats.Msg, contentType string, m *postrider.Message) error {
	m.Data = msg.Data
	for key, values := range msg.Header {
		if len(key) <= len(headerPrefix) || len(values) == 0 || !strings.EqualFold(key[:len(headerPrefix)], headerPrefix) {
			continue
		}
		name := strings.ToLower(key[len(headerPrefix):])
		if err := envelope.SetHeader(m, name, envelope.Unescape(values[0])); err != nil {
			return fmt.Errorf("header %s: %w", key, err)
		}
	}
	if m.ContentType == "" {
		m.ContentType = contentType // as in HTTP
	}
	return nil
}

// checkRequired checks the attributes that every event has. Those of the message's own kind were checked as they were read.
func checkRequired(m *postrider.Message) error {
	for _, a := range [...]struct{ name, value string }{{"id", m.ID}, {"source", m.Source}, {"type", m.Type}} {
		if a.value == "" {
			return fmt.Errorf("attribute %s is required", a.name)
		}
		if !utf8.ValidString(a.value) {
			return fmt.Errorf("attribute %s is not valid UTF-8", a.name)
		}
	}
	return nil
}
