package rpc

import (
	"encoding/binary"
	"fmt"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/envelope"
)

// The compact form is one NATS message without headers: the marker byte, then one frame or several. A frame is the
// number of the call (8 bytes), the size of the event (4 bytes), both big endian, and the event in the CloudEvents
// protobuf format. The number means something to the caller alone; the reply repeats it. docs/wire.md has an example.
const (
	// compactMarker begins no JSON and no other UTF-8 text (0xff occurs in none), and no protobuf message (it would be a
	// tag of wire type 7, which does not exist). 0xfe has the same properties and is left for a second version.
	compactMarker = 0xff

	frameHeader = 8 + 4
)

// appendFrame appends the frame of m.
func appendFrame(dst []byte, call uint64, m *postrider.Message) []byte {
	dst = binary.BigEndian.AppendUint64(dst, call)
	dst = append(dst, 0, 0, 0, 0)
	start := len(dst)
	dst = envelope.AppendProto(dst, m)
	binary.BigEndian.PutUint32(dst[start-4:], uint32(len(dst)-start))
	return dst
}

// cutFrame takes the first frame off b, which stands after the marker. The event aliases b.
func cutFrame(b []byte) (call uint64, event, rest []byte, err error) {
	if len(b) < frameHeader {
		return 0, nil, nil, fmt.Errorf("compact form: a frame has a header of %d bytes, here are %d", frameHeader, len(b))
	}
	call, size := binary.BigEndian.Uint64(b), binary.BigEndian.Uint32(b[8:])
	b = b[frameHeader:]
	if uint64(size) > uint64(len(b)) {
		return 0, nil, nil, fmt.Errorf("compact form: a frame says that its event has %d bytes, here are %d", size, len(b))
	}
	return call, b[:size:size], b[size:], nil
}
