package kvstore

import (
	"encoding/json"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
)

// The states of an entry.
const (
	open    = "open" // it has an owner, until its time-to-live ends
	done    = "done"
	refused = "refused"
)

// entry is what the bucket has of a key, as JSON, so that "nats kv get" shows it.
type entry struct {
	Key         string `json:"key"`
	State       string `json:"state"`
	Fence       int64  `json:"fence,omitempty"` // none in the message that claims the key: it is that message's sequence
	Owner       string `json:"owner,omitempty"` // who has it, for one that has not heard so
	Request     []byte `json:"request,omitempty"`
	ContentType string `json:"content_type,omitempty"`
	Data        []byte `json:"data,omitempty"`

	sequence uint64 // of its message
}

func (e *entry) exists() bool { return e.State != "" }

func (e *entry) ownedBy(fence int64) bool { return e.State == open && e.Fence == fence }

// message returns the message that makes it the last one of its subject. One without a state is the mark of a deletion.
func (e *entry) message(subject string) (*nats.Msg, error) {
	msg := nats.NewMsg(subject)
	if !e.exists() {
		msg.Header.Set("KV-Operation", "DEL")
		return msg, nil
	}
	var err error
	msg.Data, err = json.Marshal(e)
	return msg, err
}

// parseEntry reads a message of the bucket. Marks of deletions, ours and the server's, are entries that do not exist.
func parseEntry(sequence uint64, header nats.Header, data []byte) (entry, error) {
	gone := entry{sequence: sequence}
	if header.Get("KV-Operation") != "" || header.Get("Nats-Marker-Reason") != "" {
		return gone, nil
	}
	e := entry{}
	err := json.Unmarshal(data, &e)
	if err != nil || e.State != open && e.State != done && e.State != refused || e.Fence < 0 {
		return gone, &postrider.Error{Code: postrider.DataLoss, Msg: "the entry of the key is damaged", Err: err}
	}
	if e.Fence == 0 {
		e.Fence = int64(sequence)
	}
	if e.Request == nil {
		e.Request = []byte{}
	}
	e.sequence = sequence
	return e, nil
}
