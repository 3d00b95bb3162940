package envelope

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"mime"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/postrider/postrider"
)

// AppendJSON appends a valid m in the structured JSON format (cloudevents/spec: cloudevents/formats/json-format.md). Data goes out
// as a JSON value or a string where [Textual] says so, else in Base64. [ParseJSON] gives the same message back, but for
// white space around a JSON value and the time zone's name.
func AppendJSON(dst []byte, m *postrider.Message) []byte {
	sep := byte('{')
	Headers(m, func(name, value string) {
		dst = append(dst, sep)
		dst = appendJSONString(dst, name)
		dst = append(dst, ':')
		dst = appendJSONString(dst, value)
		sep = ','
	})
	switch {
	case m.Data == nil:
	case !Textual(m):
		dst = append(dst, `,"data_base64":"`...)
		dst = base64.StdEncoding.AppendEncode(dst, m.Data)
		dst = append(dst, '"')
	case isJSON(m.ContentType):
		dst = append(dst, `,"data":`...)
		dst = append(dst, m.Data...)
	default:
		dst = append(dst, `,"data":`...)
		dst = appendJSONString(dst, string(m.Data))
	}
	return append(dst, '}')
}

// Textual reports whether AppendJSON writes m's data as it is: a JSON value or text in UTF-8, and a content type that says
// so. Without a content type it does not, because a reader would have to take it for JSON; nor with a type like
// application/vnd.order+json, because the CloudEvents Go SDK (2.16) takes that for text. Base64 is right for all of them.
func Textual(m *postrider.Message) bool {
	media, params, err := mime.ParseMediaType(m.ContentType)
	switch {
	case err != nil || !utf8.Valid(m.Data):
		return false
	case media == "application/json" || media == "text/json":
		return json.Valid(m.Data)
	case strings.HasPrefix(media, "text/") && !strings.HasSuffix(media, "+json"):
		charset := strings.ToLower(params["charset"])
		return charset == "" || charset == "utf-8"
	default:
		return false
	}
}

// isJSON says whether a content type declares JSON: */json or */*+json.
func isJSON(contentType string) bool {
	media, _, err := mime.ParseMediaType(contentType)
	return err == nil && (strings.HasSuffix(media, "/json") || strings.HasSuffix(media, "+json"))
}

// appendJSONString appends s, whose UTF-8 is valid, as a JSON string (RFC 8259, section 7).
func appendJSONString(dst []byte, s string) []byte {
	const hex = "0123456789abcdef"
	dst = append(dst, '"')
	for i := range len(s) {
		switch c := s[i]; {
		case c == '"' || c == '\\':
			dst = append(dst, '\\', c)
		case c < ' ':
			dst = append(dst, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		default:
			dst = append(dst, c)
		}
	}
	return append(dst, '"')
}

// ParseJSON reads the structured JSON format into m. It does not retain b. It checks the form only;
// [postrider.Message.Validate] checks the attributes.
func ParseJSON(b []byte, m *postrider.Message) error {
	if err := parseJSON(b, m); err != nil {
		return fmt.Errorf("cloudevents JSON format: %w", err)
	}
	return nil
}

func parseJSON(b []byte, m *postrider.Message) error {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(b, &members); err != nil {
		return err
	}
	data, hasData := members["data"]
	encoded, hasBase64 := members["data_base64"]
	delete(members, "data")
	delete(members, "data_base64")
	if _, ok := members["specversion"]; !ok {
		return errors.New("there is no specversion: is it a CloudEvent?")
	}
	for _, name := range slices.Sorted(maps.Keys(members)) {
		text, err := attributeText(members[name])
		if err == nil && (text != "" || name == "specversion") { // null and empty: not set
			err = SetHeader(m, name, text)
		}
		if err != nil {
			return fmt.Errorf("attribute %q: %w", name, err)
		}
	}
	switch {
	case hasData && hasBase64:
		return errors.New("there are both data and data_base64")
	case hasBase64:
		var text *string // null: not set
		err := json.Unmarshal(encoded, &text)
		if err == nil && text != nil {
			m.Data, err = base64.StdEncoding.DecodeString(*text)
		}
		if err != nil {
			return fmt.Errorf("data_base64: %w", err)
		}
	case !hasData:
	case m.ContentType == "":
		m.ContentType = "application/json" // what the format implies is said, for those who read the message elsewhere
		m.Data = data
	case isJSON(m.ContentType):
		m.Data = data
	default:
		var text string
		if err := json.Unmarshal(data, &text); err != nil {
			return fmt.Errorf("data with the content type %q: %w", m.ContentType, err)
		}
		m.Data = []byte(text)
	}
	return nil
}

// attributeText returns the canonical string form of an attribute from its JSON form, "" for null.
func attributeText(raw json.RawMessage) (string, error) {
	switch raw[0] {
	case '"':
		if bytes.IndexByte(raw, '\\') < 0 {
			return string(raw[1 : len(raw)-1]), nil
		}
		var s string
		err := json.Unmarshal(raw, &s)
		return s, err
	case 'n':
		return "", nil
	case 't', 'f':
		return string(raw), nil
	case '{', '[':
		return "", fmt.Errorf("%.20s is no string, boolean or integer", bytes.ToValidUTF8(raw, nil))
	default:
		n, err := strconv.ParseInt(string(raw), 10, 32)
		if err != nil {
			return "", fmt.Errorf("%.20s is no integer of 32 bits", raw)
		}
		return strconv.FormatInt(n, 10), nil
	}
}
