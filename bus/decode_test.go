package bus

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	sdk "github.com/cloudevents/sdk-go/binding/format/protobuf/v2"
	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/envelope"
)

// describe returns all of a message, for comparison.
func describe(m *postrider.Message) string {
	return fmt.Sprintf("%s %s %s %q %s %s %s %v %q", m.ID, m.Source, m.Type, m.Subject, m.Time.UTC().Format(time.RFC3339Nano),
		m.ContentType, m.DataSchema, m.Extensions, m.Data)
}

// TestDecode reads the examples of the specification (nats-protocol-binding.md, sections 3.1.3.2, 3.1.4 and 3.2.1;
// json-format.md, section 3.2) and what others are known to send.
func TestDecode(t *testing.T) {
	t.Parallel()
	const attributes = `"specversion":"1.0","id":"1","source":"/c","type":"t"`
	for name, tt := range map[string]struct {
		header nats.Header
		data   string
		want   string // "" if it is no event
	}{
		"the binding's example": {
			nats.Header{
				"ce-specversion": {"1.0"}, "ce-type": {"com.example.someevent"}, "ce-time": {"2018-04-05T03:56:24Z"},
				"ce-id": {"1234-1234-1234"}, "ce-source": {"/mycontext/subcontext"}, "ce-datacontenttype": {"application/json"},
			},
			`{"a":1}`,
			`1234-1234-1234 /mycontext/subcontext com.example.someevent "" 2018-04-05T03:56:24Z application/json  [] "{\"a\":1}"`,
		},
		"percent-encoded": {
			nats.Header{
				"ce-specversion": {"1.0"}, "ce-type": {"t"}, "ce-id": {"1"}, "ce-source": {"/c"},
				"ce-subject": {"Euro%20%E2%82%AC%20%F0%9F%98%80"}, "ce-ext": {"%41%e2%82%ac"},
			},
			"", `1 /c t "Euro € 😀" 0001-01-01T00:00:00Z   [{ext A€}] ""`,
		},
		"quoted, as older versions of the binding allowed": {
			nats.Header{
				"ce-specversion": {"1.0"}, "ce-type": {"t"}, "ce-id": {"1"}, "ce-source": {"/c"},
				"ce-subject": {`"Euro \"%E2%82%AC\""`},
			},
			"", `1 /c t "Euro \"€\"" 0001-01-01T00:00:00Z   [] ""`,
		},
		"unencoded, in the case of HTTP, as the Go SDK sends": {
			nats.Header{
				"Ce-Specversion": {"1.0"}, "Ce-Type": {"t"}, "Ce-Id": {"zażółć gęślą 100%"}, "Ce-Source": {"/c"}, "content-type": {"text/plain"},
				"Ce-Ext": {"a b"},
			},
			"x", `zażółć gęślą 100% /c t "" 0001-01-01T00:00:00Z text/plain  [{ext a b}] "x"`,
		},
		"structured": {
			nats.Header{"Content-Type": {"application/cloudevents+json"}},
			`{` + attributes + `,"data":{"a":1}}`,
			`1 /c t "" 0001-01-01T00:00:00Z application/json  [] "{\"a\":1}"`,
		},
		"structured, with parameters and in another case": {
			nats.Header{"content-type": {"Application/CloudEvents+JSON; charset=UTF-8"}},
			`{` + attributes + `,"data_base64":"AP8="}`,
			`1 /c t "" 0001-01-01T00:00:00Z   [] "\x00\xff"`,
		},
		"structured, without a format": {
			nats.Header{"Content-Type": {"application/cloudevents"}}, `{` + attributes + `}`, `1 /c t "" 0001-01-01T00:00:00Z   [] ""`,
		},
		"structured wins over binary": {
			nats.Header{"Content-Type": {"application/cloudevents+json"}, "ce-specversion": {"1.0"}, "ce-id": {"2"}},
			`{` + attributes + `}`,
			`1 /c t "" 0001-01-01T00:00:00Z   [] ""`,
		},
		"structured without a header, as the Go SDK sends": {
			nil, "\n {" + attributes + `,"datacontenttype":"text/plain","data":"x"}`, `1 /c t "" 0001-01-01T00:00:00Z text/plain  [] "x"`,
		},
		"JSON that is no event":                   {nil, `{"specversion":"unknown"}`, ""},
		"JSON with a content type is not guessed": {nats.Header{"Content-Type": {"application/json"}}, `{` + attributes + `}`, ""},
		"no CloudEvent":                           {nats.Header{"X-Id": {"1"}}, "raw", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m, isEvent, err := decode(&nats.Msg{Header: tt.header, Data: []byte(tt.data)}, "topic")
			switch {
			case err != nil:
				t.Error(err)
			case isEvent != (tt.want != ""):
				t.Errorf("is an event: %v", isEvent)
			case isEvent && describe(m) != tt.want:
				t.Errorf("read\n%s, want\n%s", describe(m), tt.want)
			case !isEvent && string(m.Data) != tt.data:
				t.Errorf("the data of a raw message is %q", m.Data)
			}
		})
	}
}

