package postrider_test

import (
	"errors"
	"math"
	"math/rand/v2"
	"mime"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/cloudevents/sdk-go/v2/types"
	"github.com/google/uuid"

	"github.com/postrider/postrider"
)

func validMessage() *postrider.Message {
	return &postrider.Message{ID: "1", Source: "//shop/orders", Type: "orders.placed.v1"}
}

// sdkAccepts is the oracle: it says whether the CloudEvents SDK takes the attributes of m.
func sdkAccepts(m *postrider.Message) bool {
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
	return e.Validate() == nil
}

// stricter says why Validate refuses m although the SDK takes it.
func stricter(m *postrider.Message) string {
	texts := []string{m.ID, m.Source, m.Type, m.Subject, m.ContentType, m.DataSchema}
	for _, x := range m.Extensions {
		if x.Name != strings.ToLower(x.Name) {
			return "CloudEvents allows lower-case names only; the SDK lowers them"
		}
		if x.Name == "data" {
			return "the name data is reserved; the SDK forgets it"
		}
		texts = append(texts, x.Value)
	}
	for _, s := range texts {
		if !utf8.ValidString(s) || strings.ContainsFunc(s, forbidden) {
			return "the CloudEvents type String excludes it; the SDK does not look"
		}
	}
	if y := m.Time.UTC().Year(); y < 1 || y > 9999 {
		return "RFC 3339 has years of four digits, google.protobuf.Timestamp begins with year 1"
	}
	return ""
}

// looser says why Validate takes m although the SDK refuses it.
func looser(m *postrider.Message) string {
	for _, s := range []string{m.ID, m.Source, m.Type} {
		if s != "" && strings.TrimSpace(s) == "" {
			return "CloudEvents asks for a non-empty string, and white space is one; the SDK trims"
		}
	}
	if u, err := url.Parse(m.Source); err == nil && u.String() == "" {
		return "// is a URI reference with an empty authority (RFC 3986, 4.2); net/url, which the SDK uses, writes it as nothing"
	}
	return ""
}

// padded says that the SDK trims an attribute first, and so may take what Validate refuses.
func padded(m *postrider.Message) bool {
	return strings.TrimSpace(m.DataSchema) != m.DataSchema || strings.TrimSpace(m.ContentType) != m.ContentType
}

// forbidden is written from the specification's text, independently of the code.
func forbidden(r rune) bool {
	switch {
	case r <= 0x1f, r >= 0x7f && r <= 0x9f:
		return true
	case r >= 0xfdd0 && r <= 0xfdef, r%0x10000 == 0xfffe, r%0x10000 == 0xffff:
		return true
	}
	return false
}

// checkAgainstSDK holds Validate to the oracle: equal, or different for a reason that we know.
func checkAgainstSDK(t *testing.T, m *postrider.Message) {
	t.Helper()
	err, theirs := m.Validate(), sdkAccepts(m)
	switch {
	case err == nil && !theirs && looser(m) == "":
		t.Errorf("%+v: the SDK refuses it, Validate does not", m)
	case err != nil && theirs && stricter(m) == "" && !padded(m):
		t.Errorf("%+v: Validate says %v, the SDK takes it", m, err)
	case err == nil && stricter(m) != "" && looser(m) == "":
		t.Errorf("%+v: Validate takes it, although %s", m, stricter(m))
	case err != nil && !errors.Is(err, postrider.InvalidArgument):
		t.Errorf("%+v: the error %v is not InvalidArgument", m, err)
	}
}

