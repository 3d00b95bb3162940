package postrider_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/codec"
)

type order struct {
	ID       string `json:"id"`
	Customer string `json:"customer,omitempty"`
	Cents    int64  `json:"cents,omitempty"`
}

// sink is a Publisher that keeps what it gets.
type sink []*postrider.Message

func (s *sink) Publish(_ context.Context, msgs ...*postrider.Message) error {
	*s = append(*s, msgs...)
	return nil
}

func mustPanic(t *testing.T, want string, fn func()) {
	t.Helper()
	defer func() {
		t.Helper()
		if got := fmt.Sprint(recover()); !strings.Contains(got, want) {
			t.Errorf("panic %q, want %q in it", got, want)
		}
	}()
	fn()
}

func TestNamesThatPanic(t *testing.T) {
	t.Parallel()
	for _, name := range []string{
		"", ".", "a.", ".a", "a..b", "a b", "a/b", "a*", "a.>", "ü", "a\n", strings.Repeat("a", 201),
	} {
		mustPanic(t, "postrider: topic name", func() { postrider.NewTopic[order](name) })
	}
	for _, name := range []string{"", "stock.v1", "/", "stock.v1/", "/Reserve", "stock/a/b", "stock/a.b", "st ock/Reserve", "stock/Re>"} {
		mustPanic(t, "postrider: ", func() { postrider.NewMethod[order, order](name) })
	}
	mustPanic(t, "Encoding needs at least one codec", func() { postrider.NewTopic[order]("a", postrider.Encoding()) })
	mustPanic(t, "contract a: KeyBy takes *string, the contract's values are *postrider_test.order", func() {
		postrider.NewTopic[order]("a", postrider.KeyBy(func(*string) string { return "" }))
	})
	for _, name := range []string{"a", "orders.placed.v1", "A-b_c.0", strings.Repeat("a", 200)} {
		if got := postrider.NewTopic[order](name).Name(); got != name {
			t.Errorf("the topic %q is named %q", name, got)
		}
	}
}

func TestTopicMessage(t *testing.T) {
	t.Parallel()
	topic := postrider.NewTopic[order]("orders.placed.v1", postrider.KeyBy(func(o *order) string { return o.Customer }))
	before := time.Now()
	m, err := topic.Message(t.Context(), &order{ID: "o-1", Customer: "Müller"}, postrider.Subject("o-1"))
	if err != nil {
		t.Fatal(err)
	}
	if m.Type != "orders.placed.v1" || m.ContentType != "application/json" || m.Key() != "Müller" || m.Subject != "o-1" ||
		string(m.Data) != `{"id":"o-1","customer":"Müller"}` || m.Time.Before(before) || m.Source != "" || len(m.ID) != 36 {
		t.Errorf("the message is %+v", m)
	}
	m.Source = "//shop" // the publisher's part
	if err := m.Validate(); err != nil {
		t.Error(err)
	}
	e, err := topic.Decode(m)
	if err != nil || *e.Value != (order{ID: "o-1", Customer: "Müller"}) || e.ID != m.ID {
		t.Errorf("decoded %+v, %v", e.Value, err)
	}
	if m, err := topic.Message(t.Context(), &order{ID: "o-2"}); err != nil || len(m.Extensions) != 0 {
		t.Errorf("an empty key must be none: %v, %v", m.Extensions, err)
	}
	if _, err := topic.Message(t.Context(), &order{Customer: "line\nbreak"}); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("a key with a line break: %v, want InvalidArgument", err)
	}
}

func TestKeyFunctionNeedNotBearAZeroValue(t *testing.T) {
	t.Parallel()
	type line struct{ order *order }
	topic := postrider.NewTopic[line]("lines.v1", postrider.KeyBy(func(l *line) string { return l.order.ID }))
	m, err := topic.Message(t.Context(), &line{order: &order{ID: "o-1"}})
	if err != nil || m.Key() != "o-1" {
		t.Errorf("key %q, %v", m.Key(), err)
	}
}

func TestPublishOptions(t *testing.T) {
	t.Parallel()
	topic := postrider.NewTopic[order]("orders.placed.v1", postrider.KeyBy(func(*order) string { return "from KeyBy" }))
	var out sink
	err := topic.Publish(t.Context(), &out, &order{}, postrider.MessageID("m-1"), postrider.Key("mine"),
		postrider.ReplyTo("replies"), postrider.IdempotencyKey("k"), postrider.WithExtension("n", 7))
	if err != nil || len(out) != 1 {
		t.Fatalf("published %d, %v", len(out), err)
	}
	want := postrider.Extensions{
		{Name: "idempotencykey", Value: "k"},
		{Name: "n", Value: "7"},
		{Name: "partitionkey", Value: "mine"},
		{Name: "replyto", Value: "replies"},
	}
	if m := out[0]; m.ID != "m-1" || fmt.Sprint(m.Extensions) != fmt.Sprint(want) {
		t.Errorf("id %s, extensions %v, want %v", m.ID, m.Extensions, want)
	}
	bad := postrider.WithExtension("Bad", 1)
	for name, err := range map[string]error{
		"Publish":    topic.Publish(t.Context(), &out, &order{}, bad),
		"PublishAll": topic.PublishAll(t.Context(), &out, []*order{{}, {}}, bad),
	} {
		if !errors.Is(err, postrider.InvalidArgument) || len(out) != 1 {
			t.Errorf("%s with a bad option: %v, %d published", name, err, len(out))
		}
	}
}

