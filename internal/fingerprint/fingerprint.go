// Package fingerprint tells dead letters of one cause from those of another.
package fingerprint

import (
	"fmt"
	"hash/fnv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/postrider/postrider"
)

// Of is the same for errors of one code whose texts differ in numbers, ids and quoted text only: 16 hexadecimal
// digits of FNV-1a over the code and the normalised text. It is stored, so that a change of it splits groups.
func Of(code postrider.Code, cause string) string {
	h := fnv.New64a()
	_, _ = h.Write([]byte(code.String() + "\x00" + normalise(cause)))
	return fmt.Sprintf("%016x", h.Sum64())
}

// normalise writes "?" for quoted text and "#" for words with a digit in them: numbers, ids, durations, addresses,
// times. Such words that only punctuation joins become one "#", since 10.5, 1:2:3 and 10.0.0.1:4222 are one value each.
func normalise(text string) string {
	var out strings.Builder
	out.Grow(len(text))
	values := "" // punctuation since the last "#", "" if something else came after it
	joined := false
	for previous := ' '; text != ""; {
		r, size := utf8.DecodeRuneInString(text)
		switch {
		case isQuote(r) && (r != '\'' || !isWord(previous)):
			if n := quoted(text); n > 0 {
				out.WriteString(values + "?")
				values, joined = "", false
				previous, text = r, text[n:]
				continue
			}
			out.WriteString(values + string(r))
			values, joined = "", false
		case isWord(r):
			size = strings.IndexFunc(text, func(r rune) bool { return !isWord(r) })
			if size < 0 {
				size = len(text)
			}
			word := text[:size]
			switch {
			case !strings.ContainsFunc(word, unicode.IsDigit):
				out.WriteString(values + word)
				joined = false
			case !joined:
				out.WriteString(values + "#")
				joined = true
			}
			values = ""
		case joined && strings.ContainsRune(".:,/+", r):
			values += string(r) // written only if no value follows
		default:
			out.WriteString(values + string(r))
			values, joined = "", false
		}
		previous, text = r, text[size:]
	}
	return out.String() + values
}

func isWord(r rune) bool { return r == '_' || r == '-' || unicode.IsLetter(r) || unicode.IsDigit(r) }

func isQuote(r rune) bool { return r == '"' || r == '\'' || r == '`' }

// quoted returns how long the quoted text is that s begins with, 0 if the quotation does not end on its line. An
// apostrophe within a word is none.
func quoted(s string) int {
	quote := s[0]
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case c == '\n':
			return 0
		case c == '\\' && quote == '"':
			i++
		case c == quote:
			if next, _ := utf8.DecodeRuneInString(s[i+1:]); quote != '\'' || !isWord(next) {
				return i + 1
			}
		}
	}
	return 0
}
