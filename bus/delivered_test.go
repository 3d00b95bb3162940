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
