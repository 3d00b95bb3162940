package rpc

import (
	"bytes"
	"encoding/hex"
	"testing"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/wiredoc"
)

// docs/wire.md shows a call byte by byte. What it shows is what is sent, and it is read back.
func TestWireDocument(t *testing.T) {
	t.Parallel()
	example := func(name string) []byte { return wiredoc.Bytes(t, "text "+name) }

	req := &postrider.Message{
		ID: "r-1", Source: "//shop/orders", Type: "stock.v1/Reserve", Time: time.Unix(1_700_000_000, 0),
		ContentType: "application/json", Data: []byte(`{"sku":11}`),
	}
	if err := req.SetExtension(postrider.ExtDeadline, formatDeadline(5*time.Second)); err != nil {
		t.Fatal(err)
	}
	const number = 3<<32 | 17
	if got, want := appendFrame([]byte{compactMarker}, number, req), example("call"); !bytes.Equal(got, want) {
		t.Errorf("request\n%s\ndocs/wire.md has\n%s", hex.Dump(got), hex.Dump(want))
	}
	h := reserve.Handler(echo)
	m := &method{handler: h, service: "stock.v1", name: "Reserve", subject: "rpc.stock.v1.Reserve"}
	calls, err := parse(m, example("call"))
	if err != nil || len(calls) != 1 || calls[0].refused != nil || calls[0].number != number {
		t.Fatalf("the example is read as %+v, %v", calls, err)
	}
	if left := calls[0].expires.Sub(calls[0].arrived); left != 5*time.Second {
		t.Errorf("the example has a deadline of %v", left)
	}

	reply, err := h.Handle(t.Context(), calls[0].request)
	if err != nil {
		t.Fatal(err)
	}
	reply.Source, reply.Time = "//stock.v1", time.Unix(1_700_000_001, 0)
	if got, want := appendFrame([]byte{compactMarker}, number, reply), example("reply"); !bytes.Equal(got, want) {
		t.Errorf("reply\n%s\ndocs/wire.md has\n%s", hex.Dump(got), hex.Dump(want))
	}
}
