package bus_test

import (
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

// Messages that the stream never takes, in the middle of a batch, fail alone.
func TestTooLargeForTheStreamInABatch(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b := newBus(t, nc)
	ctx := t.Context()
	if err := noted.Publish(ctx, b, &note{}); err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(ctx, "NOTES")
	if err != nil {
		t.Fatal(err)
	}
	limited := stream.CachedInfo().Config
	limited.MaxMsgSize = 4096
	if _, err := js.UpdateStream(ctx, limited); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{3, 12, 120} {
		for _, large := range [][]int{{1}, {1, 2}, {0}, {n - 1}, {0, n - 1}, {n / 2, n/2 + 1}} {
			is := map[int]bool{}
			for _, i := range large {
				is[i] = true
			}
			msgs := make([]*postrider.Message, n)
			for i := range msgs {
				if msgs[i], err = noted.Message(ctx, &note{N: i}); err != nil {
					t.Fatal(err)
				}
				if is[i] {
					msgs[i].Data = make([]byte, 8000)
				}
			}
			for i, err := range postrider.PublishErrors(b.Publish(ctx, msgs...), n) {
				if is[i] && (postrider.CodeOf(err) != postrider.ResourceExhausted || postrider.Retryable(err)) || !is[i] && err != nil {
					t.Errorf("large %v of %d: message %d: %v", large, n, i, err)
					break
				}
			}
		}
	}
}
