// Package codec turns values into bytes and back.
//
// A [Codec] is a content type and two functions. A contract ([github.com/postrider/postrider.NewTopic],
// [github.com/postrider/postrider.NewMethod]) holds a [Set] of them: the first one encodes, and whichever fits the
// content type of an arriving message decodes it. What a message says it is decides how it is read; a content type
// that no codec of the set knows is an error that names both sides, never a guess.
//
// [JSON], [Bytes] and [Text] live here and need nothing but the standard library. Protobuf messages are served by
// codec/protocodec; JSON refuses them, because encoding/json writes them in a form no other protobuf reader accepts.
// codec/compress and codec/encrypt wrap the codecs of a contract. A codec's error is final for the message at hand, unless it
// is postrider.Unavailable: then something that the codec needs is away.
//
// A codec has no state and may be used by any number of goroutines. This package is not for envelopes: attributes of a
// message are the business of the transports.
package codec
