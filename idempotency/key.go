package idempotency

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"time"

	"github.com/jackc/pgx/v5/pgtype"

	"github.com/postrider/postrider"
)

// inboxKey is the key of a message's row for one consumer, a UUID of version 8 (RFC 9562, 5.8): 48 bits of the message's
// time in milliseconds, 0 for a message without, and 74 bits of SHA-256 over consumer, source and id. Only attributes
// that every copy of a message has go into it; the time at which a stream stored it, say, is another after a replay.
func inboxKey(consumer string, m *postrider.Message) pgtype.UUID {
	buf := make([]byte, 0, 256)
	buf = append(append(buf, consumer...), 0)
	buf = append(append(buf, m.Source...), 0)
	buf = append(buf, m.ID...)
	sum := sha256.Sum256(buf)

	k := pgtype.UUID{Valid: true}
	b := &k.Bytes
	if !m.Time.IsZero() {
		binary.BigEndian.PutUint64(b[:8], uint64(m.Time.UnixMilli())<<16)
	}
	b[6] = 0x80 | sum[0]&0x0f
	b[7] = sum[1]
	b[8] = 0x80 | sum[2]&0x3f
	copy(b[9:], sum[3:10])
	return k
}

// validTime reports whether a time fits the key: after 1970 and within 48 bits of milliseconds. Times of the first
// millisecond belong to the bucket of messages without a time.
func validTime(t time.Time) bool {
	ms := t.UnixMilli()
	return t.IsZero() || ms > 0 && ms < 1<<48
}

// dayOf returns the UTC day of a message, its partition.
func dayOf(t time.Time) time.Time { return t.UTC().Truncate(24 * time.Hour) }

// lowest returns the lowest key of a day, as text.
func lowest(day time.Time) string {
	var ms [8]byte
	binary.BigEndian.PutUint64(ms[:], uint64(day.UnixMilli())<<16)
	text := hex.EncodeToString(ms[:6])
	return text[:8] + "-" + text[8:] + "-0000-0000-000000000000"
}
