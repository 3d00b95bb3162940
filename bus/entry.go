package bus

import (
	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
)

// entry is one message on its way.
type entry struct {
	msg *nats.Msg
	key string // partition key, "" for none
	via string // of a scheduled message: where the server will send it, which is in the same stream
	to  string // of a scheduled message: where it goes in the end, "" if that is via

	err       error // its result, once its call is done
	call      *call // of the caller who waits for it in a group
	abandoned bool  // the caller did not wait for the end: the entry is still in use

	// For the next message, so that it needs no memory of its own.
	own    call
	alone  [1]*entry
	values []string
	data   []byte
}

// isNameless says that the server cannot tell a duplicate of the message.
func (e *entry) isNameless() bool { return len(e.msg.Header[headerMsgID]) == 0 }

// newEntry encodes a message for a subject.
func (b *Bus) newEntry(m *postrider.Message, subject string) *entry {
	e, ok := b.entries.Get().(*entry)
	if !ok {
		e = &entry{msg: &nats.Msg{Header: nats.Header{}}}
	}
	b.encodeTo(e, m, subject)
	e.key = m.Key()
	return e
}

// maxKept bounds the memory that an entry keeps.
const maxKept = 64 << 10

// release gives an entry back when its message is stored.
func (b *Bus) release(e *entry) {
	if e.abandoned {
		return
	}
	clear(e.msg.Header)
	clear(e.values)
	*e.msg = nats.Msg{Header: e.msg.Header}
	*e = entry{msg: e.msg, own: call{done: e.own.done}, values: e.values[:0], data: e.data}
	if cap(e.data) > maxKept {
		e.data = nil
	}
	b.entries.Put(e)
}
