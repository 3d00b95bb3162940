package envelope_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/envelope"
)

func TestJSONRoundTripAndSDK(t *testing.T) {
	t.Parallel()
	msgs := []*postrider.Message{whole(), minimal()}
	for range 2000 {
		msgs = append(msgs, random())
	}
	for _, m := range msgs {
		b := envelope.AppendJSON([]byte("prefix"), m)[len("prefix"):]
		if !json.Valid(b) || !utf8.Valid(b) {
			t.Fatalf("no JSON: %s", b)
		}
		var back postrider.Message
		if err := envelope.ParseJSON(b, &back); err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		checkEqual(t, &back, m)

		var e event.Event
		if err := json.Unmarshal(b, &e); err != nil {
			t.Fatalf("the SDK on %s: %v", b, err)
		}
		checkSDK(t, e, m)

		theirs := toSDK(t, m)
		theirs.DataBase64 = !envelope.Textual(m)
		b, err := json.Marshal(theirs)
		if err != nil {
			t.Fatal(err)
		}
		var read postrider.Message
		if err := envelope.ParseJSON(b, &read); err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		checkSDK(t, toSDK(t, &read), m)
	}
}

func TestAppendJSONData(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		contentType string
		data        []byte
		want        string // the end of the document
	}{
		{"application/json", nil, `"datacontenttype":"application/json"}`},
		{"application/json", []byte(` {"a": 1} `), `,"data": {"a": 1} }`},
		{"application/json", []byte("{broken"), `,"data_base64":"e2Jyb2tlbg=="}`},
		{"application/json", []byte("\"\xff\""), `,"data_base64":"Iv8i"}`},
		{"application/vnd.order+json;v=1", []byte("null"), `,"data_base64":"bnVsbA=="}`},
		{"text/vnd.x+json", []byte("{broken"), `,"data_base64":"e2Jyb2tlbg=="}`},
		{"text/json;v=1", []byte("null"), `,"data":null}`},
		{"text/plain", []byte("a\"\n\x01ü"), `,"data":"a\"\u000a\u0001ü"}`},
		{"text/plain; charset=UTF-8", []byte("ü"), `,"data":"ü"}`},
		{"text/plain; charset=iso-8859-1", []byte("a"), `,"data_base64":"YQ=="}`},
		{"text/plain", []byte("\xff"), `,"data_base64":"/w=="}`},
		{"application/xml", []byte("<a/>"), `,"data_base64":"PGEvPg=="}`},
		{"", []byte("1"), `,"data_base64":"MQ=="}`},
	} {
		m := minimal()
		m.ContentType, m.Data = tt.contentType, tt.data
		if got := string(envelope.AppendJSON(nil, m)); !strings.HasSuffix(got, tt.want) {
			t.Errorf("%q with %q is %s, want ...%s", tt.contentType, tt.data, got, tt.want)
		}
	}
}

// The four examples of the specification (json-format.md, section 3.2).
func TestParseJSONExamples(t *testing.T) {
	t.Parallel()
	const common = `"specversion" : "1.0", "type" : "com.example.someevent", "source" : "/mycontext", "time" : "2018-04-05T17:31:00Z",
		"comexampleextension1" : "value", "comexampleothervalue" : 5, "unsetextension": null, "subject": null,`
	for _, tt := range []struct{ rest, id, contentType, data string }{
		{
			`"id" : "A234-1234-1234", "datacontenttype" : "application/vnd.apache.thrift.binary", "data_base64" : "AP8="`,
			"A234-1234-1234", "application/vnd.apache.thrift.binary", "\x00\xff",
		},
		{
			`"id" : "B234-1234-1234", "datacontenttype" : "application/xml", "data" : "<much wow=\"xml\"/>"`,
			"B234-1234-1234", "application/xml", `<much wow="xml"/>`,
		},
		{
			`"id" : "C234-1234-1234", "datacontenttype" : "application/json", "data" : { "appinfoA" : "abc", "appinfoB" : 123 }`,
			"C234-1234-1234", "application/json", `{ "appinfoA" : "abc", "appinfoB" : 123 }`,
		},
		{
			`"id" : "D234-1234-1234", "data" : "I'm just a string"`,
			"D234-1234-1234", "application/json", `"I'm just a string"`,
		},
	} {
		var m postrider.Message
		if err := envelope.ParseJSON([]byte("{"+common+tt.rest+"}"), &m); err != nil {
			t.Error(err)
			continue
		}
		if err := m.Validate(); err != nil {
			t.Error(err)
		}
		if m.ID != tt.id || m.ContentType != tt.contentType || string(m.Data) != tt.data || m.Time.Unix() != 1522949460 || m.Subject != "" ||
			fmt.Sprint(m.Extensions) != "[{comexampleextension1 value} {comexampleothervalue 5}]" {
			t.Errorf("%s is read as %+v with %q", tt.rest, m, m.Data)
		}
	}
}

