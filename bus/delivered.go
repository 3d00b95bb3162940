package bus

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/envelope"
)

// delivered is a message that the server sent and that is not settled. The subscription's lock guards it, but for what a
// worker reads of a message that it is at work on.
type delivered struct {
	*nats.Msg
	since int64 // when it arrived, Unix nanoseconds
	index int   // in subscription.held

	// Of an ordered subscription only.
	lane     *keyLane    // of its key; nil: it waits for nobody
	attempts int         // failed in its lane, beside those that the server counts
	begun    bool        // a worker is at it
	timer    *time.Timer // until it is tried again in its lane; nil: it is not waiting for that

	behind   *parkedKey // its key is parked, and the message is to go behind the others
	question string     // no message: the releaser asks about a key, and waits for the answer here
	release  *release   // a command to release a key, at work

	format  format
	content string             // its content type
	message *postrider.Message // what it carries; nil: not read yet
	first   postrider.Message  // is message, at first: one allocation less
	isEvent bool               // it is a CloudEvent at all
	err     error              // it cannot be read
}

// newDelivered looks at how a message carries its event, and does not read it yet.
func newDelivered(msg *nats.Msg) *delivered {
	d := &delivered{Msg: msg, index: -1}
	d.format, d.content = formatOf(msg)
	return d
}

// hasUnusual says if a header is there by another case of its name: names have no case in the binding, and have in NATS.
func hasUnusual(h nats.Header, name string) bool {
	for key := range h {
		if len(key) == len(name) && key != name && strings.EqualFold(key, name) {
			return true
		}
	}
	return false
}

// isHeld says that the message is neither settled nor given up.
func (d *delivered) isHeld() bool { return d.index >= 0 }

// hold and release keep a set: the last one takes the place of the one that goes. The lock is held.
func (s *subscription) hold(d *delivered) {
	d.index = len(s.held)
	s.held = append(s.held, d)
	s.holdings.bytes += d.Size()
}

func (s *subscription) release(d *delivered) {
	if !d.isHeld() {
		return
	}
	s.holdings.bytes -= d.Size()
	last := len(s.held) - 1
	s.held[d.index] = s.held[last]
	s.held[d.index].index = d.index
	s.held[last] = nil
	s.held = s.held[:last]
	d.index = -1
}

// read decodes the message, unless it is.
func (d *delivered) read() {
	if d.message == nil {
		d.message = &d.first
		d.isEvent, d.err = decodeAs(d.message, d.Msg, d.format, d.content)
	}
}

// again has the next attempt read the message anew: handlers may have kept what they were given.
func (d *delivered) again() {
	d.attempts++
	d.message = &postrider.Message{}
	d.isEvent, d.err = decodeAs(d.message, d.Msg, d.format, d.content)
}

// key returns the partition key, of a message in structured mode by reading it. What cannot be read has no key, and ends
// in the dead letters; a batch has none either.
func (d *delivered) key() string {
	if d.format == formatBinary {
		if values := d.Header[headerKey]; len(values) > 0 {
			return envelope.Unescape(values[0])
		}
		if !hasUnusual(d.Header, headerKey) {
			return ""
		}
	}
	if d.format == formatNone && d.Header[headerRelease] != nil {
		return unquote(d.Header.Get(headerParkedKey))
	}
	d.read()
	return d.message.Key()
}

// place is what the server says about a delivery in the subject that it is acknowledged on.
type place struct {
	stream   string
	attempt  int    // 1 for the first delivery
	sequence uint64 // in the stream
	consumer uint64 // of all deliveries of the consumer, 1 for the first since it was reset
	stored   time.Time
}

// placeOf parses "$JS.ACK.<stream>.<consumer>.<deliveries>.<stream sequence>.<consumer sequence>.<time>.<pending>", or the
// form with the domain and a hash of the account after "$JS.ACK", and perhaps something at the end (nats-io/nats.go,
// internal/parser). The client library's Metadata does the same and allocates.
func placeOf(reply string) (place, error) {
	var tokens [12]string
	n, rest := 0, reply
	for more := true; more && n < len(tokens); n++ {
		tokens[n], rest, more = strings.Cut(rest, ".")
	}
	t := tokens[2:]
	switch {
	case tokens[0] != "$JS" || tokens[1] != "ACK" || n < 9 || n == 10:
		return place{}, fmt.Errorf("%q is no subject of an acknowledgement", reply)
	case n > 10:
		t = tokens[4:]
	}
	var numbers [4]uint64
	for i := range numbers {
		var err error
		if numbers[i], err = strconv.ParseUint(t[2+i], 10, 63); err != nil {
			return place{}, fmt.Errorf("%q is no subject of an acknowledgement: %w", reply, err)
		}
	}
	return place{
		stream: t[0], attempt: int(numbers[0]), sequence: numbers[1], consumer: numbers[2], stored: time.Unix(0, int64(numbers[3])),
	}, nil
}
