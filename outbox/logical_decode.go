package outbox

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// lsn is a place in the WAL.
type lsn uint64

// streamed is a row as it comes by logical replication.
type streamed struct {
	xid              uint64
	id               int64
	at               time.Time
	topic            string
	attributes, data []byte
}

func (s streamed) size() int { return len(s.attributes) + len(s.data) }

// The columns of the table, by their place in streamed.
var columns = [...]string{"xid", "id", "at", "topic", "attributes", "data"}

// decoder reads the messages of pgoutput, protocol version 1, with values in binary form. See the chapter "Logical
// Replication Message Formats" of PostgreSQL's manual.
type decoder struct {
	schema string
	table  uint32            // its oid, once the server has described it
	places [len(columns)]int // of the columns in a row
	width  int               // columns of a row
}

// event is what a message says: a row, or that all up to end has been said.
type event struct {
	row *streamed
	end lsn
}

// decode reads one message. What it returns does not refer to msg.
func (d *decoder) decode(msg []byte) (event, error) {
	r := &reader{buf: msg}
	switch kind := r.byte(); kind {
	case 'B', 'O', 'Y', 'T': // begin, origin, type, truncate
		return event{}, r.err
	case 'C':
		r.skip(1 + 8) // flags, start of the commit
		end := r.uint64()
		return event{end: lsn(end)}, r.err
	case 'R':
		d.relation(r)
		return event{}, r.err
	case 'I':
		row := d.insert(r)
		return event{row: row}, r.err
	default:
		return event{}, fmt.Errorf("unexpected message %q of logical replication", kind)
	}
}

// relation learns where the columns are. Other tables, which somebody may have added to the publication, are passed over.
func (d *decoder) relation(r *reader) {
	oid, schema, name := r.uint32(), r.text(), r.text()
	if schema != d.schema || name != "postrider_outbox" {
		return
	}
	r.skip(1) // replica identity
	d.table, d.width = 0, int(r.uint16())
	for i := range d.places {
		d.places[i] = -1
	}
	for place := range d.width {
		r.skip(1) // flags
		column := r.text()
		r.skip(4 + 4) // type, type modifier
		for i, c := range columns {
			if c == column {
				d.places[i] = place
			}
		}
	}
	for i, place := range d.places {
		if place < 0 {
			r.fail(fmt.Errorf("the publication has no column %s", columns[i]))
		}
	}
	if r.err == nil {
		d.table = oid
	}
}

// insert reads a row, nil if it is of another table.
func (d *decoder) insert(r *reader) *streamed {
	if oid := r.uint32(); oid != d.table || d.table == 0 {
		return nil
	}
	if kind, width := r.byte(), int(r.uint16()); kind != 'N' || width != d.width {
		r.fail(fmt.Errorf("an insert of kind %q with %d columns, want %d", kind, width, d.width))
		return nil
	}
	values := make([][]byte, d.width)
	for i := range values {
		switch kind := r.byte(); kind {
		case 'n': // null
		case 'b':
			values[i] = r.bytes(int(r.uint32()))
		default:
			r.fail(fmt.Errorf("a value of kind %q, want binary", kind))
			return nil
		}
	}
	var s streamed
	s.xid = r.word(values[d.places[0]])
	s.id = int64(r.word(values[d.places[1]]))
	s.at = pgEpoch.Add(time.Duration(r.word(values[d.places[2]])) * time.Microsecond)
	s.topic = string(values[d.places[3]])
	s.attributes, s.data = clone(values[d.places[4]]), clone(values[d.places[5]])
	return &s
}

// pgEpoch is where PostgreSQL's time begins.
var pgEpoch = time.Date(2000, time.January, 1, 0, 0, 0, 0, time.UTC)

// clone keeps nil apart from empty.
func clone(b []byte) []byte {
	if b == nil {
		return nil
	}
	return append(make([]byte, 0, len(b)), b...)
}

var errShort = errors.New("a message of logical replication is too short")

// reader takes a message apart. After an error it returns zeros.
type reader struct {
	buf []byte
	err error
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.buf, r.err = nil, err
	}
}

func (r *reader) bytes(n int) []byte {
	if n < 0 || n > len(r.buf) {
		r.fail(errShort)
		return nil
	}
	b := r.buf[:n:n]
	r.buf = r.buf[n:]
	return b
}

func (r *reader) skip(n int) { r.bytes(n) }

func (r *reader) byte() byte {
	if b := r.bytes(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) uint16() uint16 {
	if b := r.bytes(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (r *reader) uint32() uint32 {
	if b := r.bytes(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (r *reader) uint64() uint64 { return r.word(r.bytes(8)) }

// word is a value of eight bytes.
func (r *reader) word(b []byte) uint64 {
	if len(b) != 8 {
		r.fail(errShort)
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

// text reads up to a zero byte.
func (r *reader) text() string {
	for i, c := range r.buf {
		if c == 0 {
			s := string(r.buf[:i])
			r.buf = r.buf[i+1:]
			return s
		}
	}
	r.fail(errShort)
	return ""
}
