package compress

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/postrider/postrider/codec"
	"github.com/postrider/postrider/internal/wrap"
)

// ContentType is the media type of a compressed payload: one byte for the algorithm, the content type of what is inside, and
// the compressed data. See docs/wire.md.
const ContentType = "application/vnd.postrider.compressed"

// Algorithm is how a payload is compressed.
type Algorithm byte

// Algorithms. The numbers stand in the frame.
const (
	stored Algorithm = iota // as it is: small, or no smaller when compressed

	// Zstd makes the smallest payloads, and has a checksum. RFC 8878.
	Zstd

	// S2 is the fastest, an extension of Snappy. It has no checksum.
	S2

	// Gzip is what every language reads without a library, and has a checksum. RFC 1952.
	Gzip
)

// String returns the name, "zstd".
func (a Algorithm) String() string {
	switch a {
	case stored:
		return "stored"
	case Zstd:
		return "zstd"
	case S2:
		return "s2"
	case Gzip:
		return "gzip"
	default:
		return fmt.Sprintf("algorithm %d", byte(a))
	}
}

// Config configures a codec. The zero value is ready to use.
type Config struct {
	// Algorithm compresses what is written; all of them are read. Default [Zstd].
	Algorithm Algorithm

	// MinBytes is the size from which a payload is compressed. Negative: every payload. Default 1 KiB.
	MinBytes int

	// MaxBytes is the largest payload before compression, for writing and for reading: what a hostile or broken message can
	// make a reader allocate. Default 16 MiB.
	MaxBytes int
}

func (c Config) withDefaults() Config {
	c.Algorithm = cmp.Or(c.Algorithm, Zstd)
	c.MinBytes = cmp.Or(c.MinBytes, 1<<10)
	c.MaxBytes = cmp.Or(c.MaxBytes, 16<<20)
	return c
}

func (c Config) validate() error {
	if c.Algorithm > Gzip {
		return fmt.Errorf("compress: Config.Algorithm is %d: want Zstd, S2 or Gzip", byte(c.Algorithm))
	}
	if c.MaxBytes < 0 || c.MaxBytes > 1<<30 {
		return fmt.Errorf("compress: Config.MaxBytes is %d: want 1 to 1 GiB", c.MaxBytes)
	}
	return nil
}

type compressed struct {
	cfg     Config
	inner   *wrap.Inner
	engines [Gzip + 1]engine
}

// New returns a codec that compresses what the first of the codecs writes and reads what any of them wrote. It panics on a
// field out of range and without codecs, since contracts are package variables.
func New(cfg Config, codecs ...codec.Codec) codec.Codec {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		panic(err.Error())
	}
	return &compressed{cfg: cfg, inner: wrap.New("compress", codecs), engines: newEngines(cfg.MaxBytes)}
}

func (c *compressed) ContentType() string { return ContentType }

func (c *compressed) Append(dst []byte, v any) ([]byte, error) {
	buf := c.inner.Borrow()
	defer c.inner.Return(buf)
	plain, err := c.inner.Append(*buf, v)
	if err != nil {
		return dst, err
	}
	*buf = plain
	if len(plain) > c.cfg.MaxBytes {
		return dst, fmt.Errorf("compress: the payload has %d bytes, Config.MaxBytes is %d: readers would refuse it", len(plain), c.cfg.MaxBytes)
	}
	start := len(dst)
	if len(plain) >= c.cfg.MinBytes {
		out := wrap.AppendString(append(dst, byte(c.cfg.Algorithm)), c.inner.ContentType())
		head := len(out)
		if out = c.engines[c.cfg.Algorithm].encode(out, plain); len(out)-head < len(plain) {
			return out, nil
		}
		dst = out[:start] // perhaps a larger array, with room now
	}
	dst = wrap.AppendString(append(dst, byte(stored)), c.inner.ContentType())
	return append(dst, plain...), nil
}

// errTooLarge is what engines say of data that would exceed MaxBytes.
var errTooLarge = errors.New("too large")

func (c *compressed) Unmarshal(data []byte, v any) error {
	if len(data) == 0 {
		return errors.New("compress: the payload is empty: want a frame")
	}
	algorithm := Algorithm(data[0])
	contentType, packed, ok := wrap.CutString(data[1:])
	switch {
	case algorithm > Gzip:
		return fmt.Errorf("compress: %v is not known: this is no compressed payload, or the sender is newer than this reader", algorithm)
	case !ok:
		return errors.New("compress: the frame ends within its content type")
	case algorithm == stored:
		return c.inner.Unmarshal(contentType, packed, v)
	}
	buf := c.inner.Borrow()
	defer c.inner.Return(buf)
	plain, err := c.engines[algorithm].decode(*buf, packed)
	if errors.Is(err, errTooLarge) {
		return fmt.Errorf("compress: %d bytes of %v would unpack to more than Config.MaxBytes, %d: refused", len(packed), algorithm, c.cfg.MaxBytes)
	} else if err != nil {
		return fmt.Errorf("compress: unpack %v: %w", algorithm, err)
	}
	*buf = plain
	return c.inner.Unmarshal(contentType, plain, v)
}
