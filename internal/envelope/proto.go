// Package envelope writes and reads a [postrider.Message] in the formats that CloudEvents defines: the protobuf format
// (calls, compact events, outbox rows) and structured JSON. The protobuf format is encoded by hand, one pass and no
// reflection, because it is on the path of every call; the generated code of the specification is the oracle in tests.
package envelope

import (
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/postrider/postrider"
)

// ContentTypeProto and ContentTypeJSON are the media types of an event in structured mode.
const (
	ContentTypeProto = "application/cloudevents+protobuf"
	ContentTypeJSON  = "application/cloudevents+json"
)

// Field numbers of io.cloudevents.v1.CloudEvent (cloudevents/spec: cloudevents/formats/cloudevents.proto).
const (
	fieldID = iota + 1
	fieldSource
	fieldSpecVersion
	fieldType
	fieldAttributes
	fieldBinaryData
	fieldTextData
	fieldProtoData
)

// Field numbers of CloudEventAttributeValue.
const (
	valueBoolean = iota + 1
	valueInteger
	valueString
	valueBytes
	valueURI
	valueURIRef
	valueTimestamp
)

const specVersion = "1.0"

// AppendProto appends m in the protobuf format. Data goes out as binary_data, whatever its content type.
func AppendProto(dst []byte, m *postrider.Message) []byte {
	dst = slices.Grow(dst, maxProtoSize(m))
	dst = appendString(dst, fieldID, m.ID)
	dst = appendString(dst, fieldSource, m.Source)
	dst = appendString(dst, fieldSpecVersion, specVersion)
	dst = appendString(dst, fieldType, m.Type)
	if m.ContentType != "" {
		dst = appendAttribute(dst, "datacontenttype", valueString, m.ContentType)
	}
	if m.DataSchema != "" {
		dst = appendAttribute(dst, "dataschema", valueURI, m.DataSchema)
	}
	if m.Subject != "" {
		dst = appendAttribute(dst, "subject", valueString, m.Subject)
	}
	if !m.Time.IsZero() {
		dst = appendTime(dst, m.Time)
	}
	for _, x := range m.Extensions {
		dst = appendAttribute(dst, x.Name, valueString, x.Value)
	}
	if m.Data != nil {
		dst = protowire.AppendTag(dst, fieldBinaryData, protowire.BytesType)
		dst = protowire.AppendBytes(dst, m.Data)
	}
	return dst
}

// maxProtoSize returns a size that m does not exceed in the protobuf format: its texts, and what the tags, the lengths (up
// to 5 bytes each) and the names of all attributes and the time may take.
func maxProtoSize(m *postrider.Message) int {
	n := 168 + len(m.ID) + len(m.Source) + len(m.Type) + len(m.ContentType) + len(m.DataSchema) + len(m.Subject) + len(m.Data)
	for _, x := range m.Extensions {
		n += 24 + len(x.Name) + len(x.Value)
	}
	return n
}

func appendString(dst []byte, field protowire.Number, s string) []byte {
	dst = protowire.AppendTag(dst, field, protowire.BytesType)
	return protowire.AppendString(dst, s)
}

// sizeString is the size of a string field with a one-byte tag.
func sizeString(s string) int { return 1 + protowire.SizeBytes(len(s)) }

func appendAttribute(dst []byte, name string, kind protowire.Number, value string) []byte {
	inner := sizeString(value)
	dst = protowire.AppendTag(dst, fieldAttributes, protowire.BytesType)
	dst = protowire.AppendVarint(dst, uint64(sizeString(name)+1+protowire.SizeBytes(inner)))
	dst = appendString(dst, 1, name)
	dst = protowire.AppendTag(dst, 2, protowire.BytesType)
	dst = protowire.AppendVarint(dst, uint64(inner))
	return appendString(dst, kind, value)
}

func appendTime(dst []byte, t time.Time) []byte {
	var buf [32]byte
	stamp := buf[:0]
	stamp = protowire.AppendTag(stamp, 1, protowire.VarintType)
	stamp = protowire.AppendVarint(stamp, uint64(t.Unix()))
	if ns := t.Nanosecond(); ns != 0 {
		stamp = protowire.AppendTag(stamp, 2, protowire.VarintType)
		stamp = protowire.AppendVarint(stamp, uint64(ns))
	}
	inner := 1 + protowire.SizeBytes(len(stamp))
	dst = protowire.AppendTag(dst, fieldAttributes, protowire.BytesType)
	dst = protowire.AppendVarint(dst, uint64(sizeString("time")+1+protowire.SizeBytes(inner)))
	dst = appendString(dst, 1, "time")
	dst = protowire.AppendTag(dst, 2, protowire.BytesType)
	dst = protowire.AppendVarint(dst, uint64(inner))
	dst = protowire.AppendTag(dst, valueTimestamp, protowire.BytesType)
	return protowire.AppendBytes(dst, stamp)
}

var errProtoData = errors.New("proto_data holds a google.protobuf.Any, which Postrider does not unpack: send binary_data")

// ParseProto reads the protobuf format into m. Data aliases b: the caller hands b over. It checks the form only;
// [postrider.Message.Validate] checks the attributes.
func ParseProto(b []byte, m *postrider.Message) error {
	if err := parseProto(b, m); err != nil {
		return fmt.Errorf("cloudevents protobuf format: %w", err)
	}
	return nil
}

// protoReader reads one event. The texts of all attributes are parts of one string, which costs one allocation.
type protoReader struct {
	m    *postrider.Message
	text string // the event, without its data if that stands at the end as AppendProto writes it
	left int    // attributes that may still come, at most
}

func (r *protoReader) string(v value) string { return r.text[v.at : v.at+len(v.bytes)] }

