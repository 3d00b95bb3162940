package bus

import (
	"testing"

	"github.com/nats-io/nats.go"
)

// FuzzPlaceOf reads the subjects of acknowledgements as the client library does.
func FuzzPlaceOf(f *testing.F) {
	for _, s := range []string{
		"$JS.ACK.NOTES.group-notes.2.17.3.1700000000000000001.5", "$JS.ACK._.hash.NOTES.group.2.17.3.1700000000000000001.5.x",
		"$JS.ACK.hub.hash.NOTES.group.2.17.3.1700000000000000001.5", "$JS.ACK.NOTES.g.2.17.3.1", "", "$JS.ACK.a.b.1.2.3.4.5.6",
		"$JS.ACK.NOTES.g.-2.17.3.1.5", "$JS.NAK.NOTES.g.2.17.3.1.5",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, reply string) {
		got, err := placeOf(reply)
		if err != nil {
			return // stricter than the client library, which takes no number for 0
		}
		want, err := (&nats.Msg{Reply: reply, Sub: &nats.Subscription{}}).Metadata()
		if err != nil {
			t.Skip(err) // it wants a subscription that is bound
		}
		if got.stream != want.Stream || got.attempt != int(want.NumDelivered) || got.sequence != want.Sequence.Stream ||
			got.consumer != want.Sequence.Consumer || !got.stored.Equal(want.Timestamp) {
			t.Errorf("%s: got %+v, want %+v", reply, got, want)
		}
	})
}

// TestKeyOfUnusualHeaders finds the key of a message where reading it does, whatever the case of the header's names: the lane
// of a key must have all its messages.
func TestKeyOfUnusualHeaders(t *testing.T) {
	t.Parallel()
	for _, prefix := range []string{"ce-", "Ce-", "CE-"} {
		for _, name := range []string{"ce-partitionkey", "Ce-Partitionkey", "CE-PartitionKey"} {
			d := newDelivered(&nats.Msg{Header: nats.Header{
				prefix + "specversion": {"1.0"}, prefix + "id": {"1"}, prefix + "source": {"//test"}, prefix + "type": {"t"}, name: {"k%201"},
			}})
			key := d.key()
			if d.read(); key != "k 1" || d.message.Key() != key || d.err != nil {
				t.Errorf("%sspecversion, %s: the lane's key is %q, the message's %q, %v", prefix, name, key, d.message.Key(), d.err)
			}
		}
	}
}
