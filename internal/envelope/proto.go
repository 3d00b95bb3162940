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
	err := fields(b, func(num protowire.Number, v value) error {
		if v.kind != protowire.BytesType {
			return nil // not a field that we know
		}
		switch num {
		case fieldID:
			m.ID = string(v.bytes)
		case fieldSource:
			m.Source = string(v.bytes)
		case fieldSpecVersion:
			if string(v.bytes) != specVersion {
				return fmt.Errorf("specversion is %q, want %q", v.bytes, specVersion)
			}
		case fieldType:
			m.Type = string(v.bytes)
		case fieldAttributes:
			return parseAttribute(v.bytes, m)
		case fieldBinaryData, fieldTextData:
			m.Data = slices.Clip(v.bytes)
		case fieldProtoData:
			return errProtoData
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("cloudevents protobuf format: %w", err)
	}
	return nil
}

func parseAttribute(b []byte, m *postrider.Message) error {
	var name, text string
	var at time.Time
	err := fields(b, func(num protowire.Number, v value) error {
		if v.kind != protowire.BytesType {
			return nil
		}
		switch num {
		case 1:
			name = string(v.bytes)
		case 2:
			return fields(v.bytes, func(num protowire.Number, v value) (err error) {
				want := protowire.BytesType
				if num == valueBoolean || num == valueInteger {
					want = protowire.VarintType
				}
				if v.kind != want {
					return nil
				}
				switch num {
				case valueBoolean:
					text = strconv.FormatBool(v.varint != 0)
				case valueInteger:
					text = strconv.Itoa(int(int32(v.varint)))
				case valueString, valueURI, valueURIRef:
					text = string(v.bytes)
				case valueBytes:
					text = base64.StdEncoding.EncodeToString(v.bytes)
				case valueTimestamp:
					at, err = parseTime(v.bytes)
					text = formatTime(at)
				}
				return err
			})
		}
		return nil
	})
	if err != nil {
		return err
	}
	return setAttribute(m, name, text, at)
}

// setAttribute sets an optional attribute from its string form; at is its value if it came as a timestamp.
func setAttribute(m *postrider.Message, name, text string, at time.Time) (err error) {
	switch name {
	case "datacontenttype":
		m.ContentType = text
	case "dataschema":
		m.DataSchema = text
	case "subject":
		m.Subject = text
	case "time":
		if at.IsZero() && text != "" {
			at, err = time.Parse(time.RFC3339Nano, text)
		}
		m.Time = at
	default:
		err = m.SetExtension(name, text)
	}
	if err != nil {
		return fmt.Errorf("attribute %q: %w", name, err)
	}
	return nil
}

func parseTime(b []byte) (time.Time, error) {
	var sec, ns int64
	err := fields(b, func(num protowire.Number, v value) error {
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
	varint uint64
}

// fields calls fn for every field of a message.
func fields(b []byte, fn func(protowire.Number, value) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		v := value{kind: typ}
		switch typ {
		case protowire.BytesType:
			v.bytes, n = protowire.ConsumeBytes(b)
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
