package encrypt

import (
	"errors"
	"fmt"
	"slices"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/codec"
	"github.com/postrider/postrider/internal/wrap"
)

// ContentType is the media type of an encrypted payload; docs/wire.md describes its frame:
//
//	version | length, key id | length, content type of what is inside | nonce | ciphertext | tag
//	1 byte    1 byte           1 byte                                   12                  16
//
// Everything before the nonce is authenticated with the ciphertext.
const ContentType = "application/vnd.postrider.encrypted"

// version begins every frame.
const version = 1

// ErrForged is returned for a payload that the named key did not make: altered on its way, or made with another key of the
// same id.
var ErrForged = errors.New("the payload is not authentic: it was altered, or encrypted with another key of this id")

type encrypted struct {
	keys  KeyProvider
	inner *wrap.Inner
}

// New returns a codec that encrypts what the first of the codecs writes, with the provider's current key, and reads what any
// of them wrote, with the key that the payload names. It panics without keys or codecs, since contracts are package
// variables.
func New(keys KeyProvider, codecs ...codec.Codec) codec.Codec {
	if keys == nil {
		panic("encrypt: New needs a KeyProvider, for example a Ring")
	}
	return &encrypted{keys, wrap.New("encrypt", codecs)}
}

func (c *encrypted) ContentType() string { return ContentType }

func (c *encrypted) Append(dst []byte, v any) ([]byte, error) {
	key, err := c.keys.Current()
	if err != nil {
		return dst, keyError("the current key", err)
	}
	buf := c.inner.Borrow()
	defer c.inner.Return(buf)
	plain, err := c.inner.Append(*buf, v)
	if err != nil {
		return dst, err
	}
	*buf = plain
	start, contentType := len(dst), c.inner.ContentType()
	out := slices.Grow(dst, 3+len(key.id)+len(contentType)+len(plain)+key.aead.Overhead())
	out = wrap.AppendString(append(out, version), key.id)
	out = wrap.AppendString(out, contentType)
	return key.aead.Seal(out, nil, plain, out[start:]), nil //nolint:gosec // this AEAD makes its random nonce itself
}

func (c *encrypted) Unmarshal(data []byte, v any) error {
	f, err := parse(data)
	if err != nil {
		return err
	}
	id := string(f.keyID)
	key, err := c.keys.Key(id)
	if err != nil {
		return keyError(fmt.Sprintf("key %q", id), err)
	}
	buf := c.inner.Borrow()
	defer c.inner.Return(buf)
	plain, err := key.aead.Open(*buf, nil, f.sealed, f.head)
	if err != nil { // it says no more than that
		return fmt.Errorf("encrypt: key %q: %w", id, ErrForged)
	}
	*buf = plain
	return c.inner.Unmarshal(f.contentType, plain, v)
}

// frame is the parts of a payload.
type frame struct {
	keyID, contentType []byte
	sealed             []byte // nonce, ciphertext, tag
	head               []byte // what comes before it
}

func parse(data []byte) (f frame, err error) {
	if len(data) == 0 || data[0] != version {
		return f, errors.New("encrypt: the payload is no frame of version 1: it is not encrypted, or the sender is newer than this reader")
	}
	var ok bool
	rest := data[1:]
	if f.keyID, rest, ok = wrap.CutString(rest); ok {
		f.contentType, f.sealed, ok = wrap.CutString(rest)
	}
	if !ok {
		return f, errors.New("encrypt: the frame ends within its head")
	}
	f.head = data[:len(data)-len(f.sealed)]
	return f, nil
}

// keyError makes of a provider's error one that is final, or Unavailable, which decoding passes on to be tried again.
func keyError(what string, err error) error {
	if errors.Is(err, ErrUnknownKey) || !postrider.Retryable(err) {
		return fmt.Errorf("encrypt: %s: %w", what, err)
	}
	return &postrider.Error{Code: postrider.Unavailable, Op: "encrypt: " + what, Err: err}
}
