package bus

import (
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
)

// FuzzDecode feeds the reader what a stream may hold: it must not panic, and what it takes for a valid event must come
// back the same after being written.
func FuzzDecode(f *testing.F) {
	f.Add("1.0", "id", "//source", "type", "", "partitionkey", "key", []byte(`{}`))
	f.Add("1.0", "n%201", "%2F%2F", "Gr%C3%B6%C3%9Fe", "", "time", "2026-01-02T03:04:05Z", []byte(nil))
	f.Add("0.3", "", "", "", "", "UPPER", "100%", []byte{0xff})
	f.Add("", "", "", "", "application/cloudevents+protobuf", "x", "", []byte("\n\x01a\x12\x01b\x1a\x031.0\"\x01c2\x01d"))
	f.Add("", "", "", "", "application/cloudevents+json", "x", "", []byte(`{"specversion":"1.0","id":"1","source":"s","type":"t"}`))
	f.Fuzz(func(t *testing.T, spec, id, source, typ, contentType, name, value string, data []byte) {
		in := &nats.Msg{Data: data, Header: nats.Header{
			"ce-id": {id}, "ce-source": {source}, "ce-type": {typ}, "ce-" + name: {value}, "Content-Type": {contentType},
		}}
		if spec != "" {
			in.Header["ce-specversion"] = []string{spec}
		}
		m, isEvent, err := decode(in, "topic")
		if m == nil {
			t.Fatal("no message: handlers and dead letters need one")
		}
		if !isEvent || err != nil || m.Validate() != nil {
			return
		}
		for _, b := range []*Bus{{}, {cfg: Config{Mode: Compact}}, {cfg: Config{Mode: JSON}}} {
			again, _, err := decode(b.encode(m, "topic"), "topic")
			if err != nil {
				t.Fatalf("what was written cannot be read: %v", err)
			}
			if !same(m, again) {
				t.Errorf("read %+v, written and read again %+v", m, again)
			}
		}
	})
}

func same(a, b *postrider.Message) bool {
	if len(a.Extensions) != len(b.Extensions) || !a.Time.Equal(b.Time) || string(a.Data) != string(b.Data) {
		return false
	}
	for i := range a.Extensions {
		if a.Extensions[i] != b.Extensions[i] {
			return false
		}
	}
	return a.ID == b.ID && a.Source == b.Source && a.Type == b.Type && a.Subject == b.Subject &&
		a.ContentType == b.ContentType && a.DataSchema == b.DataSchema
}
