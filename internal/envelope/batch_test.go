package envelope_test

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/envelope"
)

// The example of the specification (json-format.md, section 4.3), with data that is valid Base64.
const specBatch = `[
  {
      "specversion" : "1.0",
      "type" : "com.example.someevent",
      "source" : "/mycontext/4",
      "id" : "B234-1234-1234",
      "time" : "2018-04-05T17:31:00Z",
      "comexampleextension1" : "value",
      "comexampleothervalue" : 5,
      "datacontenttype" : "application/vnd.apache.thrift.binary",
      "data_base64" : "AP8="
  },
  {
      "specversion" : "1.0",
      "type" : "com.example.someotherevent",
      "source" : "/mycontext/9",
      "id" : "C234-1234-1234",
      "time" : "2018-04-05T17:31:05Z",
      "comexampleextension1" : "value",
      "comexampleothervalue" : 5,
      "datacontenttype" : "application/json",
      "data" : {
          "appinfoA" : "abc",
          "appinfoB" : 123,
          "appinfoC" : true
      }
  }
]`

func TestSplitJSON(t *testing.T) {
	t.Parallel()
	events, err := envelope.SplitJSON([]byte(specBatch))
	if err != nil || len(events) != 2 {
		t.Fatalf("%d events, %v", len(events), err)
	}
	for i, want := range []postrider.Message{
		{ID: "B234-1234-1234", Source: "/mycontext/4", ContentType: "application/vnd.apache.thrift.binary"},
		{ID: "C234-1234-1234", Source: "/mycontext/9", ContentType: "application/json"},
	} {
		var m postrider.Message
		err := envelope.ParseJSON(events[i], &m)
		if err != nil || m.Validate() != nil || m.ID != want.ID || m.Source != want.Source || m.ContentType != want.ContentType ||
			m.Extension("comexampleothervalue") != "5" {
			t.Errorf("event %d is %+v, %v", i, m, err)
		}
	}
	if events, err := envelope.SplitJSON([]byte(" [] ")); err != nil || len(events) != 0 {
		t.Errorf("the empty batch: %d events, %v", len(events), err)
	}
	for _, bad := range []string{"", "null", "{}", "[", "[] x", `"[]"`} {
		if events, err := envelope.SplitJSON([]byte(bad)); err == nil {
			t.Errorf("%q has %d events", bad, len(events))
		}
	}
}

func TestSplitProto(t *testing.T) {
	t.Parallel()
	var batch []byte
	msgs := []*postrider.Message{whole(), minimal(), random()}
	for _, m := range msgs {
		batch = protowire.AppendBytes(protowire.AppendTag(batch, 1, protowire.BytesType), envelope.AppendProto(nil, m))
		batch = protowire.AppendVarint(protowire.AppendTag(batch, 2, protowire.VarintType), 7) // a field of another version
	}
	events, err := envelope.SplitProto(batch)
	if err != nil || len(events) != len(msgs) {
		t.Fatalf("%d events, %v", len(events), err)
	}
	for i, want := range msgs {
		var m postrider.Message
		if err := envelope.ParseProto(events[i], &m); err != nil {
			t.Error(err)
		}
		checkEqual(t, &m, want)
	}
	if events, err := envelope.SplitProto(nil); err != nil || len(events) != 0 {
		t.Errorf("the empty batch: %d events, %v", len(events), err)
	}
	if events, err := envelope.SplitProto(batch[:20]); err == nil {
		t.Errorf("a batch that is cut short has %d events", len(events))
	}
}

// FuzzSplit wants the events of a protobuf batch to be parts of it, in their order.
func FuzzSplit(f *testing.F) {
	f.Add([]byte("\x0a\x00\x0a\x02\x0a\x00"))
	f.Add([]byte(specBatch))
	f.Fuzz(func(t *testing.T, b []byte) {
		if events, err := envelope.SplitJSON(b); err == nil {
			for _, e := range events {
				_ = envelope.ParseJSON(e, new(postrider.Message))
			}
		}
		events, err := envelope.SplitProto(b)
		if err != nil {
			return
		}
		rest := b
		for _, e := range events {
			i := bytes.Index(rest, e)
			if i < 0 {
				t.Fatalf("%x has an event %x", b, e)
			}
			rest = rest[i+len(e):]
			_ = envelope.ParseProto(e, new(postrider.Message))
		}
	})
}
