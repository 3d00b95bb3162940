package codec

import "fmt"

// Bytes is application/octet-stream: the value is the payload. It takes a []byte, or a pointer to one. Decoding copies.
const Bytes = bytesCodec("application/octet-stream")

// Text is text/plain: the value is the payload in UTF-8. It takes a string, or a pointer to one.
const Text = textCodec("text/plain")

type bytesCodec string

func (c bytesCodec) ContentType() string { return string(c) }

func (c bytesCodec) Append(dst []byte, v any) ([]byte, error) {
	switch v := v.(type) {
	case []byte:
		return append(dst, v...), nil
	case *[]byte:
		return append(dst, *v...), nil
	}
	return dst, fmt.Errorf("codec: encode %T as bytes: only []byte and *[]byte are", v)
}

func (c bytesCodec) Unmarshal(data []byte, v any) error {
	p, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("codec: decode bytes into %T: only *[]byte takes them", v)
	}
	*p = append((*p)[:0:0], data...)
	return nil
}

type textCodec string

func (c textCodec) ContentType() string { return string(c) }

func (c textCodec) Append(dst []byte, v any) ([]byte, error) {
	switch v := v.(type) {
	case string:
		return append(dst, v...), nil
	case *string:
		return append(dst, *v...), nil
	}
	return dst, fmt.Errorf("codec: encode %T as text: only string and *string are", v)
}

func (c textCodec) Unmarshal(data []byte, v any) error {
	p, ok := v.(*string)
	if !ok {
		return fmt.Errorf("codec: decode text into %T: only *string takes it", v)
	}
	*p = string(data)
	return nil
}
