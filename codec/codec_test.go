package codec_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postrider/postrider/codec"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type order struct {
	ID    string `json:"id"`
	Note  string `json:"note,omitempty"`
	Cents int64  `json:"cents,omitempty"`
}

func TestJSON(t *testing.T) {
	t.Parallel()
	in := order{ID: "o-1", Note: "<b>Größe & Ähnliches</b> 😀", Cents: math.MaxInt64}
	b, err := codec.JSON.Append([]byte("prefix "), &in)
	want := `prefix {"id":"o-1","note":"<b>Größe & Ähnliches</b> 😀","cents":9223372036854775807}`
	if err != nil || string(b) != want {
		t.Fatalf("Append: %s, %v, want %s", b, err, want)
	}
	var out order
	if err := codec.JSON.Unmarshal(b[len("prefix "):], &out); err != nil || out != in {
		t.Errorf("Unmarshal: %+v, %v", out, err)
	}
	if err := codec.JSON.Unmarshal([]byte(`{"id":"o-2","new":{"field":1}}`), &out); err != nil || out.ID != "o-2" {
		t.Errorf("an unknown field must be ignored: %+v, %v", out, err)
	}
	for _, data := range []string{"", "{", `{"id":1}`, `{"id":"a"} {}`, `{"id":"a"}x`} {
		if err := codec.JSON.Unmarshal([]byte(data), &out); err == nil || !strings.Contains(err.Error(), "codec: decode JSON into *codec_test.order") {
			t.Errorf("Unmarshal(%q): %v", data, err)
		}
	}
	if b, err := codec.JSON.Append([]byte("kept"), math.NaN()); err == nil || string(b) != "kept" {
		t.Errorf("Append of NaN: %q, %v, want dst as it was and an error", b, err)
	}
}

func TestJSONRefusesProtobuf(t *testing.T) {
	t.Parallel()
	d := durationpb.New(1)
	for _, m := range []any{d, dynamicpb.NewMessage(d.ProtoReflect().Descriptor())} {
		if b, err := codec.JSON.Append([]byte("kept"), m); !errors.Is(err, codec.ErrProtobuf) || string(b) != "kept" {
			t.Errorf("Append(%T): %q, %v", m, b, err)
		}
		if err := codec.JSON.Unmarshal([]byte("{}"), m); !errors.Is(err, codec.ErrProtobuf) {
			t.Errorf("Unmarshal(%T): %v", m, err)
		}
	}
}

func TestBytesAndText(t *testing.T) {
	t.Parallel()
	raw, text := []byte{0, 255}, "Grüße"
	for _, tt := range []struct {
		codec codec.Codec
		value any
		into  any
		want  string
	}{
		{codec.Bytes, raw, new([]byte), "\x00\xff"},
		{codec.Bytes, &raw, new([]byte), "\x00\xff"},
		{codec.Bytes, []byte{}, new([]byte), ""},
		{codec.Text, text, new(string), text},
		{codec.Text, &text, new(string), text},
		{codec.Text, "", new(string), ""},
	} {
		b, err := tt.codec.Append([]byte("p"), tt.value)
		if err != nil || string(b) != "p"+tt.want {
			t.Errorf("%s: Append(%T) is %q, %v", tt.codec.ContentType(), tt.value, b, err)
		}
		if err := tt.codec.Unmarshal(b[1:], tt.into); err != nil || fmt.Sprintf("%s", reflect.ValueOf(tt.into).Elem()) != tt.want {
			t.Errorf("%s: Unmarshal gives %v, %v", tt.codec.ContentType(), tt.into, err)
		}
	}
	for _, c := range []codec.Codec{codec.Bytes, codec.Text} {
		if b, err := c.Append([]byte("kept"), 7); err == nil || string(b) != "kept" || !strings.Contains(err.Error(), "int") {
			t.Errorf("%s: Append(7) is %q, %v", c.ContentType(), b, err)
		}
		if err := c.Unmarshal(nil, new(int)); err == nil || !strings.Contains(err.Error(), "*int") {
			t.Errorf("%s: Unmarshal into *int: %v", c.ContentType(), err)
		}
	}
}

