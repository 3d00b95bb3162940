// Package wrap holds what codecs that wrap other codecs have in common: the choice among the inner codecs, the strings in
// their frames, and buffers for what lies between the two encodings.
package wrap

import (
	"fmt"
	"sync"

	"github.com/postrider/postrider/codec"
)

// MaxString is the length of the longest string in a frame: one byte holds it.
const MaxString = 255

// maxKept bounds the buffers that are kept, so that one large payload does not occupy its memory for ever.
const maxKept = 1 << 20

// Inner is the codecs inside a wrapping codec: the first one writes, all of them read. It is safe for concurrent use.
type Inner struct {
	set     codec.Set
	buffers sync.Pool // *[]byte
}

// New panics when there is no codec or one with a content type that a frame cannot hold, since codecs belong to contracts,
// which are package variables. The name is that of the package, for its text.
func New(name string, codecs []codec.Codec) *Inner {
	if len(codecs) == 0 {
		panic(name + ": New needs at least one codec to wrap, for example codec.JSON")
	}
	for _, c := range codecs {
		if n := len(c.ContentType()); n == 0 || n > MaxString {
			panic(fmt.Sprintf("%s: content type %q: want 1 to %d bytes", name, c.ContentType(), MaxString))
		}
	}
	return &Inner{set: codecs, buffers: sync.Pool{New: func() any { return new([]byte) }}}
}

// Borrow returns an empty buffer, given back with [Inner.Return].
func (i *Inner) Borrow() *[]byte {
	b := i.buffers.Get().(*[]byte) //nolint:forcetypeassert // the pool holds nothing else
	*b = (*b)[:0]
	return b
}

// Return takes a buffer back. Nobody may hold a part of it any more.
func (i *Inner) Return(b *[]byte) {
	if cap(*b) <= maxKept {
		i.buffers.Put(b)
	}
}

// ContentType is what Append writes.
func (i *Inner) ContentType() string { return i.set[0].ContentType() }

// Append appends the encoding of v by the first codec.
func (i *Inner) Append(dst []byte, v any) ([]byte, error) { return i.set[0].Append(dst, v) }

// Unmarshal decodes data of a content type into v.
func (i *Inner) Unmarshal(contentType, data []byte, v any) error {
	c := i.set[0]
	if string(contentType) != c.ContentType() { // the comparison does not allocate
		var err error
		if c, err = i.set.For(string(contentType)); err != nil {
			return err
		}
	}
	return c.Unmarshal(data, v)
}

// AppendString appends the length of s in one byte, and s, which has at most [MaxString] bytes.
func AppendString(dst []byte, s string) []byte {
	return append(append(dst, byte(len(s))), s...)
}

// CutString cuts what [AppendString] wrote off the front of data.
func CutString(data []byte) (s, rest []byte, ok bool) {
	if len(data) == 0 || len(data) <= int(data[0]) {
		return nil, nil, false
	}
	n := 1 + int(data[0])
	return data[1:n], data[n:], true
}
