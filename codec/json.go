package codec

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// JSON is application/json through encoding/json. Unknown fields are ignored, so that an old reader takes a new
// writer's message; anything after the value is an error. HTML characters are not escaped. Protobuf messages are
// refused in both directions with [ErrProtobuf].
const JSON = jsonCodec("application/json")

// ErrProtobuf is returned by [JSON] for a protobuf message: encoding/json neither writes nor reads the JSON form that
// protobuf defines. Use codec/protocodec, which has both that form and the binary one.
var ErrProtobuf = errors.New("a protobuf message needs a codec of codec/protocodec, not codec.JSON")

type jsonCodec string

func (c jsonCodec) ContentType() string { return string(c) }

func (c jsonCodec) Append(dst []byte, v any) ([]byte, error) {
	if isProtobuf(v) {
		return dst, fmt.Errorf("codec: encode %T: %w", v, ErrProtobuf)
	}
	buf := bytes.NewBuffer(dst)
	enc := json.NewEncoder(buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return dst, fmt.Errorf("codec: encode %T as JSON: %w", v, err)
	}
	out := buf.Bytes()
	return out[:len(out)-1], nil // Encode ends with a newline
}

func (c jsonCodec) Unmarshal(data []byte, v any) error {
	if isProtobuf(v) {
		return fmt.Errorf("codec: decode into %T: %w", v, ErrProtobuf)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("codec: decode JSON into %T: %w", v, err)
	}
	return nil
}

// isProtobuf tells a protobuf message by the marker method that generated and dynamic messages of every version have.
// Asking for it by name keeps google.golang.org/protobuf out of programs that do not use it.
func isProtobuf(v any) bool {
	_, ok := v.(interface{ ProtoMessage() })
	return ok
}
