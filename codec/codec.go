package codec

import (
	"errors"
	"fmt"
	"mime"
	"strings"
)

// Codec encodes and decodes the values of one content type. Implementations hold no state and are safe for concurrent
// use.
type Codec interface {
	// ContentType is the media type that the codec writes, for example "application/json". It has no parameters.
	ContentType() string

	// Append appends the encoding of v to dst and returns the extended slice. On an error it returns dst unchanged.
	Append(dst []byte, v any) ([]byte, error)

	// Unmarshal decodes data into v, a non-nil pointer. It does not retain data.
	Unmarshal(data []byte, v any) error
}

// Set is the codecs of one contract. The first encodes; all of them decode, chosen by content type.
type Set []Codec

// Standard returns the set a contract has unless it names another: JSON writes; JSON, bytes and text are read.
func Standard() Set { return Set{JSON, Bytes, Text} }

// For returns the codec for a content type as it stands on a message; parameters and case do not matter, and a
// structured suffix finds its base ("application/vnd.order+json" is JSON). An empty content type means the set's first
// codec, as CloudEvents lets a format imply it. The error names what was offered and what is known.
func (s Set) For(contentType string) (Codec, error) {
	if len(s) == 0 {
		return nil, errors.New("codec: the set is empty: give the contract at least one codec")
	}
	if contentType == "" || contentType == s[0].ContentType() {
		return s[0], nil
	}
	media, _, err := mime.ParseMediaType(contentType)
	if err != nil {
		return nil, fmt.Errorf("codec: content type %q is not a media type: %w", contentType, err)
	}
	for _, c := range s {
		if c.ContentType() == media {
			return c, nil
		}
	}
	if plus := strings.LastIndexByte(media, '+'); plus >= 0 { // RFC 6839: what follows the last "+" is the suffix
		for _, c := range s {
			if c.ContentType() == "application/"+media[plus+1:] {
				return c, nil
			}
		}
	}
	return nil, fmt.Errorf("codec: no codec for content type %q: known are %s", contentType, s)
}

// String lists the content types, first the one that is written.
func (s Set) String() string {
	names := make([]string, len(s))
	for i, c := range s {
		names[i] = c.ContentType()
	}
	return strings.Join(names, ", ")
}