func TestParseJSONRefuses(t *testing.T) {
	t.Parallel()
	for doc, want := range map[string]string{
		``:                                       "unexpected end",
		`[]`:                                     "cannot unmarshal",
		`null`:                                   "no specversion",
		`{}`:                                     "no specversion",
		`{"specversion":null}`:                   "want \"1.0\"",
		`{"specversion":"0.3"}`:                  "want \"1.0\"",
		`{"specversion":"1.0","id":"a"}x`:        "invalid character",
		`{"specversion":"1.0","time":"soon"}`:    `attribute "time"`,
		`{"specversion":"1.0","Ext":"a"}`:        `attribute "Ext"`,
		`{"specversion":"1.0","ext":1.5}`:        "no integer",
		`{"specversion":"1.0","ext":2147483648}`: "no integer",
		`{"specversion":"1.0","ext":{}}`:         "no string",
		`{"specversion":"1.0","ext":"a\nb"}`:     "control character",
		`{"specversion":"1.0","data":1,"data_base64":"AA=="}`:                          "both",
		`{"specversion":"1.0","data_base64":"?"}`:                                      "data_base64",
		`{"specversion":"1.0","data_base64":[1]}`:                                      "data_base64",
		`{"specversion":"1.0","datacontenttype":"text/plain","data":{}}`:               "data with the content type",
		`{"specversion":"1.0","datacontenttype":"application/octet-stream","data":[]}`: "data with the content type",
	} {
		err := envelope.ParseJSON([]byte(doc), new(postrider.Message))
		if err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "cloudevents JSON format: ") {
			t.Errorf("%s: %v, want %q in it", doc, err, want)
		}
	}
	var m postrider.Message
	if err := envelope.ParseJSON([]byte(`{"specversion":"1.0","data_base64":null,"ext":true,"n":-0}`), &m); err != nil || m.Data != nil ||
		fmt.Sprint(m.Extensions) != "[{ext true} {n 0}]" {
		t.Errorf("%+v, %v", m, err)
	}
}

func FuzzParseJSON(f *testing.F) {
	f.Add(envelope.AppendJSON(nil, whole()))
	f.Add([]byte(`{"specversion":"1.0","id":"1","source":"/a","type":"t","data":"x","ext":true}`))
	f.Add([]byte(`{"specversion":"1.0","id":"1","source":"/a","type":"t","datacontenttype":"text/plain","data_base64":"AP8="}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var m postrider.Message
		if err := envelope.ParseJSON(b, &m); err != nil || m.Validate() != nil {
			return
		}
		out := envelope.AppendJSON(nil, &m)
		var back postrider.Message
		if err := envelope.ParseJSON(out, &back); err != nil {
			t.Fatalf("%q gives %q: %v", b, out, err)
		}
		checkEqual(t, &back, &m)
		if m.ContentType != strings.ToLower(m.ContentType) {
			return // a media type has no case; to the SDK it has
		}
		var e event.Event
		if err := json.Unmarshal(out, &e); err != nil {
			t.Fatalf("the SDK on %q: %v", out, err)
		}
		checkSDK(t, e, &m)
	})
}

func BenchmarkAppendJSON(b *testing.B) {
	b.ReportAllocs()
	m, buf := whole(), make([]byte, 0, 1024)
	for b.Loop() {
		_ = envelope.AppendJSON(buf, m)
	}
}

func BenchmarkParseJSON(b *testing.B) {
	b.ReportAllocs()
	data := envelope.AppendJSON(nil, whole())
	for b.Loop() {
		var m postrider.Message
		if err := envelope.ParseJSON(data, &m); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSDKJSON(b *testing.B) {
	data := envelope.AppendJSON(nil, whole())
	var e event.Event
	if err := json.Unmarshal(data, &e); err != nil {
		b.Fatal(err)
	}
	b.Run("append", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := json.Marshal(&e); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parse", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := json.Unmarshal(data, &e); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func ExampleAppendJSON() {
	m := &postrider.Message{ID: "1", Source: "//shop/orders", Type: "orders.placed.v1", ContentType: "text/plain", Data: []byte("Grüße")}
	b := envelope.AppendJSON(nil, m)
	fmt.Printf("%s\n", b)
	var back postrider.Message
	fmt.Println(envelope.ParseJSON(b, &back), back.ID, string(back.Data))
	// Output:
	// {"specversion":"1.0","id":"1","source":"//shop/orders","type":"orders.placed.v1","datacontenttype":"text/plain","data":"Grüße"}
	// <nil> 1 Grüße
}