func TestValidateNamesTheAttribute(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		change func(*postrider.Message)
		want   string // in the error; empty: valid
	}{
		"valid":                  {func(*postrider.Message) {}, ""},
		"non-ASCII":              {func(m *postrider.Message) { m.ID, m.Subject = "Bestellung-ü", "Euro € 😀" }, ""},
		"relative source":        {func(m *postrider.Message) { m.Source = "orders" }, ""},
		"content type parameter": {func(m *postrider.Message) { m.ContentType = "text/plain; charset=utf-8" }, ""},
		"schema":                 {func(m *postrider.Message) { m.DataSchema = "urn:example:order" }, ""},
		"no id":                  {func(m *postrider.Message) { m.ID = "" }, "attribute id is required"},
		"no source":              {func(m *postrider.Message) { m.Source = "" }, "attribute source is required"},
		"no type":                {func(m *postrider.Message) { m.Type = "" }, "attribute type is required"},
		"bad source":             {func(m *postrider.Message) { m.Source = "%zz" }, "attribute source must be a URI reference"},
		"bad content type":       {func(m *postrider.Message) { m.ContentType = "a/b/c" }, "attribute datacontenttype must be a media type"},
		"relative schema":        {func(m *postrider.Message) { m.DataSchema = "/order" }, "attribute dataschema must be an absolute URI"},
		"line break in id":       {func(m *postrider.Message) { m.ID = "a\nb" }, "attribute id holds the control character U+000A"},
		"C1 control":             {func(m *postrider.Message) { m.Subject = "a\u0085b" }, "attribute subject holds the control character U+0085"},
		"noncharacter":           {func(m *postrider.Message) { m.Type = "a\ufdd0" }, "attribute type holds the noncharacter U+FDD0"},
		"noncharacter, plane 16": {func(m *postrider.Message) { m.Type = "a\U0010ffff" }, "attribute type holds the noncharacter U+10FFFF"},
		"broken UTF-8":           {func(m *postrider.Message) { m.Subject = "a\xff" }, "attribute subject is not valid UTF-8"},
		"year 10000": {
			func(m *postrider.Message) { m.Time = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) }, "attribute time must be",
		},
		"year 0": {
			func(m *postrider.Message) { m.Time = time.Date(0, 1, 1, 0, 0, 0, 0, time.UTC) }, "attribute time must be",
		},
		"extension name": {
			func(m *postrider.Message) { m.Extensions = postrider.Extensions{{Name: "a-b", Value: "1"}} },
			`attribute "a-b" only lower-case letters`,
		},
		"extension twice": {
			func(m *postrider.Message) {
				m.Extensions = postrider.Extensions{{Name: "a", Value: "1"}, {Name: "a", Value: "2"}}
			},
			"attribute a is out of order or there twice",
		},
		"extension value": {
			func(m *postrider.Message) { m.Extensions = postrider.Extensions{{Name: "a", Value: "\x00"}} },
			"attribute a holds the control character U+0000",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := validMessage()
			tt.change(m)
			err := m.Validate()
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("Validate: %v, want nil", err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("Validate: %v, want %q in it", err, tt.want)
			case err != nil && !errors.Is(err, postrider.InvalidArgument):
				t.Errorf("%v is not InvalidArgument", err)
			}
			if !strings.HasPrefix(name, "extension twice") { // the SDK's map cannot hold a name twice
				checkAgainstSDK(t, m)
			}
		})
	}
}

// Random attributes of good and bad parts: Validate and the SDK agree, or differ for a known reason.
func TestValidateAgreesWithSDK(t *testing.T) {
	t.Parallel()
	parts := []string{
		"", "", "a", "orders", "//shop", "http://h/p", "urn:x:y", "text/plain", "application/json; charset=utf-8", " ",
		"ü€😀", "%20", "%", "\n", "\x7f", "\u009f", "\ufffe", "\xff", ":", "/", ";", "=", "A", "data", "id",
	}
	pick := func() string {
		s := parts[rand.IntN(len(parts))]
		if rand.IntN(4) == 0 {
			s += parts[rand.IntN(len(parts))]
		}
		return s
	}
	valid := 0
	for range 50_000 {
		m := validMessage()
		for _, field := range []*string{&m.ID, &m.Source, &m.Type, &m.Subject, &m.ContentType, &m.DataSchema} {
			if rand.IntN(4) == 0 {
				*field = pick()
			}
		}
		if rand.IntN(4) == 0 {
			m.Extensions = postrider.Extensions{{Name: pick(), Value: pick()}}
		}
		if rand.IntN(8) == 0 {
			m.Time = time.Unix(rand.Int64N(1<<39)-(1<<38), 0).UTC()
		}
		checkAgainstSDK(t, m)
		if m.Validate() == nil {
			valid++
		}
	}
	if valid < 1000 || valid > 49_000 {
		t.Errorf("%d of 50000 random messages are valid: the generator tests only one side", valid)
	}
}

