package protocodec_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/codec"
	"github.com/postrider/postrider/codec/protocodec"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	in, err := structpb.NewStruct(map[string]any{"id": "o-1", "name": "Müller 😀", "lines": []any{1.5, nil, true}})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []codec.Codec{protocodec.Binary, protocodec.XBinary, protocodec.JSON} {
		b, err := c.Append([]byte("prefix"), in)
		if err != nil || !strings.HasPrefix(string(b), "prefix") {
			t.Errorf("%s: %q, %v", c.ContentType(), b, err)
			continue
		}
		var out structpb.Struct
		if err := c.Unmarshal(b[len("prefix"):], &out); err != nil || !proto.Equal(in, &out) {
			t.Errorf("%s: %v, %v", c.ContentType(), &out, err)
		}
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	type plain struct{ ID string }
	for _, c := range []codec.Codec{protocodec.Binary, protocodec.JSON} {
		if b, err := c.Append([]byte("kept"), &plain{}); string(b) != "kept" || err == nil || !strings.Contains(err.Error(), "no protobuf message") {
			t.Errorf("%s: Append(plain) is %q, %v", c.ContentType(), b, err)
		}
		if err := c.Unmarshal(nil, &plain{}); err == nil || !strings.Contains(err.Error(), "*protocodec_test.plain") {
			t.Errorf("%s: Unmarshal into plain: %v", c.ContentType(), err)
		}
		if err := c.Unmarshal([]byte("\xff{"), &structpb.Struct{}); err == nil {
			t.Errorf("%s: broken data is no error", c.ContentType())
		}
		// Invalid UTF-8 and, in JSON, a duration that is none cannot be encoded.
		if b, err := c.Append([]byte("kept"), structpb.NewStringValue("\xff")); string(b) != "kept" || err == nil {
			t.Errorf("%s: Append(broken UTF-8) is %q, %v", c.ContentType(), b, err)
		}
	}
}

func TestUnknownFieldsAreIgnored(t *testing.T) {
	t.Parallel()
	var d durationpb.Duration
	if err := protocodec.Binary.Unmarshal([]byte{0x08, 5, 0x78, 1}, &d); err != nil || d.GetSeconds() != 5 {
		t.Errorf("binary: %v, %v", &d, err)
	}
	var list structpb.ListValue
	if err := protocodec.JSON.Unmarshal([]byte(`[1]`), &list); err != nil || len(list.GetValues()) != 1 {
		t.Errorf("JSON: %v, %v", &list, err)
	}
}

func TestContract(t *testing.T) {
	t.Parallel()
	topic := postrider.NewTopic[durationpb.Duration]("timers.set.v1", postrider.Encoding(protocodec.Binary, protocodec.XBinary, protocodec.JSON))
	m, err := topic.Message(t.Context(), durationpb.New(5))
	if err != nil || m.ContentType != "application/protobuf" {
		t.Fatalf("%+v, %v", m, err)
	}
	for contentType, data := range map[string]string{
		"application/protobuf; proto=google.protobuf.Duration": string(m.Data),
		"application/x-protobuf":                               string(m.Data),
		"application/json":                                     `"0.000000005s"`,
	} {
		e, err := topic.Decode(&postrider.Message{ContentType: contentType, Data: []byte(data)})
		if err != nil || e.Value.AsDuration() != 5 {
			t.Errorf("%s: %v, %v", contentType, e.Value, err)
		}
	}
}

func FuzzUnmarshal(f *testing.F) {
	f.Add([]byte(`{"a":[1,null,"ü"]}`))
	f.Add([]byte{0x0a, 0x05, 0x0a, 0x01, 'a', 0x12, 0x00})
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, c := range []codec.Codec{protocodec.Binary, protocodec.JSON} {
			var v, again structpb.Struct
			if c.Unmarshal(data, &v) != nil {
				continue
			}
			b, err := c.Append(nil, &v)
			if err != nil {
				continue // a Value of no kind, which JSON cannot write
			}
			if err := c.Unmarshal(b, &again); err != nil || !proto.Equal(&v, &again) && !strings.Contains(v.String(), "nan") {
				t.Fatalf("%s %q: %v, and again %v, %v", c.ContentType(), data, &v, &again, err)
			}
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	v, buf := durationpb.New(1500), make([]byte, 0, 64)
	for _, c := range []codec.Codec{protocodec.Binary, protocodec.JSON} {
		b.Run(c.ContentType(), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Append(buf, v); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func Example() {
	// The type is the generated struct, here one of protobuf's own.
	timerSet := postrider.NewTopic[durationpb.Duration]("timers.set.v1", postrider.Encoding(protocodec.Binary, protocodec.JSON))

	m, err := timerSet.Message(context.Background(), durationpb.New(90e9))
	fmt.Printf("%s %x %v\n", m.ContentType, m.Data, err)

	e, err := timerSet.Decode(&postrider.Message{ContentType: "application/json", Data: []byte(`"90s"`)})
	fmt.Println(e.Value.AsDuration(), err)
	// Output:
	// application/protobuf 085a <nil>
	// 1m30s <nil>
}
