package outbox

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"
)

// relationMessage describes a table of these columns, as pgoutput does.
func relationMessage(schema, name string, columns ...string) []byte {
	b := append([]byte{'R'}, 0, 0, 0, 7)
	b = append(b, schema+"\x00"+name+"\x00d"...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(columns)))
	for _, c := range columns {
		b = append(b, "\x00"+c+"\x00"...)
		b = append(b, make([]byte, 8)...)
	}
	return b
}

// insertMessage is a row, with null for nil.
func insertMessage(table uint32, values ...[]byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte{'I'}, table)
	b = binary.BigEndian.AppendUint16(append(b, 'N'), uint16(len(values)))
	for _, v := range values {
		if v == nil {
			b = append(b, 'n')
			continue
		}
		b = binary.BigEndian.AppendUint32(append(b, 'b'), uint32(len(v)))
		b = append(b, v...)
	}
	return b
}

func word(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// Columns are found by their names, wherever they are, and a column that is not known is passed over.
func TestDecode(t *testing.T) {
	t.Parallel()
	d := &decoder{schema: "shop"}
	table := relationMessage("shop", "postrider_outbox", "data", "xid", "id", "slot", "at", "topic", "attributes")
	row := insertMessage(7, []byte{}, word(5), word(1<<40), []byte{0, 1}, word(1_000_001), []byte("t"), nil)
	if e, err := d.decode(row); err != nil || e.row != nil {
		t.Errorf("a row of an unknown table: %+v, %v", e, err)
	}
	if _, err := d.decode(table); err != nil {
		t.Fatal(err)
	}
	e, err := d.decode(row)
	if err != nil {
		t.Fatal(err)
	}
	if r := e.row; r.xid != 5 || r.id != 1<<40 || !r.at.Equal(time.Date(2000, 1, 1, 0, 0, 1, 1000, time.UTC)) || r.topic != "t" ||
		r.attributes != nil || r.data == nil || len(r.data) != 0 {
		t.Errorf("row %+v", r)
	}
	if _, err := d.decode(relationMessage("shop", "other", "id")); err != nil {
		t.Fatal(err)
	}
	if e, err := d.decode(insertMessage(8, word(1))); err != nil || e.row != nil {
		t.Errorf("a row of another table: %+v, %v", e, err)
	}
	commit := append([]byte{'C', 0}, bytes.Join([][]byte{word(10), word(20), word(30)}, nil)...)
	if e, err := d.decode(commit); err != nil || e.end != 20 {
		t.Errorf("commit %+v, %v", e, err)
	}
	for name, msg := range map[string][]byte{
		"nothing":                     {},
		"an update":                   {'U', 0, 0, 0, 7},
		"a short commit":              commit[:12],
		"a short row":                 row[:len(row)-2],
		"a row of fewer columns":      insertMessage(7, word(1)),
		"a table without its columns": relationMessage("shop", "postrider_outbox", "id"),
	} {
		d := *d
		if e, err := d.decode(msg); err == nil {
			t.Errorf("%s: %+v", name, e)
		}
	}
}

func FuzzDecode(f *testing.F) {
	table := relationMessage("shop", "postrider_outbox", columns[:]...)
	f.Add(table, insertMessage(7, word(1), word(2), word(3), []byte("t"), nil, []byte("d")))
	f.Add(table, append([]byte{'C', 0}, make([]byte, 24)...))
	f.Fuzz(func(t *testing.T, table, msg []byte) {
		d := &decoder{schema: "shop"}
		if _, err := d.decode(table); err != nil {
			return
		}
		if e, err := d.decode(msg); err == nil && e.row != nil && e.end != 0 {
			t.Errorf("both a row and an end: %+v", e)
		}
	})
}
