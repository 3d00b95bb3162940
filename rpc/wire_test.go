package rpc

import (
	"bytes"
	"encoding/hex"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/postrider/postrider"
)

// docs/wire.md shows a call byte by byte. What it shows is what is sent, and it is read back.
func TestWireDocument(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../docs/wire.md")
	if err != nil {
		t.Fatal(err)
	}
	example := func(name string) []byte {
		_, rest, found := strings.Cut(string(text), "\n```text "+name+"\n")
		block, _, ended := strings.Cut(rest, "```")
		if !found || !ended {
			t.Fatalf("docs/wire.md has no example %q", name)
		}
		var data []byte
		for line := range strings.Lines(block) {
			digits, _, _ := strings.Cut(line, "|")
			b, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(digits), " ", ""))
			if err != nil {
				t.Fatalf("example %q, line %q: %v", name, line, err)
			}
			data = append(data, b...)
		}
		return data
	}

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