// TestDecodeRefuses has messages that declare an event and are none.
func TestDecodeRefuses(t *testing.T) {
	t.Parallel()
	binary := func(key, value string) *nats.Msg {
		h := nats.Header{"ce-specversion": {"1.0"}, "ce-type": {"t"}, "ce-id": {"1"}, "ce-source": {"/c"}}
		h[key] = []string{value}
		return &nats.Msg{Header: h}
	}
	structured := func(contentType, data string) *nats.Msg {
		return &nats.Msg{Header: nats.Header{"Content-Type": {contentType}}, Data: []byte(data)}
	}
	for name, msg := range map[string]*nats.Msg{
		"an overlong encoding": binary("ce-ext", "%C0%A0"), // the binding's example of what must be rejected
		"broken UTF-8":         binary("ce-id", "\xff"),
		"another version":      binary("ce-specversion", "0.3"),
		"a bad name":           binary("ce-a_b", "x"),
		"a bad time":           binary("ce-time", "now"),
		"no id":                binary("ce-id", ""),
		"no type in JSON":      structured(envelope.ContentTypeJSON, `{"specversion":"1.0","id":"1","source":"/c"}`),
		"no source in protobuf": structured(envelope.ContentTypeProto,
			string(envelope.AppendProto(nil, &postrider.Message{ID: "1", Type: "t"}))),
		"broken JSON":           structured(envelope.ContentTypeJSON, `{`),
		"broken protobuf":       structured(envelope.ContentTypeProto, "\xff"),
		"an unknown format":     structured("application/cloudevents+avro", "x"),
		"a broken batch":        structured(envelope.ContentTypeJSONBatch, `{}`),
		"a broken binary batch": structured(envelope.ContentTypeProtoBatch, "\xff"),
	} {
		if m, isEvent, err := decode(msg, "topic"); err == nil || !isEvent || m == nil {
			t.Errorf("%s: read as %+v, event %v, error %v", name, m, isEvent, err)
		}
	}
}

// TestCompactIsReadBySDK has the CloudEvents Go SDK read what compact mode writes, and compact mode read what it writes.
func TestCompactIsReadBySDK(t *testing.T) {
	t.Parallel()
	b := &Bus{cfg: Config{Mode: Compact}}
	m := &postrider.Message{
		ID: "n 1", Source: "//test", Type: "t", Subject: "Größe", Time: time.Unix(1, 5).UTC(), ContentType: "text/plain", Data: []byte("x"),
		Extensions: postrider.Extensions{{Name: "partitionkey", Value: "€"}},
	}
	msg := b.encode(m, "subject")
	var e event.Event
	if err := sdk.Protobuf.Unmarshal(msg.Data, &e); err != nil {
		t.Fatal(err)
	}
	asJSON, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	var back postrider.Message
	if err := envelope.ParseJSON(asJSON, &back); err != nil || describe(&back) != describe(m) {
		t.Errorf("the SDK reads %s, %v; want %s", asJSON, err, describe(m))
	}
	theirs, err := sdk.Protobuf.Marshal(&e)
	if err != nil {
		t.Fatal(err)
	}
	got, isEvent, err := decode(&nats.Msg{Header: nats.Header{"content-type": {sdk.Protobuf.MediaType()}}, Data: theirs}, "topic")
	if got.Topic = ""; err != nil || !isEvent || describe(got) != describe(m) {
		t.Errorf("what the SDK writes is read as %s, %v, %v", describe(got), isEvent, err)
	}
}

func BenchmarkEnvelope(b *testing.B) {
	m := &postrider.Message{
		ID: postrider.NewID(), Source: "//shop/orders", Type: "orders.placed.v1", Time: time.Now(), ContentType: "application/protobuf",
		Data: make([]byte, 1024), Extensions: postrider.Extensions{{Name: "partitionkey", Value: "customer-17"}},
	}
	for name, bus := range map[string]*Bus{
		"binary": {}, "compact": {cfg: Config{Mode: Compact}}, "json": {cfg: Config{Mode: JSON}},
	} {
		b.Run("encode/"+name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				bus.encode(m, "orders.placed.v1")
			}
		})
		msg := bus.encode(m, "orders.placed.v1")
		b.Run("decode/"+name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := decode(msg, "orders.placed.v1"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
