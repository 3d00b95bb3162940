package postrider

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"mime"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Extension attributes that Postrider gives a meaning. docs/wire.md describes each.
const (
	ExtCorrelationID  = "correlationid"  // the id of the message that began it all
	ExtCausationID    = "causationid"    // the id of the message whose handler published this one
	ExtPartitionKey   = "partitionkey"   // messages of one key are handled in order
	ExtTraceParent    = "traceparent"    // W3C trace context
	ExtTraceState     = "tracestate"     // W3C trace context
	ExtReplyTo        = "replyto"        // the topic that the reply to a command goes to
	ExtIdempotencyKey = "idempotencykey" // the same over all attempts of one call or command
	ExtDeadline       = "deadline"       // milliseconds that a call has left, relative to its sending
	ExtErrorCode      = "errorcode"      // on a reply: it is an error of this code, its data the JSON form
	ExtSagaID         = "sagaid"         // the saga that a command or reply belongs to
	ExtDataRef        = "dataref"        // where the data is when the message does not hold it (CloudEvents claim check)
	ExtAcceptDataRef  = "acceptdataref"  // on a call: what the dataref of a response may begin with
	ExtDataDigest     = "datadigest"     // of the data at dataref, "sha-256=" and 64 hexadecimal digits
	ExtDeliverAt      = "deliverat"      // when a message is to be delivered, if not at once
	ExtExpiryTime     = "expirytime"     // when a message loses its meaning (CloudEvents extension "Expiry Time")
	ExtSchedule       = "schedule"       // the schedule that a recurring message comes from
	ExtRedrive        = "redrive"        // on a message that is published once more on purpose: tells this time from others
)

// Message is one CloudEvent 1.0: its attributes as fields, its extensions as a small sorted slice, its data as bytes.
// A Message is not safe for concurrent use while it is changed; once published or delivered nobody changes it.
type Message struct {
	ID          string     // required; unique per Source
	Source      string     // required, a URI reference; a Publisher fills it in when it is empty
	Type        string     // required; the contract's name
	Subject     string     // CloudEvents subject: what in the source it is about. Not the NATS subject
	Time        time.Time  // when it happened; the zero value means unknown
	ContentType string     // datacontenttype, a media type
	DataSchema  string     // an absolute URI
	Extensions  Extensions // sorted by name; use SetExtension
	Data        []byte

	// Topic is where the message goes or came from: dot-separated tokens that the bus turns into a NATS subject. It is
	// no attribute and not part of the CloudEvent. Empty means the Type, with "/" read as ".".
	Topic string

	// Delivery tells about the way a received message took. It is no attribute either.
	Delivery Delivery
}

// Delivery is what a transport knows about a message that it hands to a handler. It is zero for one that was not
// received.
type Delivery struct {
	Attempt  int       // 1 for the first delivery
	Stream   string    // JetStream stream, empty for a call
	Sequence uint64    // sequence in Stream
	Stored   time.Time // when the stream stored it
	Group    string    // the group of the subscription

	// Fence is the fencing token of an ordered subscription: it grows whenever another instance of the group, or the same
	// one anew, takes over the keys that the message's is among. An instance that was stopped for a while, and does not know
	// that it was replaced, has a smaller one than its successor. So an effect that keeps the largest Fence it has seen for
	// its key, and refuses smaller ones, never takes an old instance's word after a new one's. Zero where there is no order.
	Fence uint64
}

// Extension is one extension attribute in CloudEvents' canonical string form.
type Extension struct{ Name, Value string }

// Extensions is sorted by name and holds a name once.
type Extensions []Extension

// Get returns the value of an extension, or "".
func (x Extensions) Get(name string) string {
	if i, ok := x.find(name); ok {
		return x[i].Value
	}
	return ""
}

func (x Extensions) find(name string) (int, bool) {
	return slices.BinarySearchFunc(x, name, func(e Extension, n string) int { return strings.Compare(e.Name, n) })
}

// Extension returns the value of an extension, or "".
func (m *Message) Extension(name string) string { return m.Extensions.Get(name) }

