// Package compress holds a codec that compresses what another codec writes, with zstd, S2 or gzip.
//
//	var ReportMade = postrider.NewTopic[Report]("reports.made.v1",
//		postrider.Encoding(compress.New(compress.Config{}, codec.JSON)))
//
// The contract is all that changes: bus, rpc and outbox carry the smaller payload. A reader takes every algorithm, whatever its
// own Config says, so that the writer's may change at any time. Small payloads, and those that do not become smaller, stay as
// they are inside the frame. A payload that would unpack to more than [Config.MaxBytes] is refused before it takes that memory.
//
// Beside a plain codec, the contract reads what was written before compression came:
//
//	postrider.Encoding(compress.New(compress.Config{}, codec.JSON), codec.JSON)
//
// With codec/encrypt, compress inside: what is encrypted cannot be compressed any more. The sizes of messages then tell
// something about their content; where an attacker can place text of his beside a secret, do not compress.
//
// It is not for data that is compressed already, such as images. A codec is safe for concurrent use; contracts may share
// one, and share its memory then.
package compress