func parseProto(b []byte, m *postrider.Message) error {
	r := protoReader{m: m}
	end := 0
	err := fields(b, 0, func(num protowire.Number, v value) error {
		end = len(b)
		switch {
		case v.kind != protowire.BytesType:
		case num == fieldAttributes:
			r.left++
		case num == fieldBinaryData || num == fieldTextData:
			end = v.at
		}
		return nil
	})
	if err != nil {
		return err
	}
	r.text = string(b[:end])
	return fields(b, 0, func(num protowire.Number, v value) error {
		if v.kind != protowire.BytesType {
			return nil // not a field that we know
		}
		switch num {
		case fieldID:
			m.ID = r.string(v)
		case fieldSource:
			m.Source = r.string(v)
		case fieldSpecVersion:
			if string(v.bytes) != specVersion {
				return fmt.Errorf("specversion is %q, want %q", v.bytes, specVersion)
			}
		case fieldType:
			m.Type = r.string(v)
		case fieldAttributes:
			return r.attribute(v)
		case fieldBinaryData, fieldTextData:
			m.Data = slices.Clip(v.bytes)
		case fieldProtoData:
			return errProtoData
		}
		return nil
	})
}

func (r *protoReader) attribute(entry value) error {
	var name, text string
	var at time.Time
	stamped := false
	err := fields(entry.bytes, entry.at, func(num protowire.Number, v value) error {
		if v.kind != protowire.BytesType {
			return nil
		}
		switch num {
		case 1:
			name = r.string(v)
		case 2:
			return fields(v.bytes, v.at, func(num protowire.Number, v value) (err error) {
				want := protowire.BytesType
				if num == valueBoolean || num == valueInteger {
					want = protowire.VarintType
				}
				if v.kind != want {
					return nil
				}
				switch num {
				case valueBoolean:
					text, stamped = strconv.FormatBool(v.varint != 0), false
				case valueInteger:
					text, stamped = strconv.Itoa(int(int32(v.varint))), false
				case valueString, valueURI, valueURIRef:
					text, stamped = r.string(v), false
				case valueBytes:
					text, stamped = base64.StdEncoding.EncodeToString(v.bytes), false
				case valueTimestamp:
					at, err = parseTime(v.bytes)
					stamped = true
				}
				return err
			})
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case stamped && name == "time": // nearly always: no text is needed
		r.m.Time = at
		return nil
	case stamped:
		text = formatTime(at)
	}
	err = setAttribute(r.m, name, text, r.left)
	r.left--
	return err
}

// setAttribute sets an optional attribute from its string form. Room is how many extensions may come, this one included.
func setAttribute(m *postrider.Message, name, text string, room int) (err error) {
	switch name {
	case "datacontenttype":
		m.ContentType = text
	case "dataschema":
		m.DataSchema = text
	case "subject":
		m.Subject = text
	case "time":
		m.Time = time.Time{}
		if text != "" {
			m.Time, err = time.Parse(time.RFC3339Nano, text)
		}
	default:
		err = setExtension(m, name, text, room)
	}
	if err != nil {
		return fmt.Errorf("attribute %q: %w", name, err)
	}
	return nil
}

// setExtension is [postrider.Message.SetExtension] for a string. An extension as they nearly always are is put in its
// place without being boxed and checked again.
func setExtension(m *postrider.Message, name, value string, room int) error {
	if value == "" || !isExtensionName(name) || !isPrintable(value) {
		return m.SetExtension(name, value)
	}
	if m.Extensions == nil {
		m.Extensions = make(postrider.Extensions, 0, max(room, 1))
	}
	i := len(m.Extensions)
	for i > 0 && m.Extensions[i-1].Name >= name {
		i--
	}
	if i < len(m.Extensions) && m.Extensions[i].Name == name {
		m.Extensions[i].Value = value
	} else {
		m.Extensions = slices.Insert(m.Extensions, i, postrider.Extension{Name: name, Value: value})
	}
	return nil
}

// isExtensionName says if a name is certainly good; SetExtension decides about the others.
func isExtensionName(name string) bool {
	for i := range len(name) {
		if c := name[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return false
		}
	}
	switch name {
	case "", "id", "source", "specversion", "type", "data":
		return false
	}
	return true
}

func isPrintable(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] >= 0x7f {
			return false
		}
	}
	return true
}

func parseTime(b []byte) (time.Time, error) {
	var sec, ns int64
	err := fields(b, 0, func(num protowire.Number, v value) error {
		switch {
		case v.kind != protowire.VarintType:
		case num == 1:
			sec = int64(v.varint)
		case num == 2:
			ns = int64(int32(v.varint))
		}
		return nil
	})
	// The limits of google.protobuf.Timestamp: the years 1 to 9999 of RFC 3339.
	if err == nil && (sec < -62135596800 || sec > 253402300799 || ns < 0 || ns > 999999999) {
		err = fmt.Errorf("timestamp of %d s and %d ns is out of range", sec, ns)
	}
	return time.Unix(sec, ns).UTC(), err
}

// value is the value of one field: bytes or varint, by its kind on the wire. A field whose kind is not the expected one is
// as good as unknown, in protobuf.
type value struct {
	kind   protowire.Type
	bytes  []byte
	at     int // where bytes begin in the event
	varint uint64
}

// fields calls fn for every field of a message that begins at a place of the event.
func fields(b []byte, at int, fn func(protowire.Number, value) error) error {
	for end := at + len(b); len(b) > 0; {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		v := value{kind: typ}
		switch typ {
		case protowire.BytesType:
			v.bytes, n = protowire.ConsumeBytes(b)
			v.at = end - len(b) + n - len(v.bytes)
		case protowire.VarintType:
			v.varint, n = protowire.ConsumeVarint(b)
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err := fn(num, v); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}
