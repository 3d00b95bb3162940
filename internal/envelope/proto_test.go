package envelope_test

import (
	"bytes"
	"math"
	"testing"
	"time"

	format "github.com/cloudevents/sdk-go/binding/format/protobuf/v2"
	"github.com/cloudevents/sdk-go/binding/format/protobuf/v2/pb"
	"github.com/cloudevents/sdk-go/v2/event"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/envelope"
)

func TestProtoRoundTripAndSDK(t *testing.T) {
	t.Parallel()
	msgs := []*postrider.Message{whole(), minimal()}
	for range 2000 {
		msgs = append(msgs, random())
	}
	for _, m := range msgs {
		if err := m.Validate(); err != nil {
			t.Fatal(err)
		}
		b := envelope.AppendProto([]byte("prefix"), m)[len("prefix"):]

		var back postrider.Message
		if err := envelope.ParseProto(b, &back); err != nil {
			t.Fatal(err)
		}
		checkEqual(t, &back, m)

		// The generated code of the specification reads it, field by field.
		var generated pb.CloudEvent
		if err := proto.Unmarshal(b, &generated); err != nil {
			t.Fatal(err)
		}
		if len(generated.ProtoReflect().GetUnknown()) > 0 || generated.GetSpecVersion() != "1.0" {
			t.Errorf("unknown fields %x, specversion %q", generated.ProtoReflect().GetUnknown(), generated.GetSpecVersion())
		}
		e, err := format.FromProto(&generated)
		if err != nil {
			t.Fatal(err)
		}
		checkSDK(t, *e, m)

		// And we read what the SDK writes.
		theirs := toSDK(t, m)
		b, err = format.Protobuf.Marshal(&theirs)
		if err != nil {
			t.Fatal(err)
		}
		var read postrider.Message
		if err := envelope.ParseProto(b, &read); err != nil {
			t.Fatal(err)
		}
		checkSDK(t, toSDK(t, &read), m)
	}
}

// Every type of attribute becomes its canonical string.
func TestParseProtoAttributeTypes(t *testing.T) {
	t.Parallel()
	at := time.Date(2018, 4, 5, 17, 31, 0, 5, time.UTC)
	b, err := proto.Marshal(&pb.CloudEvent{
		Id: "1", Source: "//s", SpecVersion: "1.0", Type: "t",
		Attributes: map[string]*pb.CloudEventAttributeValue{
			"a": {Attr: &pb.CloudEventAttributeValue_CeBoolean{CeBoolean: true}},
			"b": {Attr: &pb.CloudEventAttributeValue_CeInteger{CeInteger: math.MinInt32}},
			"c": {Attr: &pb.CloudEventAttributeValue_CeBytes{CeBytes: []byte{0, 255}}},
			"d": {Attr: &pb.CloudEventAttributeValue_CeUri{CeUri: "urn:x"}},
			"e": {Attr: &pb.CloudEventAttributeValue_CeUriRef{CeUriRef: "/x"}},
			"f": {Attr: &pb.CloudEventAttributeValue_CeTimestamp{CeTimestamp: timestamppb.New(at)}},
			"g": {Attr: &pb.CloudEventAttributeValue_CeBoolean{}},
			// A time may come as text, too.
			"time": {Attr: &pb.CloudEventAttributeValue_CeString{CeString: "2018-04-05T19:31:00.000000005+02:00"}},
		},
		Data: &pb.CloudEvent_TextData{TextData: "Grüße"},
	})
	if err != nil {
		t.Fatal(err)
	}
	var m postrider.Message
	if err := envelope.ParseProto(b, &m); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"a": "true", "b": "-2147483648", "c": "AP8=", "d": "urn:x", "e": "/x", "f": "2018-04-05T17:31:00.000000005Z", "g": "false",
	}
	if len(m.Extensions) != len(want) || string(m.Data) != "Grüße" || !m.Time.Equal(at) {
		t.Errorf("read %+v", m)
	}
	for name, value := range want {
		if m.Extension(name) != value {
			t.Errorf("extension %s is %q, want %q", name, m.Extension(name), value)
		}
	}
}