// SetExtension sets an extension attribute. The value is a bool, an integer of 32 bits, a string, a []byte, a
// *url.URL or a time.Time, the types of CloudEvents; it is kept in the canonical string form. An empty string removes
// the attribute. Bad names, bad types and characters that CloudEvents forbids are InvalidArgument.
func (m *Message) SetExtension(name string, value any) error {
	text, err := "", checkExtensionName(name)
	if err == nil {
		text, err = canonical(value)
	}
	if err != nil {
		return &Error{Code: InvalidArgument, Op: "set extension " + strconv.Quote(name), Err: err}
	}
	m.setExtension(name, text)
	return nil
}

// setExtension is SetExtension for a name and a value that are known to be good.
func (m *Message) setExtension(name, value string) {
	i, found := m.Extensions.find(name)
	switch {
	case value == "" && found:
		m.Extensions = slices.Delete(m.Extensions, i, i+1)
	case value == "":
	case found:
		m.Extensions[i].Value = value
	default:
		m.Extensions = slices.Insert(m.Extensions, i, Extension{name, value})
	}
}

// Key returns the partition key: messages of one key keep their order. Empty means none.
func (m *Message) Key() string { return m.Extension(ExtPartitionKey) }

// Address returns where the message goes: Topic, or else the Type with "/" read as ".".
func (m *Message) Address() string {
	if m.Topic != "" {
		return m.Topic
	}
	return strings.ReplaceAll(m.Type, "/", ".")
}

// CheckAddress checks that the Address can be published to: tokens of UTF-8, none of them empty, without white space and
// wildcards, joined by dots. The error is InvalidArgument.
func (m *Message) CheckAddress() error {
	if a := m.Address(); !isAddress(a) {
		return &Error{
			Code: InvalidArgument, Op: "check message " + strconv.Quote(m.ID),
			Msg: strconv.Quote(a) + " is no address: want tokens without spaces and wildcards, joined by dots",
		}
	}
	return nil
}

func isAddress(s string) bool {
	start := true
	for i := range len(s) {
		switch c := s[i]; {
		case c == '.' && start, c <= ' ', c == '*', c == '>', c == 0x7f:
			return false
		default:
			start = c == '.'
		}
	}
	return !start && utf8.ValidString(s)
}

// Clone returns a copy that shares only Data.
func (m *Message) Clone() *Message {
	c := *m
	c.Extensions = slices.Clone(m.Extensions)
	return &c
}

// Validate checks the attributes against CloudEvents 1.0: required ones present, source a URI reference, dataschema an
// absolute URI, datacontenttype a media type, extension names of lower-case letters and digits, no control characters.
// The error is InvalidArgument and names the attribute.
func (m *Message) Validate() error {
	if m == nil {
		return &Error{Code: InvalidArgument, Op: "check message", Msg: "the message is nil"}
	}
	bad := func(attr, format string, args ...any) error {
		return &Error{
			Code: InvalidArgument, Op: "check message " + strconv.Quote(m.ID),
			Msg: "attribute " + attr + " " + fmt.Sprintf(format, args...),
		}
	}
	for _, a := range [...]struct{ name, value string }{{"id", m.ID}, {"source", m.Source}, {"type", m.Type}} {
		if a.value == "" {
			return bad(a.name, "is required")
		}
	}
	if !isPlain(m.Source) {
		if _, err := url.Parse(m.Source); err != nil {
			return bad("source", "must be a URI reference: %v", err)
		}
	}
	if m.DataSchema != "" {
		if u, err := url.Parse(m.DataSchema); err != nil || !u.IsAbs() {
			return bad("dataschema", "must be an absolute URI, is %q", m.DataSchema)
		}
	}
	if m.ContentType != "" && !isPlainMediaType(m.ContentType) {
		if _, _, err := mime.ParseMediaType(m.ContentType); err != nil {
			return bad("datacontenttype", "must be a media type: %v", err)
		}
	}
	for _, a := range [...]struct{ name, value string }{
		{"id", m.ID},
		{"source", m.Source},
		{"type", m.Type},
		{"subject", m.Subject},
		{"datacontenttype", m.ContentType},
		{"dataschema", m.DataSchema},
	} {
		if err := checkString(a.value); err != nil {
			return bad(a.name, "%v", err)
		}
	}
	if err := checkTime(m.Time); err != nil {
		return bad("time", "%v", err)
	}
	for i, x := range m.Extensions {
		if err := checkExtensionName(x.Name); err != nil {
			return bad(strconv.Quote(x.Name), "%v", err)
		}
		if i > 0 && m.Extensions[i-1].Name >= x.Name {
			return bad(x.Name, "is out of order or there twice: use SetExtension")
		}
		if err := checkString(x.Value); err != nil {
			return bad(x.Name, "%v", err)
		}
	}
	return nil
}

