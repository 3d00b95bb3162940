package cloudevents_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"go.uber.org/goleak"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/codec/cloudevents"
	"github.com/postrider/postrider/internal/envelope"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func whole() *postrider.Message {
	return &postrider.Message{
		ID: " Bestellung-17 ü 😀 ", Source: "//shop/orders", Type: "orders.placed.v1", Subject: "Euro €",
		Time: time.Date(2018, 4, 5, 17, 31, 0, 123456789, time.UTC), ContentType: "application/json", DataSchema: "urn:example:order",
		Extensions: postrider.Extensions{{Name: "partitionkey", Value: "Müller"}, {Name: "sagaid", Value: "7"}}, Data: []byte(`{"id":1}`),
	}
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	msgs := []*postrider.Message{whole(), {ID: "1", Source: "s", Type: "t"}, {ID: "1", Source: "s", Type: "t", Data: []byte{0, 255}}}
	for _, source := range []string{"//Shop/%7e", "HTTP://h/", "/ü", "//", "a b", "URN:X:y", "?", "#", "x:", "%20", "/a;b=c?d=ä#e", "HTTP:?a"} {
		m := whole()
		m.Source = source
		msgs = append(msgs, m)
		if m = whole(); source[0] == 'H' || source[0] == 'U' || source[0] == 'x' {
			m.DataSchema = source
			msgs = append(msgs, m)
		}
	}
	for _, m := range msgs {
		e, err := cloudevents.ToEvent(m)
		if err != nil {
			t.Errorf("%+v: %v", m, err)
			continue
		}
		if err := e.Validate(); err != nil {
			t.Errorf("the SDK refuses %v: %v", e, err)
		}
		if e.ID() != m.ID || e.Source() != m.Source || e.Type() != m.Type || e.Subject() != m.Subject || !e.Time().Equal(m.Time) ||
			e.DataContentType() != m.ContentType || e.DataSchema() != m.DataSchema || string(e.Data()) != string(m.Data) ||
			len(e.Extensions()) != len(m.Extensions) || e.SpecVersion() != "1.0" {
			t.Errorf("%+v became\n%v", m, e)
		}
		back, err := cloudevents.FromEvent(e)
		if err != nil || !reflect.DeepEqual(back, m) {
			t.Errorf("%+v came back as\n%+v, %v", m, back, err)
		}
	}
}

// The SDK's JSON of the event is our JSON of the message.
func TestSDKReadsAndWritesTheSame(t *testing.T) {
	t.Parallel()
	for contentType, data := range map[string]string{
		"application/json": `{"id":1}`, "text/plain": "Grüße", "application/octet-stream": "\x00\xff", "application/vnd.x+json": "{}", "": "1",
	} {
		m := whole()
		m.ContentType, m.Data = contentType, []byte(data)
		e, err := cloudevents.ToEvent(m)
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		var back postrider.Message
		if err := envelope.ParseJSON(b, &back); err != nil || !reflect.DeepEqual(&back, m) {
			t.Errorf("%s was read as %+v, %v, want %+v", b, back, err, m)
		}
		var read event.Event
		if err := json.Unmarshal(envelope.AppendJSON(nil, m), &read); err != nil {
			t.Fatal(err)
		}
		if got, err := cloudevents.FromEvent(read); err != nil || !reflect.DeepEqual(got, m) {
			t.Errorf("the SDK read %+v, %v, want %+v", got, err, m)
		}
	}
}

func TestFromEventMakesExtensionsStrings(t *testing.T) {
	t.Parallel()
	for version, want := range map[string]string{
		"1.0": "[{b true} {bin AP8=} {i -5} {s ü} {t 2018-04-05T17:31:00Z}]",
		"0.3": "[{b true} {bin AP8=} {i -5} {s ü} {t 2018-04-05T17:31:00Z}]",
	} {
		e := event.New(version)
		e.SetID("1")
		e.SetSource("//s")
		e.SetType("t")
		e.SetExtension("b", true)
		e.SetExtension("i", -5)
		e.SetExtension("s", "ü")
		e.SetExtension("bin", []byte{0, 255})
		e.SetExtension("t", time.Date(2018, 4, 5, 19, 31, 0, 0, time.FixedZone("", 7200)))
		m, err := cloudevents.FromEvent(e)
		if err != nil || fmt.Sprint(m.Extensions) != want {
			t.Errorf("version %s: %v, %v, want %s", version, m, err, want)
		}
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	if _, err := cloudevents.ToEvent(&postrider.Message{ID: "1"}); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("an invalid message: %v", err)
	}
	bad := event.New()
	bad.SetID("1")
	bad.SetSource("//s")
	bad.SetType("t")
	bad.SetExtension("data", "reserved")
	noSource := event.New()
	noSource.SetID("1")
	noSource.SetType("t")
	for name, e := range map[string]event.Event{"no context": {}, "reserved extension": bad, "no source": noSource} {
		if _, err := cloudevents.FromEvent(e); !errors.Is(err, postrider.InvalidArgument) {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
	}
}

func FuzzRoundTrip(f *testing.F) {
	f.Add("1", "//Shop/%7e?a=ü#b", "t", "s", "text/plain", "HTTP://x", "ext", "v", []byte("data"))
	f.Fuzz(func(t *testing.T, id, source, typ, subject, contentType, schema, name, value string, data []byte) {
		m := &postrider.Message{ID: id, Source: source, Type: typ, Subject: subject, ContentType: contentType, DataSchema: schema, Data: data}
		if m.SetExtension(name, value) != nil || m.Validate() != nil {
			return
		}
		e, err := cloudevents.ToEvent(m)
		if err != nil {
			t.Fatalf("%+v: %v", m, err)
		}
		back, err := cloudevents.FromEvent(e)
		if err != nil || !reflect.DeepEqual(back, m) {
			t.Fatalf("%+v came back as %+v, %v", m, back, err)
		}
	})
}

func ExampleFromEvent() {
	e := event.New()
	e.SetID("o-17")
	e.SetSource("//shop/orders")
	e.SetType("orders.placed.v1")
	if err := e.SetData("application/json", map[string]int{"cents": 1250}); err != nil {
		fmt.Println(err)
	}

	m, err := cloudevents.FromEvent(e)
	fmt.Println(m.ID, m.Source, m.Type, string(m.Data), err)
	// Output: o-17 //shop/orders orders.placed.v1 {"cents":1250} <nil>
}
