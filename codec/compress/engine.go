package compress

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// engine compresses in one algorithm. encode appends to dst. decode writes over dst, an empty slice, if it is large enough,
// and returns errTooLarge for data that would unpack to more than the limit.
type engine struct {
	encode func(dst, plain []byte) []byte
	decode func(dst, packed []byte) ([]byte, error)
}

// newEngines returns the engines that unpack up to limit bytes. What they need is made at the first use.
func newEngines(limit int) [Gzip + 1]engine {
	return [...]engine{Zstd: newZstd(limit), S2: newS2(limit), Gzip: newGzip(limit)}
}

func newZstd(limit int) engine {
	// Both take whole payloads from many goroutines, and run none of their own.
	encoder := sync.OnceValue(func() *zstd.Encoder {
		// A single segment has a window of the payload's own size, which a reader's limit allows.
		return must(zstd.NewWriter(nil, zstd.WithSingleSegment(true), zstd.WithLowerEncoderMem(true)))
	})
	decoder := sync.OnceValue(func() *zstd.Decoder {
		return must(zstd.NewReader(nil, zstd.WithDecoderMaxMemory(uint64(limit)), zstd.WithDecoderConcurrency(0)))
	})
	return engine{
		encode: func(dst, plain []byte) []byte { return encoder().EncodeAll(plain, dst) },
		decode: func(dst, packed []byte) ([]byte, error) {
			plain, err := decoder().DecodeAll(packed, dst)
			if errors.Is(err, zstd.ErrDecoderSizeExceeded) || errors.Is(err, zstd.ErrWindowSizeExceeded) {
				err = errTooLarge
			}
			return plain, err
		},
	}
}

func newS2(limit int) engine {
	return engine{
		encode: func(dst, plain []byte) []byte {
			dst = slices.Grow(dst, s2.MaxEncodedLen(len(plain)))
			return append(dst, s2.Encode(dst[len(dst):], plain)...) // it is there already
		},
		decode: func(dst, packed []byte) ([]byte, error) {
			if n, err := s2.DecodedLen(packed); err == nil && n > limit {
				return nil, errTooLarge
			}
			return s2.Decode(dst, packed)
		},
	}
}

func newGzip(limit int) engine {
	writers := sync.Pool{New: func() any { return gzip.NewWriter(nil) }}
	readers := sync.Pool{New: func() any { return new(gzip.Reader) }}
	return engine{
		encode: func(dst, plain []byte) []byte {
			w := writers.Get().(*gzip.Writer) //nolint:forcetypeassert // the pool holds nothing else
			defer writers.Put(w)
			out := bytes.NewBuffer(dst)
			w.Reset(out)
			_, err := w.Write(plain)
			if err = errors.Join(err, w.Close()); err != nil { // a buffer takes everything
				panic(err)
			}
			return out.Bytes()
		},
		decode: func(dst, packed []byte) ([]byte, error) {
			r := readers.Get().(*gzip.Reader) //nolint:forcetypeassert // the pool holds nothing else
			defer readers.Put(r)
			if err := r.Reset(bytes.NewReader(packed)); err != nil {
				return nil, err
			}
			out := bytes.NewBuffer(dst)
			n, err := out.ReadFrom(io.LimitReader(r, int64(limit)+1))
			if n > int64(limit) {
				err = errTooLarge
			}
			return out.Bytes(), err
		},
	}
}

// must is for options that are known to be good.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
