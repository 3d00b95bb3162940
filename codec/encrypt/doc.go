// Package encrypt holds a codec that encrypts what another codec writes, with AES-256-GCM.
//
//	keys, err := encrypt.NewRing(key)
//	var CardCharged = postrider.NewTopic[Charge]("cards.charged.v1",
//		postrider.Encoding(encrypt.New(keys, codec.JSON)))
//
// The payload is unreadable on the wire, in the stream, in the outbox and in the dead letters, and nobody without the key can
// make or change one: what was altered, or encrypted with a key that nobody knows, is an error that no retry mends, and the
// message goes to the dead letters. The key's id stands in front of the payload, so that keys rotate while messages of the old
// one are still around. A [KeyProvider] that is away is another matter: its messages are tried again.
//
// A [Ring] holds keys in memory. To rotate: [Ring.Add] the new key in every service, then [Ring.Use] it where it writes, and
// [Ring.Remove] the old one when its last message has expired, dead letters included. One key is good for 2^32 messages, a
// limit of the random nonces (NIST SP 800-38D, section 8.3).
//
// List no plain codec beside it in a contract: what it reads anybody can write. Do so only while a contract moves from plain
// to encrypted payloads.
//
// It is not for attributes: id, source, type, subject and extensions stay readable and unauthenticated, the partition key
// among them. So are error replies. An attacker who can publish can repeat a payload or send it under another type of the
// same keys; who must be kept from publishing is the business of NATS permissions. To make messages smaller as well,
// compress inside: encrypt.New(keys, compress.New(compress.Config{}, codec.JSON)).
package encrypt
