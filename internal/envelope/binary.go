package envelope

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/postrider/postrider"
)

// Headers calls fn with the name and string form of every attribute of m that is set, the required ones first, as the
// binary modes of the bindings want them.
func Headers(m *postrider.Message, fn func(name, value string)) {
	fn("specversion", specVersion)
	fn("id", m.ID)
	fn("source", m.Source)
	fn("type", m.Type)
	if m.ContentType != "" {
		fn("datacontenttype", m.ContentType)
	}
	if m.DataSchema != "" {
		fn("dataschema", m.DataSchema)
	}
	if m.Subject != "" {
		fn("subject", m.Subject)
	}
	if !m.Time.IsZero() {
		fn("time", formatTime(m.Time))
	}
	for _, x := range m.Extensions {
		fn(x.Name, x.Value)
	}
}

// formatTime is the form in which all formats write a time: in UTC, because RFC 3339 cannot write every offset.
func formatTime(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// roomForExtensions is how many extensions a message gets place for at once.
const roomForExtensions = 4

// SetHeader sets the attribute of m that a binary mode carries under name. An attribute that CloudEvents does not allow
// is an error.
func SetHeader(m *postrider.Message, name, text string) error {
	if !utf8.ValidString(text) {
		return errors.New("the value is not valid UTF-8")
	}
	switch name {
	case "specversion":
		if text != specVersion {
			return fmt.Errorf("specversion is %q, want %q", text, specVersion)
		}
	case "id":
		m.ID = text
	case "source":
		m.Source = text
	case "type":
		m.Type = text
	default:
		return setAttribute(m, name, text, roomForExtensions)
	}
	return nil
}

// Escape encodes an attribute for a header as the HTTP and NATS bindings say: space, double quote, percent and
// everything outside printable ASCII is percent-encoded byte by byte.
func Escape(s string) string {
	clean := true
	for i := range len(s) {
		if mustEscape(s[i]) {
			clean = false
			break
		}
	}
	if clean {
		return s
	}
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; mustEscape(c) {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

func mustEscape(c byte) bool { return c <= ' ' || c == '"' || c == '%' || c >= 0x7f }

// Unescape is the inverse of Escape. As the bindings want, it first removes the double quotes that older versions of them
// allowed around a value. It is tolerant: a value that is not well encoded is taken as it stands, since the CloudEvents Go
// SDK does not encode what it sends. What it returns need not be UTF-8, which [SetHeader] refuses.
func Unescape(s string) string {
	if len(s) >= 2 && s[0] == '"' && s[len(s)-1] == '"' {
		s = unquote(s)
	}
	if !strings.Contains(s, "%") {
		return s
	}
	if t, err := url.PathUnescape(s); err == nil {
		return t
	}
	return s
}

// unquote removes double quotes and the backslashes between them (RFC 7230, section 3.2.6). It returns s as it is if a quote
// stands alone in it.
func unquote(s string) string {
	b := make([]byte, 0, len(s))
	for i := 1; i < len(s)-1; i++ {
		if s[i] == '"' {
			return s
		}
		if s[i] == '\\' {
			if i++; i == len(s)-1 { // it belongs to the quote at the end
				return s
			}
		}
		b = append(b, s[i])
	}
	return string(b)
}