func FuzzValidate(f *testing.F) {
	f.Add("1", "//shop", "a.b", "s", "text/plain", "urn:x", "ext", "v", int64(0))
	f.Add(" ", "%", "\n", "ü", "a;b", ":", "Data", "\xff", int64(math.MaxInt64))
	f.Fuzz(func(t *testing.T, id, source, typ, subject, contentType, schema, name, value string, unix int64) {
		m := &postrider.Message{
			ID: id, Source: source, Type: typ, Subject: subject, ContentType: contentType, DataSchema: schema,
			Time: time.Unix(unix, 0).UTC(), Extensions: postrider.Extensions{{Name: name, Value: value}},
		}
		checkAgainstSDK(t, m)
	})
}

func TestSetExtensionWritesCanonicalForm(t *testing.T) {
	t.Parallel()
	link, err := url.Parse("https://example.com/a%20b?q=ü")
	if err != nil {
		t.Fatal(err)
	}
	// In the order of the table in CloudEvents 1.0, "Type System". The SDK's types.Format is the oracle.
	for _, value := range []any{
		true, false, 0, -1, math.MaxInt32, math.MinInt32, int32(7), "text", "ü€😀", []byte("binary\x00"), link,
		time.Date(2018, 4, 5, 17, 31, 0, 0, time.UTC), time.Date(2018, 4, 5, 17, 31, 0, 123456789, time.UTC),
		time.Date(2018, 4, 5, 17, 31, 0, 0, time.FixedZone("", 5400)),
	} {
		want, err := types.Format(value)
		if err != nil {
			t.Fatal(err)
		}
		m := validMessage()
		if err := m.SetExtension("ext", value); err != nil {
			t.Errorf("SetExtension(%T %v): %v", value, value, err)
		}
		if got := m.Extension("ext"); got != want {
			t.Errorf("SetExtension(%T %v) holds %q, want %q", value, value, got, want)
		}
	}
}

func TestSetExtensionRefuses(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		value any
		want  postrider.Code
	}{
		{"", "v", postrider.InvalidArgument},
		{"Upper", "v", postrider.InvalidArgument},
		{"under_score", "v", postrider.InvalidArgument},
		{"ümlaut", "v", postrider.InvalidArgument},
		{"id", "v", postrider.InvalidArgument},
		{"specversion", "v", postrider.InvalidArgument},
		{"data", "v", postrider.InvalidArgument},
		{"ext", "line\nbreak", postrider.InvalidArgument},
		{"ext", "\xff", postrider.InvalidArgument},
		{"ext", math.MaxInt32 + 1, postrider.InvalidArgument},
		{"ext", math.MinInt32 - 1, postrider.InvalidArgument},
		{"ext", 1.5, postrider.InvalidArgument},
		{"ext", int64(1), postrider.InvalidArgument},
		{"ext", nil, postrider.InvalidArgument},
		{"ext", (*url.URL)(nil), postrider.InvalidArgument},
		{"ext", &url.URL{Opaque: "a\nb"}, postrider.InvalidArgument},
		{"ext", time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC), postrider.InvalidArgument},
	} {
		m := validMessage()
		if err := m.SetExtension(tt.name, tt.value); !errors.Is(err, tt.want) {
			t.Errorf("SetExtension(%q, %T %v): %v, want %v", tt.name, tt.value, tt.value, err, tt.want)
		}
		if len(m.Extensions) != 0 {
			t.Errorf("SetExtension(%q, %v) failed and left %v", tt.name, tt.value, m.Extensions)
		}
	}
}

