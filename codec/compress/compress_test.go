package compress_test

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/postrider/postrider/codec"
	"github.com/postrider/postrider/codec/compress"
	"github.com/postrider/postrider/postridertest"
)

func TestMain(m *testing.M) { os.Exit(postridertest.Main(m)) }

var algorithms = []compress.Algorithm{compress.Zstd, compress.S2, compress.Gzip}

// prose is n bytes that compress well.
func prose(n int) []byte {
	return bytes.Repeat([]byte("the quick brown fox jumps over the lazy dog. "), n/45+1)[:n]
}

// noise is n bytes that do not.
func noise(n int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func bytesCodec(cfg compress.Config) codec.Codec { return compress.New(cfg, codec.Bytes) }

// head is what a frame of bytes begins with.
func head(a compress.Algorithm) []byte {
	return append([]byte{byte(a), 24}, "application/octet-stream"...)
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	const limit = 300 << 10
	for _, write := range algorithms {
		for _, read := range algorithms { // the reader's own algorithm does not matter
			w, r := bytesCodec(compress.Config{Algorithm: write, MaxBytes: limit}), bytesCodec(compress.Config{Algorithm: read, MaxBytes: limit})
			for _, data := range [][]byte{{}, prose(1), prose(1023), prose(1024), prose(limit), noise(5000), noise(limit)} {
				packed, err := w.Append([]byte("kept"), data)
				if err != nil || !bytes.HasPrefix(packed, []byte("kept")) {
					t.Fatalf("%v: Append of %d bytes: %q, %v", write, len(data), packed[:min(10, len(packed))], err)
				}
				var out []byte
				if err := r.Unmarshal(packed[4:], &out); err != nil || !bytes.Equal(out, data) {
					t.Errorf("%v read by %v: %d of %d bytes, %v", write, read, len(out), len(data), err)
				}
			}
		}
	}
}

func TestOnlyWhatPaysIsCompressed(t *testing.T) {
	t.Parallel()
	const zstd, gzip, stored = compress.Zstd, compress.Gzip, compress.Algorithm(0)
	for _, tt := range []struct {
		cfg  compress.Config
		data []byte
		want compress.Algorithm
	}{
		{compress.Config{}, prose(1023), stored},
		{compress.Config{}, prose(1024), zstd},
		{compress.Config{}, noise(1024), stored}, // would be larger
		{compress.Config{Algorithm: gzip}, noise(4096), stored},
		{compress.Config{Algorithm: gzip, MinBytes: 500}, prose(500), gzip},
		{compress.Config{MinBytes: -1}, prose(300), zstd},
		{compress.Config{MinBytes: -1}, nil, stored},
	} {
		packed, err := bytesCodec(tt.cfg).Append(nil, tt.data)
		if err != nil || !bytes.HasPrefix(packed, head(tt.want)) {
			t.Errorf("%+v: %d bytes begin with %q, %v, want %v", tt.cfg, len(tt.data), packed[:min(30, len(packed))], err, tt.want)
		}
		if tt.want == stored && len(packed) != len(head(stored))+len(tt.data) {
			t.Errorf("%+v: %d bytes are stored in %d", tt.cfg, len(tt.data), len(packed))
		}
		if tt.want != stored && len(packed) > len(tt.data) {
			t.Errorf("%+v: %d bytes became %d", tt.cfg, len(tt.data), len(packed))
		}
	}
}

// The frame names the codec inside, so that a contract may change it.
func TestInnerCodecIsTheWriters(t *testing.T) {
	t.Parallel()
	old := compress.New(compress.Config{}, codec.Text)
	now := compress.New(compress.Config{}, codec.JSON, codec.Text)
	packed, err := old.Append(nil, "Grüße")
	if err != nil {
		t.Fatal(err)
	}
	var text string
	if err := now.Unmarshal(packed, &text); err != nil || text != "Grüße" {
		t.Errorf("%q, %v", text, err)
	}
	packed, err = now.Append(nil, "Grüße")
	if err != nil {
		t.Fatal(err)
	}
	if err := old.Unmarshal(packed, &text); err == nil || !strings.Contains(err.Error(), `no codec for content type "application/json"`) {
		t.Errorf("an inner codec that the reader does not have: %v", err)
	}
}

// bombs are small payloads that unpack to n zeros.
func bombs(t testing.TB, n int) map[compress.Algorithm][]byte {
	t.Helper()
	var gz, stream bytes.Buffer
	zw := gzip.NewWriter(&gz)
	enc, err := zstd.NewWriter(&stream, zstd.WithEncoderConcurrency(1)) // a stream does not tell its size
	if err != nil {
		t.Fatal(err)
	}
	zeros := io.LimitReader(zeroReader{}, int64(n))
	_, err = io.Copy(io.MultiWriter(zw, enc), zeros)
	if err = errors.Join(err, zw.Close(), enc.Close()); err != nil {
		t.Fatal(err)
	}
	block := binary.AppendUvarint(nil, uint64(n)) // S2: the size, one zero, and copies of what is before
	block = append(block, 0, 0)
	for left := n - 1; left > 0; left -= min(left, 64) {
		block = append(block, byte(min(left, 64)-1)<<2|2, 1, 0)
	}
	return map[compress.Algorithm][]byte{
		compress.Gzip: append(head(compress.Gzip), gz.Bytes()...),
		compress.Zstd: append(head(compress.Zstd), stream.Bytes()...),
		compress.S2:   append(head(compress.S2), block...),
	}
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestBombsAreRefused(t *testing.T) {
	t.Parallel()
	const limit = 64 << 10
	c := bytesCodec(compress.Config{MaxBytes: limit})
	for _, n := range []int{limit, limit + 1, 5 << 20} {
		for a, bomb := range bombs(t, n) {
			var out []byte
			err := c.Unmarshal(bomb, &out)
			if n <= limit && (err != nil || len(out) != n) {
				t.Errorf("%v: %d bytes within the limit: %d, %v", a, n, len(out), err)
			}
			if n > limit && (err == nil || len(out) != 0 || !strings.Contains(err.Error(), "more than Config.MaxBytes, 65536")) {
				t.Errorf("%v: %d bytes above the limit: %d bytes, %v", a, n, len(out), err)
			}
		}
	}
	if _, err := c.Append(nil, prose(limit+1)); err == nil || !strings.Contains(err.Error(), "65537 bytes, Config.MaxBytes is 65536") {
		t.Errorf("writing what no reader takes: %v", err)
	}
}

// Not parallel: it measures what the process allocates.
func TestBombsTakeNoMemory(t *testing.T) {
	const limit, size = 64 << 10, 20 << 20
	c := bytesCodec(compress.Config{MaxBytes: limit})
	for a, bomb := range bombs(t, size) {
		var before, after runtime.MemStats
		for range 2 { // the first time makes the engine
			runtime.ReadMemStats(&before)
			if err := c.Unmarshal(bomb, new([]byte)); err == nil {
				t.Fatalf("%v: 20 MiB above the limit", a)
			}
			runtime.ReadMemStats(&after)
		}
		// Far above the limit, since a garbage collection may have taken the engine in between, and far below the bomb.
		if got := after.TotalAlloc - before.TotalAlloc; got > size/4 {
			t.Errorf("%v: a bomb of 20 MiB takes %d bytes, the limit is %d", a, got, limit)
		}
	}
}

func TestBadFrames(t *testing.T) {
	t.Parallel()
	c := bytesCodec(compress.Config{})
	good := map[compress.Algorithm][]byte{}
	for _, a := range algorithms {
		packed, err := bytesCodec(compress.Config{Algorithm: a}).Append(nil, prose(5000))
		if err != nil {
			t.Fatal(err)
		}
		good[a] = packed
	}
	flipped := func(a compress.Algorithm) []byte { // in the middle of the data
		b := bytes.Clone(good[a])
		b[len(head(a))+(len(b)-len(head(a)))/2] ^= 0x40
		return b
	}
	for name, tt := range map[string]struct {
		data []byte
		want string
	}{
		"empty":           {nil, "the payload is empty"},
		"no type":         {[]byte{1}, "ends within its content type"},
		"short type":      {[]byte{1, 5, 'a'}, "ends within its content type"},
		"new algorithm":   {[]byte{9, 0}, "algorithm 9 is not known"},
		"unknown type":    {[]byte("\x00\x03a/b"), `no codec for content type "a/b"`},
		"plain JSON":      {[]byte(`{"id":1}`), "algorithm 123 is not known"},
		"cut zstd":        {good[compress.Zstd][:60], "unpack zstd: "},
		"cut s2":          {good[compress.S2][:60], "unpack s2: "},
		"cut gzip":        {good[compress.Gzip][:60], "unpack gzip: "},
		"no gzip at all":  {head(compress.Gzip), "unpack gzip: "},
		"corrupt zstd":    {flipped(compress.Zstd), "unpack zstd: "},
		"corrupt gzip":    {flipped(compress.Gzip), "unpack gzip: "},
		"zstd named gzip": {append(head(compress.Gzip), good[compress.Zstd][26:]...), "unpack gzip: "},
	} {
		var out []byte
		if err := c.Unmarshal(tt.data, &out); err == nil || !strings.Contains(err.Error(), tt.want) || out != nil {
			t.Errorf("%s: %d bytes, %v, want %q", name, len(out), err, tt.want)
		}
	}
	if b, err := c.Append([]byte("kept"), 7); err == nil || string(b) != "kept" {
		t.Errorf("a value that the inner codec refuses: %q, %v", b, err)
	}
}

func TestNewPanics(t *testing.T) {
	t.Parallel()
	for want, fn := range map[string]func(){
		"Config.Algorithm is 4":   func() { compress.New(compress.Config{Algorithm: 4}, codec.JSON) },
		"Config.MaxBytes is -1":   func() { compress.New(compress.Config{MaxBytes: -1}, codec.JSON) },
		"New needs at least one ": func() { compress.New(compress.Config{}) },
	} {
		func() {
			defer func() {
				if got := fmt.Sprint(recover()); !strings.Contains(got, "compress: "+want) {
					t.Errorf("panic %q, want %q", got, want)
				}
			}()
			fn()
		}()
	}
}

func TestConcurrentUse(t *testing.T) {
	t.Parallel()
	for _, a := range algorithms {
		c := bytesCodec(compress.Config{Algorithm: a})
		var wg sync.WaitGroup
		for g := range 8 {
			wg.Go(func() {
				for i := range 20 {
					data := prose(1000 + 100*g + i)
					packed, err := c.Append(nil, data)
					var out []byte
					if err = errors.Join(err, c.Unmarshal(packed, &out)); err != nil || !bytes.Equal(out, data) {
						t.Errorf("%v: %d of %d bytes, %v", a, len(out), len(data), err)
					}
				}
			})
		}
		wg.Wait()
	}
}

// Whatever arrives, reading neither panics nor gives more than the limit.
func FuzzUnmarshal(f *testing.F) {
	for _, bomb := range bombs(f, 5000) {
		f.Add(bomb)
	}
	for _, a := range algorithms {
		packed, err := bytesCodec(compress.Config{Algorithm: a}).Append(nil, prose(1500))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(packed)
	}
	f.Add([]byte("\x00\x18application/octet-streamas it is"))
	const limit = 4096
	c := bytesCodec(compress.Config{MaxBytes: limit, MinBytes: -1})
	f.Fuzz(func(t *testing.T, data []byte) {
		var out, again []byte
		if err := c.Unmarshal(data, &out); err != nil {
			return
		}
		if data[0] != 0 && len(out) > limit {
			t.Fatalf("unpacked to %d bytes", len(out))
		}
		if len(out) > limit {
			return // stored: as large as the message was
		}
		packed, err := c.Append(nil, out)
		if err = errors.Join(err, c.Unmarshal(packed, &again)); err != nil || !bytes.Equal(out, again) {
			t.Fatalf("%d bytes came back as %d, %v", len(out), len(again), err)
		}
	})
}

type report struct {
	ID    string   `json:"id"`
	Lines []string `json:"lines"`
}

func benchmarkReport() *report {
	r := &report{ID: "r-1"}
	words := rand.New(rand.NewPCG(3, 4))
	for i := range 200 {
		r.Lines = append(r.Lines, fmt.Sprintf("line %d: item %x, quantity %d, price %d.%02d", i, words.Uint32(), words.IntN(20), words.IntN(1000), words.IntN(100)))
	}
	return r
}

func BenchmarkAppend(b *testing.B) {
	v := benchmarkReport()
	plain, err := codec.JSON.Append(nil, v)
	if err != nil {
		b.Fatal(err)
	}
	for name, c := range benchmarked() {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(plain)))
			buf := make([]byte, 0, 2*len(plain))
			var out []byte
			for b.Loop() {
				if out, err = c.Append(buf, v); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(len(out))/float64(len(plain)), "ratio")
		})
	}
}

func BenchmarkUnmarshal(b *testing.B) {
	v := benchmarkReport()
	for name, c := range benchmarked() {
		data, err := c.Append(nil, v)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := c.Unmarshal(data, new(report)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func benchmarked() map[string]codec.Codec {
	m := map[string]codec.Codec{"plain": codec.JSON}
	for _, a := range algorithms {
		m[a.String()] = compress.New(compress.Config{Algorithm: a}, codec.JSON)
	}
	return m
}

func ExampleNew() {
	c := compress.New(compress.Config{Algorithm: compress.S2}, codec.Text)
	for _, text := range []string{"short", strings.Repeat("long ", 1000)} {
		data, err := c.Append(nil, text)
		if err != nil {
			fmt.Println(err)
			return
		}
		var back string
		err = c.Unmarshal(data, &back)
		fmt.Println(len(text), "bytes travel in fewer than", (len(data)/100+1)*100, back == text, err)
	}
	// Output:
	// 5 bytes travel in fewer than 100 true <nil>
	// 5000 bytes travel in fewer than 100 true <nil>
}