func TestDecodingCopies(t *testing.T) {
	t.Parallel()
	data := []byte("abc")
	var out []byte
	if err := codec.Bytes.Unmarshal(data, &out); err != nil {
		t.Fatal(err)
	}
	if data[0] = 'X'; string(out) != "abc" {
		t.Errorf("the decoded value shares memory with the message: %s", out)
	}
	old := []byte("old")
	out = old
	if err := codec.Bytes.Unmarshal(data, &out); err != nil || string(old) != "old" {
		t.Errorf("decoding wrote over the slice that was there: %s, %v", old, err)
	}
}

func TestSetFor(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		contentType string
		want        codec.Codec // nil: an error
	}{
		{"", codec.JSON},
		{"application/json", codec.JSON},
		{"Application/JSON; charset=utf-8", codec.JSON},
		{"application/vnd.order.v2+json", codec.JSON},
		{"application/problem+v2+json", codec.JSON},
		{"text/plain;charset=utf-8", codec.Text},
		{"application/octet-stream", codec.Bytes},
		{"application/xml", nil},
		{"application/vnd.order+xml", nil},
		{"text/plain2", nil},
		{"a/b/c", nil},
		{";", nil},
	} {
		got, err := codec.Standard().For(tt.contentType)
		if got != tt.want || (err == nil) != (tt.want != nil) {
			t.Errorf("For(%q) is %v, %v, want %v", tt.contentType, got, err, tt.want)
		}
		if err != nil && !strings.Contains(err.Error(), fmt.Sprintf("%q", tt.contentType)) {
			t.Errorf("the error does not name what was offered: %v", err)
		}
	}
	_, err := codec.Standard().For("application/xml")
	if err == nil || !strings.Contains(err.Error(), "known are application/json, application/octet-stream, text/plain") {
		t.Errorf("the error does not name what is known: %v", err)
	}
	if _, err := (codec.Set{}).For(""); err == nil {
		t.Error("an empty set has a codec")
	}
}

// Whatever a codec decodes it encodes again to something that decodes to the same.
func FuzzCodecs(f *testing.F) {
	f.Add([]byte(`{"id":"o-1","cents":5,"list":[1,null,"ü"]}`))
	f.Add([]byte("\x00\xff text"))
	f.Add([]byte("1E1000")) // valid, but no float64
	f.Fuzz(func(t *testing.T, data []byte) {
		var v any
		err := codec.JSON.Unmarshal(data, &v)
		if err == nil && !json.Valid(data) {
			t.Fatalf("%q is no JSON and was decoded", data)
		}
		if err == nil {
			b, err := codec.JSON.Append(nil, v)
			var again any
			if err != nil || codec.JSON.Unmarshal(b, &again) != nil || !reflect.DeepEqual(v, again) {
				t.Fatalf("%q: encoded %q, %v, decoded %v", data, b, err, again)
			}
		}
		var raw []byte
		if err := codec.Bytes.Unmarshal(data, &raw); err != nil || !bytes.Equal(raw, data) {
			t.Fatalf("bytes %q, %v", raw, err)
		}
		var text string
		if err := codec.Text.Unmarshal(data, &text); err != nil || text != string(data) {
			t.Fatalf("text %q, %v", text, err)
		}
	})
}

func FuzzSetFor(f *testing.F) {
	f.Add("application/json; charset=utf-8")
	f.Add("a/b+")
	f.Fuzz(func(t *testing.T, contentType string) {
		c, err := codec.Standard().For(contentType)
		if (c == nil) != (err != nil) {
			t.Fatalf("For(%q) is %v, %v", contentType, c, err)
		}
	})
}

func BenchmarkJSONAppend(b *testing.B) {
	b.ReportAllocs()
	v, buf := &order{ID: "o-1", Cents: 5}, make([]byte, 0, 256)
	for b.Loop() {
		if _, err := codec.JSON.Append(buf, v); err != nil {
			b.Fatal(err)
		}
	}
}

func ExampleSet_For() {
	set := codec.Standard()
	for _, contentType := range []string{"application/vnd.order+json; charset=utf-8", "application/xml"} {
		c, err := set.For(contentType)
		if err != nil {
			fmt.Println(err)
			continue
		}
		var v map[string]int
		fmt.Println(c.ContentType(), c.Unmarshal([]byte(`{"n":1}`), &v), v)
	}
	// Output:
	// application/json <nil> map[n:1]
	// codec: no codec for content type "application/xml": known are application/json, application/octet-stream, text/plain
}
