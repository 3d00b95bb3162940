package encrypt_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/codec"
	"github.com/postrider/postrider/codec/encrypt"
	"github.com/postrider/postrider/postridertest"
)

func TestMain(m *testing.M) { os.Exit(postridertest.Main(m)) }

// newKey makes a key whose secret follows from seed.
func newKey(t testing.TB, id, seed string) *encrypt.Key {
	t.Helper()
	k, err := encrypt.NewKey(id, bytes.Repeat([]byte(seed), encrypt.KeySize)[:encrypt.KeySize])
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newRing(t testing.TB, keys ...*encrypt.Key) *encrypt.Ring {
	t.Helper()
	r, err := encrypt.NewRing(keys[0], keys[1:]...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	c := encrypt.New(newRing(t, newKey(t, "2026-01", "a")), codec.Text, codec.JSON)
	for _, text := range []string{"", "card 4111 1111", strings.Repeat("größer ", 10_000)} {
		first, err := c.Append([]byte("kept"), text)
		if err != nil {
			t.Fatal(err)
		}
		second, err := c.Append(nil, text)
		if err != nil {
			t.Fatal(err)
		}
		if text != "" && bytes.Contains(first, []byte(text)) {
			t.Error("the text is readable")
		}
		if bytes.Equal(first[4:], second) {
			t.Error("two encryptions are the same: the nonce is not random")
		}
		if want := 4 + 1 + 8 + 11 + 12 + len(text) + 16; len(first) != want || !bytes.HasPrefix(first, []byte("kept\x01\x072026-01\x0atext/plain")) {
			t.Errorf("%d bytes, want %d; they begin with %q", len(first), want, first[:24])
		}
		for _, data := range [][]byte{first[4:], second} {
			var out string
			if err := c.Unmarshal(data, &out); err != nil || out != text {
				t.Errorf("%d of %d bytes, %v", len(out), len(text), err)
			}
		}
	}
	if b, err := c.Append([]byte("kept"), 7); err == nil || string(b) != "kept" {
		t.Errorf("a value that the inner codec refuses: %q, %v", b, err)
	}
}

func TestRotation(t *testing.T) {
	t.Parallel()
	ring := newRing(t, newKey(t, "k1", "a"))
	c := encrypt.New(ring, codec.Text)
	write := func() []byte {
		t.Helper()
		data, err := c.Append(nil, "secret")
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	read := func(data []byte) error {
		var out string
		return c.Unmarshal(data, &out)
	}
	old := write()
	if err := errors.Join(ring.Add(newKey(t, "k2", "b")), read(old)); err != nil {
		t.Fatal(err)
	}
	if data := write(); data[3] != '1' {
		t.Error("an added key is used before Use")
	}
	if err := ring.Use("k2"); err != nil {
		t.Fatal(err)
	}
	now := write()
	if now[3] != '2' {
		t.Errorf("the new message begins with %q, want key k2", now[:4])
	}
	if err := errors.Join(read(old), read(now)); err != nil {
		t.Errorf("after the rotation: %v", err)
	}
	if err := ring.Remove("k1"); err != nil {
		t.Fatal(err)
	}
	if err := read(old); !errors.Is(err, encrypt.ErrUnknownKey) || !strings.Contains(err.Error(), `key "k1": unknown key: the ring has ["k2"]`) {
		t.Errorf("a message of a removed key: %v", err)
	}
	if err := read(now); err != nil {
		t.Error(err)
	}
}

func TestRingRefuses(t *testing.T) {
	t.Parallel()
	ring := newRing(t, newKey(t, "k1", "a"))
	_, twice := encrypt.NewRing(newKey(t, "k1", "a"), newKey(t, "k1", "b"))
	_, empty := encrypt.NewKey("", make([]byte, 32))
	_, long := encrypt.NewKey(strings.Repeat("k", 256), make([]byte, 32))
	_, short := encrypt.NewKey("k", make([]byte, 16))
	for _, tt := range []struct {
		err  error
		code postrider.Code
		want string
	}{
		{twice, postrider.AlreadyExists, `add key "k1"`},
		{ring.Add(newKey(t, "k1", "b")), postrider.AlreadyExists, `add key "k1"`},
		{ring.Use("k2"), postrider.NotFound, `use key "k2"`},
		{ring.Remove("k1"), postrider.FailedPrecondition, `remove key "k1"`},
		{ring.Remove("k2"), postrider.OK, ""},
		{empty, postrider.InvalidArgument, "1 to 255 bytes"},
		{long, postrider.InvalidArgument, "1 to 255 bytes"},
		{short, postrider.InvalidArgument, `key "k" has 16 bytes: AES-256 wants 32`},
	} {
		if postrider.CodeOf(tt.err) != tt.code || tt.err != nil && !strings.Contains(tt.err.Error(), tt.want) {
			t.Errorf("%v, want %v with %q", tt.err, tt.code, tt.want)
		}
	}
	for want, fn := range map[string]func(){
		"encrypt: New needs a KeyProvider":      func() { encrypt.New(nil, codec.JSON) },
		"encrypt: New needs at least one codec": func() { encrypt.New(ring) },
	} {
		func() {
			defer func() {
				if got := fmt.Sprint(recover()); !strings.Contains(got, want) {
					t.Errorf("panic %q, want %q", got, want)
				}
			}()
			fn()
		}()
	}
}

func TestKeysDoNotPrintSecrets(t *testing.T) {
	t.Parallel()
	k := newKey(t, "k1", "a")
	for _, format := range []string{"%v", "%+v", "%#v", "%s"} {
		if got := fmt.Sprintf(format, k); got != "key k1" {
			t.Errorf("%s prints %s", format, got)
		}
	}
}

// Every byte of a payload is authenticated.
func TestTampering(t *testing.T) {
	t.Parallel()
	c := encrypt.New(newRing(t, newKey(t, "k1", "a"), newKey(t, "k2", "a")), codec.Text, codec.JSON) // k2 is the same secret
	data, err := c.Append(nil, `"secret"`)
	if err != nil {
		t.Fatal(err)
	}
	for i := range data {
		forged := bytes.Clone(data)
		forged[i] ^= 3 // k1 becomes k2
		var out string
		if err := c.Unmarshal(forged, &out); err == nil || out != "" {
			t.Errorf("byte %d of %d was altered and %q was read", i, len(data), out)
		} else if i > 15 && !errors.Is(err, encrypt.ErrForged) {
			t.Errorf("byte %d: %v", i, err)
		}
	}
	swapped := append([]byte("\x01\x02k2"), data[4:]...) // another key id
	retyped := append([]byte("\x01\x02k1\x10application/json"), data[15:]...)
	other := encrypt.New(newRing(t, newKey(t, "k1", "b")), codec.Text) // another secret under the same id
	for name, err := range map[string]error{
		"key id swapped":         c.Unmarshal(swapped, new(string)),
		"inner type swapped":     c.Unmarshal(retyped, new(string)),
		"another secret":         other.Unmarshal(data, new(string)),
		"something at the end":   c.Unmarshal(append(bytes.Clone(data), 0), new(string)),
		"cut within the tag":     c.Unmarshal(data[:len(data)-1], new(string)),
		"cut within the nonce":   c.Unmarshal(data[:20], new(string)),
		"head without the rest":  c.Unmarshal(data[:15], new(string)),
		"sealed for another set": encrypt.New(newRing(t, newKey(t, "k3", "a")), codec.Text).Unmarshal(data, new(string)),
	} {
		if !errors.Is(err, encrypt.ErrForged) && !errors.Is(err, encrypt.ErrUnknownKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, data := range map[string][]byte{"empty": nil, "plain": []byte(`{"id":1}`), "newer": {2, 0}, "no key": {1}, "no type": {1, 0}} {
		if err := c.Unmarshal(data, new(string)); err == nil || !strings.HasPrefix(err.Error(), "encrypt: the ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// away is a KeyProvider whose service fails.
type away struct{ err error }

func (a away) Current() (*encrypt.Key, error)   { return nil, a.err }
func (a away) Key(string) (*encrypt.Key, error) { return nil, a.err }

func TestProviderErrors(t *testing.T) {
	t.Parallel()
	data, err := encrypt.New(newRing(t, newKey(t, "k1", "a")), codec.Text).Append(nil, "secret")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		err   error
		again bool
		after time.Duration
	}{
		{errors.New("dial tcp: connection refused"), true, 0},
		{postrider.RetryAfter(time.Minute, errors.New("throttled")), true, time.Minute},
		{fmt.Errorf("vault: %w", encrypt.ErrUnknownKey), false, 0},
		{postrider.Errorf(postrider.PermissionDenied, "vault: no"), false, 0},
		{postrider.Permanent(errors.New("vault: key destroyed")), false, 0},
	} {
		topic := postrider.NewTopic[string]("secrets.v1", postrider.Encoding(encrypt.New(away{tt.err}, codec.Text)))
		_, decodeErr := topic.Decode(&postrider.Message{ID: "m-1", ContentType: encrypt.ContentType, Data: data})
		text := "secret"
		_, encodeErr := topic.Message(t.Context(), &text)
		for what, err := range map[string]error{"decode": decodeErr, "encode": encodeErr} {
			want := postrider.InvalidArgument
			if tt.again {
				want = postrider.Unavailable
			}
			if postrider.Retryable(err) != tt.again || postrider.CodeOf(err) != want || !errors.Is(err, tt.err) {
				t.Errorf("%s with %v: %v, retryable %t", what, tt.err, err, postrider.Retryable(err))
			}
			if after, _ := postrider.RetryDelay(err); after != tt.after {
				t.Errorf("%s with %v: waits %v, want %v", what, tt.err, after, tt.after)
			}
		}
	}
}

// Nothing but what was sealed is ever opened.
func FuzzUnmarshal(f *testing.F) {
	c := encrypt.New(newRing(f, newKey(f, "k1", "a")), codec.Bytes)
	good, err := c.Append(nil, []byte("secret"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{})
	f.Add([]byte("\x01\x02k1\x18application/octet-stream"))
	f.Add(good[:len(good)-1])
	f.Fuzz(func(t *testing.T, data []byte) {
		var out []byte
		if err := c.Unmarshal(data, &out); err == nil && string(out) != "secret" { // every fuzzing process has a good of its own
			t.Fatalf("%q was read as %q", data, out)
		}
	})
}

func FuzzRoundTrip(f *testing.F) {
	f.Add("k1", []byte("secret"))
	f.Fuzz(func(t *testing.T, id string, data []byte) {
		key, err := encrypt.NewKey(id, bytes.Repeat([]byte{7}, encrypt.KeySize))
		if err != nil {
			return
		}
		c := encrypt.New(newRing(t, key), codec.Bytes)
		sealed, err := c.Append(nil, data)
		var out []byte
		if err = errors.Join(err, c.Unmarshal(sealed, &out)); err != nil || !bytes.Equal(out, data) {
			t.Fatalf("%q came back as %q, %v", data, out, err)
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	for _, size := range []int{128, 1 << 10, 16 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			c := encrypt.New(newRing(b, newKey(b, "2026-01", "a")), codec.Bytes)
			data, buf := make([]byte, size), make([]byte, 0, size+256)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Append(buf, &data); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkUnmarshal(b *testing.B) {
	for _, size := range []int{128, 1 << 10, 16 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			c := encrypt.New(newRing(b, newKey(b, "2026-01", "a")), codec.Bytes)
			sealed, err := c.Append(nil, make([]byte, size))
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(int64(size))
			b.ReportAllocs()
			var out []byte
			for b.Loop() {
				if err := c.Unmarshal(sealed, &out); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func ExampleNew() {
	key, err := encrypt.NewKey("2026-01", []byte("an example of 32 secret bytes...")) // from a secret store
	if err != nil {
		fmt.Println(err)
		return
	}
	keys, err := encrypt.NewRing(key)
	if err != nil {
		fmt.Println(err)
		return
	}
	c := encrypt.New(keys, codec.Text)
	data, err := c.Append(nil, "card 4111 1111")
	fmt.Println(bytes.Contains(data, []byte("4111")), err)

	var text string
	err = c.Unmarshal(data, &text)
	fmt.Println(text, err)

	data[len(data)-1]++
	fmt.Println(c.Unmarshal(data, &text))
	// Output:
	// false <nil>
	// card 4111 1111 <nil>
	// encrypt: key "2026-01": the payload is not authentic: it was altered, or encrypted with another key of this id
}