func TestExtensionsStaySortedAndSingle(t *testing.T) {
	t.Parallel()
	m, names := validMessage(), []string{"a", "b", "c", "d", "e", "f", "g1", "g2"}
	model := map[string]string{}
	for range 5000 {
		name, value := names[rand.IntN(len(names))], []string{"", "x", "y"}[rand.IntN(3)]
		if err := m.SetExtension(name, value); err != nil {
			t.Fatal(err)
		}
		if model[name] = value; value == "" {
			delete(model, name)
		}
		if len(m.Extensions) != len(model) {
			t.Fatalf("after %s=%q there are %v, want %v", name, value, m.Extensions, model)
		}
		for name, value := range model {
			if m.Extension(name) != value {
				t.Fatalf("extension %s is %q, want %q", name, m.Extension(name), value)
			}
		}
	}
	if err := m.Validate(); err != nil { // checks the order
		t.Error(err)
	}
}

func TestCloneSharesNoExtensions(t *testing.T) {
	t.Parallel()
	m := validMessage()
	if err := m.SetExtension("a", "1"); err != nil {
		t.Fatal(err)
	}
	c := m.Clone()
	if err := c.SetExtension("a", "2"); err != nil {
		t.Fatal(err)
	}
	c.Extensions = slices.Insert(c.Extensions, 0, postrider.Extension{Name: "0", Value: "x"})
	if m.Extension("a") != "1" || len(m.Extensions) != 1 {
		t.Errorf("a change of the clone shows in the original: %v", m.Extensions)
	}
}

func TestAddress(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ typ, topic, want string }{
		{"orders.placed.v1", "", "orders.placed.v1"},
		{"stock.v1/Reserve", "", "stock.v1.Reserve"},
		{"stock.v1/Reserve", "replies.1", "replies.1"},
	} {
		if got := (&postrider.Message{Type: tt.typ, Topic: tt.topic}).Address(); got != tt.want {
			t.Errorf("Address of type %q and topic %q is %q, want %q", tt.typ, tt.topic, got, tt.want)
		}
	}
}

func TestNewIDIsUUIDv7(t *testing.T) {
	t.Parallel()
	const each, writers = 5000, 4
	ids := make([][]string, writers)
	var wg sync.WaitGroup
	begin := time.Now().Truncate(time.Millisecond)
	for w := range writers {
		wg.Go(func() {
			for range each {
				ids[w] = append(ids[w], postrider.NewID())
			}
		})
	}
	wg.Wait()
	end := time.Now()
	seen := make(map[string]bool, each*writers)
	for _, id := range slices.Concat(ids...) {
		u, err := uuid.Parse(id)
		if err != nil || u.Version() != 7 || u.Variant() != uuid.RFC4122 || u.String() != id {
			t.Fatalf("%q is no UUID of version 7: version %v, variant %v, %v", id, u.Version(), u.Variant(), err)
		}
		if at := time.Unix(u.Time().UnixTime()); at.Before(begin) || at.After(end) {
			t.Fatalf("%q was made at %v, made between %v and %v", id, at, begin, end)
		}
		if seen[id] {
			t.Fatalf("%q was made twice", id)
		}
		seen[id] = true
	}
}

func BenchmarkNewID(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		_ = postrider.NewID()
	}
}

func BenchmarkValidate(b *testing.B) {
	b.ReportAllocs()
	m := validMessage()
	m.ContentType = "application/json"
	for b.Loop() {
		if err := m.Validate(); err != nil {
			b.Fatal(err)
		}
	}
}

// FuzzValidateShortCuts wants what Validate does not parse to be what the parsers take.
func FuzzValidateShortCuts(f *testing.F) {
	for _, s := range []string{"//shop/orders", "/", "a/b", "text/plain", "a/", "/a", "a/b/c", "application/cloudevents+json", "..", "a:b", "%"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		m := &postrider.Message{ID: "1", Source: s, Type: "t"}
		if _, err := url.Parse(s); err != nil && m.Validate() == nil {
			t.Errorf("source %q: %v", s, err)
		}
		m = &postrider.Message{ID: "1", Source: "s", Type: "t", ContentType: s}
		if _, _, err := mime.ParseMediaType(s); s != "" && err != nil && m.Validate() == nil {
			t.Errorf("content type %q: %v", s, err)
		}
	})
}
