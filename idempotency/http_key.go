package idempotency

import (
	"errors"
	"strings"
)

// maxHeaderKey is how long the key of an HTTP request may be, in bytes.
const maxHeaderKey = 255

// parseKey reads the key of a request from the values of its header: one string of RFC 9651, section 3.3.3, whose parameters
// mean nothing here. Many clients send it without the quotes. The error goes on after the words "The Idempotency-Key".
func parseKey(fields []string) (string, error) {
	switch {
	case len(fields) == 0:
		return "", errors.New(`is needed for this operation: a string such as "8e03978e-40d5-43dd-bc93-6894a57f9324"`)
	case len(fields) > 1:
		return "", errors.New("may be given once only")
	}
	field := strings.Trim(fields[0], " \t")
	var key strings.Builder
	rest, quoted := strings.CutPrefix(field, `"`)
	closed := !quoted
	for i := 0; i < len(rest); i++ {
		c := rest[i]
		switch {
		case c < ' ' || c > '~':
			return "", errors.New("may have printable ASCII characters only")
		case quoted && c == '\\':
			if i++; i == len(rest) || rest[i] != '"' && rest[i] != '\\' {
				return "", errors.New(`has a backslash before something else than " or \`)
			}
			key.WriteByte(rest[i])
			continue
		case quoted && c == '"':
			after := strings.TrimLeft(rest[i+1:], " ")
			if after != "" && after[0] != ';' {
				return "", errors.New("goes on after its closing quote")
			}
			closed = true
			i = len(rest)
			continue
		case !quoted && strings.IndexByte(`",;\ `, c) >= 0:
			return "", errors.New(`must be a string in double quotes`)
		}
		key.WriteByte(c)
	}
	switch {
	case !closed:
		return "", errors.New("has no closing quote")
	case key.Len() == 0:
		return "", errors.New("is empty")
	case key.Len() > maxHeaderKey:
		return "", errors.New("is longer than 255 characters")
	}
	return key.String(), nil
}