func TestParseProtoRefuses(t *testing.T) {
	t.Parallel()
	attribute := func(name string, v *pb.CloudEventAttributeValue) []byte {
		b, err := proto.Marshal(&pb.CloudEvent{SpecVersion: "1.0", Attributes: map[string]*pb.CloudEventAttributeValue{name: v}})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	text := func(s string) *pb.CloudEventAttributeValue {
		return &pb.CloudEventAttributeValue{Attr: &pb.CloudEventAttributeValue_CeString{CeString: s}}
	}
	stamp := func(ts *timestamppb.Timestamp) *pb.CloudEventAttributeValue {
		return &pb.CloudEventAttributeValue{Attr: &pb.CloudEventAttributeValue_CeTimestamp{CeTimestamp: ts}}
	}
	packed, err := proto.Marshal(&pb.CloudEvent{Data: &pb.CloudEvent_ProtoData{ProtoData: &anypb.Any{TypeUrl: "x"}}})
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"cut short":           envelope.AppendProto(nil, whole())[:40],
		"no tag":              {0xff},
		"another specversion": protowire.AppendString(protowire.AppendTag(nil, 3, protowire.BytesType), "0.3"),
		"extension name":      attribute("Not-Allowed", text("x")),
		"extension value":     attribute("ext", text("a\nb")),
		"time":                attribute("time", text("yesterday")),
		"late timestamp":      attribute("ext", stamp(&timestamppb.Timestamp{Seconds: 253402300800})),
		"negative nanos":      attribute("time", stamp(&timestamppb.Timestamp{Nanos: -1})),
		"packed data":         packed,
	} {
		if err := envelope.ParseProto(b, new(postrider.Message)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// A known field number with another wire type is an unknown field, and leaves what was read alone.
func TestParseProtoIgnoresUnknownFields(t *testing.T) {
	t.Parallel()
	b := envelope.AppendProto(nil, whole())
	for num := protowire.Number(1); num < 12; num++ {
		b = protowire.AppendVarint(protowire.AppendTag(b, num, protowire.VarintType), 7)
		b = protowire.AppendFixed64(protowire.AppendTag(b, num, protowire.Fixed64Type), 7)
		b = protowire.AppendTag(protowire.AppendTag(b, num, protowire.StartGroupType), num, protowire.EndGroupType)
	}
	b = protowire.AppendString(protowire.AppendTag(b, 99, protowire.BytesType), "new")
	var m postrider.Message
	if err := envelope.ParseProto(b, &m); err != nil {
		t.Fatal(err)
	}
	checkEqual(t, &m, whole())
}

func FuzzParseProto(f *testing.F) {
	f.Add(envelope.AppendProto(nil, whole()))
	f.Add(envelope.AppendProto(nil, minimal()))
	f.Add([]byte{0x2a, 0x0b, 0x0a, 0x04, 't', 'i', 'm', 'e', 0x12, 0x03, 0x3a, 0x01, 0x08})
	f.Fuzz(func(t *testing.T, b []byte) {
		var m postrider.Message
		if err := envelope.ParseProto(b, &m); err == nil && m.Validate() == nil {
			var back postrider.Message
			if err := envelope.ParseProto(envelope.AppendProto(nil, &m), &back); err != nil {
				t.Fatalf("%x: %+v: %v", b, m, err)
			}
			checkEqual(t, &back, &m)
		}
		// What the SDK accepts, in the form in which it would send it on, means the same to us.
		var generated pb.CloudEvent
		if proto.Unmarshal(b, &generated) != nil || generated.GetProtoData() != nil {
			return
		}
		var e *event.Event
		e, err := format.FromProto(&generated)
		if err != nil || e.Validate() != nil {
			return
		}
		normal, err := format.Protobuf.Marshal(e)
		if err != nil || bytes.Contains(normal, []byte("protobuf")) {
			return
		}
		var ours postrider.Message
		if err := envelope.ParseProto(normal, &ours); err == nil && ours.Validate() == nil {
			checkSDK(t, *e, &ours)
		}
	})
}

func BenchmarkAppendProto(b *testing.B) {
	b.ReportAllocs()
	m, buf := whole(), make([]byte, 0, 1024)
	for b.Loop() {
		_ = envelope.AppendProto(buf, m)
	}
}

func BenchmarkParseProto(b *testing.B) {
	b.ReportAllocs()
	data := envelope.AppendProto(nil, whole())
	for b.Loop() {
		var m postrider.Message
		if err := envelope.ParseProto(data, &m); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSDKProto(b *testing.B) {
	data := envelope.AppendProto(nil, whole())
	var e event.Event
	if err := format.Protobuf.Unmarshal(data, &e); err != nil {
		b.Fatal(err)
	}
	b.Run("append", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := format.Protobuf.Marshal(&e); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parse", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := format.Protobuf.Unmarshal(data, &e); err != nil {
				b.Fatal(err)
			}
		}
	})
}