// checkExtensionName holds a name to CloudEvents 1.0, "Naming Conventions": lower-case letters and digits. The names
// of the specification's own attributes are taken.
func checkExtensionName(name string) error {
	if name == "" {
		return errors.New("an extension needs a name")
	}
	for i := range len(name) {
		if c := name[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return errors.New("only lower-case letters a to z and digits are allowed in the name")
		}
	}
	switch name {
	case "id", "source", "specversion", "type", "datacontenttype", "dataschema", "subject", "time", "data":
		return errors.New("the name belongs to CloudEvents itself: set the field")
	}
	return nil
}

// canonical returns the canonical string form of CloudEvents 1.0, "Type System".
func canonical(value any) (string, error) {
	switch v := value.(type) {
	case string:
		return v, checkString(v)
	case bool:
		return strconv.FormatBool(v), nil
	case []byte:
		return base64.StdEncoding.EncodeToString(v), nil
	case time.Time:
		return v.UTC().Format(time.RFC3339Nano), checkTime(v)
	case *url.URL:
		if v == nil {
			return "", errors.New("the *url.URL is nil")
		}
		return v.String(), checkString(v.String()) // an opaque URL may hold anything
	case int32:
		return strconv.Itoa(int(v)), nil
	case int:
		if v < math.MinInt32 || v > math.MaxInt32 {
			return "", fmt.Errorf("integer %d does not fit the 32 bits of CloudEvents: send it as a string", v)
		}
		return strconv.Itoa(v), nil
	default:
		return "", fmt.Errorf("type %T is none of bool, int, int32, string, []byte, *url.URL, time.Time", value)
	}
}

// isPlain says if s is of letters, digits and a few signs, so that it is a URI reference and nothing needs to be parsed.
func isPlain(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '/', c == '-', c == '.', c == '_', c == '+':
		default:
			return false
		}
	}
	return true
}

// isPlainMediaType says if s is a media type without parameters.
func isPlainMediaType(s string) bool {
	i := strings.IndexByte(s, '/')
	return i > 0 && i < len(s)-1 && strings.LastIndexByte(s, '/') == i && isPlain(s)
}

// checkTime refuses what RFC 3339 or google.protobuf.Timestamp cannot write.
func checkTime(t time.Time) error {
	if y := t.UTC().Year(); y < 1 || y > 9999 {
		return fmt.Errorf("must be in the years 1 to 9999, is in %d", y)
	}
	return nil
}

// checkString refuses what CloudEvents 1.0 forbids in a String: control characters, noncharacters, broken UTF-8.
func checkString(s string) error {
	plain := true
	for i := range len(s) {
		if s[i] < 0x20 || s[i] >= 0x7f {
			plain = false
			break
		}
	}
	if plain {
		return nil
	}
	if !utf8.ValidString(s) {
		return errors.New("is not valid UTF-8")
	}
	for _, r := range s {
		if r < 0x20 || (r >= 0x7f && r <= 0x9f) {
			return fmt.Errorf("holds the control character %U", r)
		}
		if r&0xfffe == 0xfffe || (r >= 0xfdd0 && r <= 0xfdef) {
			return fmt.Errorf("holds the noncharacter %U", r)
		}
	}
	return nil
}

// NewID returns a UUID of version 7 (RFC 9562): 48 bits of time in milliseconds, then random bits, so that ids made
// one after the other sort roughly by time. Safe for concurrent use.
func NewID() string {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], uint64(time.Now().UnixMilli())<<16|rand.Uint64()&0x0fff|0x7000)
	binary.BigEndian.PutUint64(b[8:], rand.Uint64()&(1<<62-1)|1<<63)
	var s [36]byte
	hex.Encode(s[:8], b[:4])
	hex.Encode(s[9:13], b[4:6])
	hex.Encode(s[14:18], b[6:8])
	hex.Encode(s[19:23], b[8:10])
	hex.Encode(s[24:], b[10:])
	s[8], s[13], s[18], s[23] = '-', '-', '-', '-'
	return string(s[:])
}