func TestPublishAll(t *testing.T) {
	t.Parallel()
	topic := postrider.NewTopic[order]("orders.placed.v1")
	var out sink
	if err := topic.PublishAll(t.Context(), &out, []*order{{ID: "1"}, {ID: "2"}, {ID: "3"}}); err != nil {
		t.Fatal(err)
	}
	ids := map[string]bool{}
	for i, m := range out {
		e, err := topic.Decode(m)
		if err != nil || e.Value.ID != fmt.Sprint(i+1) {
			t.Errorf("message %d holds order %s, %v", i, e.Value.ID, err)
		}
		ids[m.ID] = true
	}
	if len(ids) != 3 {
		t.Errorf("%d different ids, want 3", len(ids))
	}
}

func TestEncoding(t *testing.T) {
	t.Parallel()
	text := postrider.NewTopic[string]("notes.v1", postrider.Encoding(codec.Text, codec.JSON))
	note := "Grüße"
	m, err := text.Message(t.Context(), &note)
	if err != nil || m.ContentType != "text/plain" || string(m.Data) != note {
		t.Fatalf("message %+v, %v", m, err)
	}
	for _, tt := range []struct{ contentType, data string }{
		{"text/plain; charset=utf-8", note}, {"", note}, {"application/json", `"Grüße"`}, {"application/vnd.note+json", `"Grüße"`},
	} {
		e, err := text.Decode(&postrider.Message{ContentType: tt.contentType, Data: []byte(tt.data)})
		if err != nil || *e.Value != note {
			t.Errorf("%s: %q, %v", tt.contentType, *e.Value, err)
		}
	}
	for _, m := range []*postrider.Message{
		{ID: "m-1", ContentType: "application/xml", Data: []byte("<a/>")}, {ID: "m-1", ContentType: "application/json", Data: []byte("{")},
	} {
		_, err := text.Decode(m)
		if !errors.Is(err, postrider.InvalidArgument) || postrider.Retryable(err) || !strings.Contains(err.Error(), "decode notes.v1 m-1") {
			t.Errorf("%s: %v, want a permanent InvalidArgument that names topic and message", m.ContentType, err)
		}
	}
	number := postrider.NewTopic[func()]("funcs.v1")
	if _, err := number.Message(t.Context(), new(func())); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("a value that JSON cannot encode: %v", err)
	}
}

// brokenCodec fails with an error of its own.
type brokenCodec struct{ err error }

func (brokenCodec) ContentType() string                        { return "application/broken" }
func (c brokenCodec) Append(dst []byte, _ any) ([]byte, error) { return dst, c.err }
func (c brokenCodec) Unmarshal([]byte, any) error              { return c.err }

// A codec's error is final, unless it says that something is away.
func TestCodecErrors(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		err  error
		want postrider.Code
	}{
		{errors.New("weather"), postrider.InvalidArgument},
		{postrider.Errorf(postrider.Internal, "a bug"), postrider.InvalidArgument},
		{fmt.Errorf("keys: %w", postrider.Errorf(postrider.Unavailable, "away")), postrider.Unavailable},
	} {
		topic := postrider.NewTopic[order]("orders.placed.v1", postrider.Encoding(brokenCodec{tt.err}))
		_, decodeErr := topic.Decode(&postrider.Message{ID: "m-1"})
		_, encodeErr := topic.Message(t.Context(), &order{})
		for _, err := range []error{decodeErr, encodeErr} {
			if postrider.CodeOf(err) != tt.want || postrider.Retryable(err) != (tt.want == postrider.Unavailable) || !errors.Is(err, tt.err) {
				t.Errorf("%v becomes %v, want %v", tt.err, err, tt.want)
			}
		}
	}
}

// A reference is not taken for an empty value, which many a codec would accept.
func TestDataElsewhere(t *testing.T) {
	t.Parallel()
	topic := postrider.NewTopic[string]("notes.v1", postrider.Encoding(codec.Text))
	m := &postrider.Message{ID: "m-1", ContentType: "text/plain"}
	if err := m.SetExtension(postrider.ExtDataRef, "https://example.com/1"); err != nil {
		t.Fatal(err)
	}
	if _, err := topic.Decode(m); !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), "at https://example.com/1") {
		t.Errorf("%v, want FailedPrecondition that names the reference", err)
	}
	m.Data = []byte("here too")
	if e, err := topic.Decode(m); err != nil || *e.Value != "here too" {
		t.Errorf("data beside the reference: %v", err)
	}
}

func TestBatchError(t *testing.T) {
	t.Parallel()
	refused := postrider.Errorf(postrider.ResourceExhausted, "too large")
	batch := &postrider.BatchError{Errs: []error{nil, refused, nil, context.Canceled}}
	if batch.Error() != "2 of 4 messages failed, the first: too large (RESOURCE_EXHAUSTED)" {
		t.Error(batch)
	}
	wrapped := fmt.Errorf("publish: %w", batch)
	if !errors.Is(wrapped, postrider.ResourceExhausted) || !errors.Is(wrapped, context.Canceled) {
		t.Errorf("%v hides its failures", wrapped)
	}
	for _, tt := range []struct {
		err  error
		n    int
		want []error
	}{
		{nil, 2, []error{nil, nil}},
		{refused, 2, []error{refused, refused}},
		{wrapped, 4, batch.Errs},
		{wrapped, 1, []error{wrapped}}, // of another batch: all of ours failed
	} {
		if got := postrider.PublishErrors(tt.err, tt.n); fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("PublishErrors(%v, %d) is %v, want %v", tt.err, tt.n, got, tt.want)
		}
	}
}
