// Package protocodec holds the codecs for protobuf messages: their binary form and the JSON form that protobuf defines.
//
//	var OrderPlaced = postrider.NewTopic[orderpb.Order]("orders.placed.v1",
//		postrider.Encoding(protocodec.Binary, protocodec.JSON))
//
// writes the binary form and reads both. The type parameter is the generated struct; values travel as pointers, which are
// the messages. A value that is no protobuf message is an error.
//
// The codecs hold no state and are safe for concurrent use. This package is not for other values: [codec.JSON] writes
// those, and refuses protobuf messages in turn.
package protocodec

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/postrider/postrider/codec"
)

// Binary is application/protobuf, the wire format.
const Binary = binaryCodec("application/protobuf")

// XBinary is Binary under application/x-protobuf, the name that older senders use. A contract that lists it after Binary
// reads them.
const XBinary = binaryCodec("application/x-protobuf")

// JSON is application/json in the form that protobuf defines (ProtoJSON). Unknown fields are ignored, so that an old reader
// takes a new writer's message. The text of one message may differ between two builds of a program, in its white space.
const JSON = jsonCodec("application/json")

var _ = []codec.Codec{Binary, XBinary, JSON}

type binaryCodec string

func (c binaryCodec) ContentType() string { return string(c) }

func (c binaryCodec) Append(dst []byte, v any) ([]byte, error) {
	m, err := message(v)
	if err != nil {
		return dst, fmt.Errorf("protocodec: encode %T: %w", v, err)
	}
	out, err := proto.MarshalOptions{}.MarshalAppend(dst, m)
	if err != nil {
		return dst, fmt.Errorf("protocodec: encode %T: %w", v, err)
	}
	return out, nil
}

func (c binaryCodec) Unmarshal(data []byte, v any) error {
	m, err := message(v)
	if err == nil {
		err = proto.Unmarshal(data, m)
	}
	if err != nil {
		return fmt.Errorf("protocodec: decode into %T: %w", v, err)
	}
	return nil
}

type jsonCodec string

func (c jsonCodec) ContentType() string { return string(c) }

func (c jsonCodec) Append(dst []byte, v any) ([]byte, error) {
	m, err := message(v)
	if err != nil {
		return dst, fmt.Errorf("protocodec: encode %T as JSON: %w", v, err)
	}
	out, err := protojson.MarshalOptions{}.MarshalAppend(dst, m)
	if err != nil {
		return dst, fmt.Errorf("protocodec: encode %T as JSON: %w", v, err)
	}
	return out, nil
}

func (c jsonCodec) Unmarshal(data []byte, v any) error {
	m, err := message(v)
	if err == nil {
		err = protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(data, m)
	}
	if err != nil {
		return fmt.Errorf("protocodec: decode JSON into %T: %w", v, err)
	}
	return nil
}

func message(v any) (proto.Message, error) {
	m, ok := v.(proto.Message)
	if !ok {
		return nil, errors.New("it is no protobuf message: use codec.JSON")
	}
	return m, nil
}
