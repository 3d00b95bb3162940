package envelope_test

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/cloudevents/sdk-go/v2/types"
	"go.uber.org/goleak"

	"github.com/postrider/postrider"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// whole uses every attribute, beyond ASCII too.
func whole() *postrider.Message {
	return &postrider.Message{
		ID: "Bestellung-17 \"ü\" \\ 😀", Source: "//shop/orders?q=a%20b", Type: "orders.placed.v1", Subject: "Euro € 😀",
		Time: time.Date(2018, 4, 5, 17, 31, 0, 123456789, time.UTC), ContentType: "application/json", DataSchema: "urn:example:order:1",
		Extensions: postrider.Extensions{{Name: "correlationid", Value: "c-1"}, {Name: "partitionkey", Value: "Müller, Åsa"}},
		Data:       []byte(`{"id":"o-1","note":"größer \u003c"}`),
	}
}

func minimal() *postrider.Message { return &postrider.Message{ID: "1", Source: "//s", Type: "t"} }

// random returns a valid message of random parts.
func random() *postrider.Message {
	texts := []string{"a", "o-17", "ü€😀", `"q" \ {}`, "%41%zz", "x y", "https://h/p?q=1#f", "<\u2028/script>"}
	text := func() string { return texts[rand.IntN(len(texts))] }
	m := &postrider.Message{ID: text(), Source: []string{"//shop", "/a/ü", "urn:x:y", "relative"}[rand.IntN(4)], Type: text()}
	if rand.IntN(2) == 0 {
		m.Subject = text()
	}
	if rand.IntN(2) == 0 {
		m.Time = time.Unix(rand.Int64N(1<<33)-(1<<32), rand.Int64N(1e9)).UTC()
	}
	if rand.IntN(2) == 0 {
		m.DataSchema = "https://example.com/schema"
	}
	for range rand.IntN(4) {
		if err := m.SetExtension(fmt.Sprintf("ext%d", rand.IntN(9)), text()); err != nil {
			panic(err)
		}
	}
	m.ContentType = []string{
		"", "application/json", "application/vnd.x+json; charset=utf-8", "text/json", "text/plain", "text/csv;charset=iso-8859-1",
		"application/octet-stream",
	}[rand.IntN(7)]
	m.Data = [][]byte{nil, {}, []byte(`{"a":[1,null,"ü"]}`), []byte(`"text"`), []byte("null"), []byte("Grüße"), {0, 1, 255}}[rand.IntN(7)]
	return m
}

// toSDK gives the SDK the same event.
func toSDK(t *testing.T, m *postrider.Message) event.Event {
	t.Helper()
	e := event.New()
	e.SetID(m.ID)
	e.SetSource(m.Source)
	e.SetType(m.Type)
	e.SetSubject(m.Subject)
	e.SetTime(m.Time)
	e.SetDataContentType(m.ContentType)
	e.SetDataSchema(m.DataSchema)
	for _, x := range m.Extensions {
		e.SetExtension(x.Name, x.Value)
	}
	e.DataEncoded = m.Data
	if err := e.Validate(); err != nil {
		t.Fatal(err)
	}
	return e
}

// checkSDK compares what the SDK read with m.
func checkSDK(t *testing.T, e event.Event, m *postrider.Message) {
	t.Helper()
	source, schema := types.ParseURIRef(m.Source), types.ParseURI(m.DataSchema) // the SDK's notation of URIs is net/url's
	want := fmt.Sprintf("%q", []any{m.ID, source, m.Type, m.Subject, m.Time.UTC(), m.ContentType, schema})
	var gotSchema *types.URI
	if e.DataSchema() != "" {
		gotSchema = types.ParseURI(e.DataSchema())
	}
	got := fmt.Sprintf("%q", []any{e.ID(), types.ParseURIRef(e.Source()), e.Type(), e.Subject(), e.Time().UTC(), e.DataContentType(), gotSchema})
	if got != want {
		t.Errorf("the SDK reads\n%s, want\n%s", got, want)
	}
	if len(e.Extensions()) != len(m.Extensions) {
		t.Errorf("the SDK reads the extensions %v, want %v", e.Extensions(), m.Extensions)
	}
	for _, x := range m.Extensions {
		if got, err := types.Format(e.Extensions()[x.Name]); err != nil || got != x.Value {
			t.Errorf("the SDK reads extension %s as %q, want %q", x.Name, got, x.Value)
		}
	}
	if string(e.Data()) != string(m.Data) {
		t.Errorf("the SDK reads the data %q, want %q", e.Data(), m.Data)
	}
}

// checkEqual compares messages, and tells no data from empty data.
func checkEqual(t *testing.T, got, want *postrider.Message) {
	t.Helper()
	if (got.Data == nil) != (want.Data == nil) || !got.Time.Equal(want.Time) {
		t.Errorf("data %q at %v, want %q at %v", got.Data, got.Time, want.Data, want.Time)
	}
	g, w := *got, *want
	g.Time, w.Time = time.Time{}, time.Time{}
	if !reflect.DeepEqual(g, w) {
		t.Errorf("got\n%+v, want\n%+v", g, w)
	}
}
