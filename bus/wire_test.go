package bus_test

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/internal/wiredoc"
	"github.com/postrider/postrider/postridertest"
)

// checkDocumented publishes the event of docs/wire.md and compares what is stored with what the page says.
func checkDocumented(t *testing.T, b *bus.Bus, nc *nats.Conn, headers string, data []byte) {
	t.Helper()
	m := &postrider.Message{
		ID: "n 1", Type: "notes.written.v1", Subject: "Größe \"100%\"", Time: time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC),
		ContentType: "application/json", Data: []byte(`{"n":1}`),
	}
	for name, value := range map[string]string{"partitionkey": "Euro € 😀", "correlationid": "n 0"} {
		if err := m.SetExtension(name, value); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Publish(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	compareStored(t, stored(t, nc, "NOTES")[0], "notes.written.v1", headers, data)
}

// headersOf reads headers as docs/wire.md quotes them.
func headersOf(text string) map[string]string {
	header := map[string]string{}
	for line := range strings.SplitSeq(text, "\n") {
		key, value, _ := strings.Cut(line, ": ")
		header[key] = value
	}
	return header
}

// compareStored compares a message in a stream with what docs/wire.md says.
func compareStored(t *testing.T, got *jetstream.RawStreamMsg, subject, headers string, data []byte) {
	t.Helper()
	want := headersOf(headers)
	for _, key := range []string{"Nats-Stream", "Nats-Subject", "Nats-Sequence", "Nats-Time-Stamp", "Nats-Num-Pending", "Nats-Last-Sequence"} {
		got.Header.Del(key) // the server tells where it found the message
	}
	for key, values := range got.Header {
		if want[key] != values[0] {
			t.Errorf("header %s is %q, docs/wire.md says %q", key, values[0], want[key])
		}
		delete(want, key)
	}
	if len(want) > 0 {
		t.Errorf("docs/wire.md has headers that are not sent: %v", want)
	}
	if !bytes.Equal(got.Data, data) || got.Subject != subject {
		t.Errorf("subject %s, data\n%s\ndocs/wire.md says\n%s", got.Subject, hex.Dump(got.Data), hex.Dump(data))
	}
}

func TestWireDocumentEvent(t *testing.T) {
	t.Parallel()
	headers, data, _ := strings.Cut(wiredoc.Text(t, "text event"), "\n\n")
	nc := postridertest.NATS(t)
	checkDocumented(t, newBus(t, nc), nc, headers, []byte(data))
}

func TestWireDocumentCompact(t *testing.T) {
	t.Parallel()
	headers, dump, _ := strings.Cut(wiredoc.Text(t, "text compact"), "\n\n")
	var data []byte
	for line := range strings.SplitSeq(dump, "\n") {
		digits, _, _ := strings.Cut(line, "|")
		b, err := hex.DecodeString(strings.ReplaceAll(digits, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		data = append(data, b...)
	}
	nc := postridertest.NATS(t)
	checkDocumented(t, newBus(t, nc, func(c *bus.Config) { c.Mode = bus.Compact }), nc, headers, data)
}

func TestWireDocumentJSON(t *testing.T) {
	t.Parallel()
	headers, data, _ := strings.Cut(wiredoc.Text(t, "text json"), "\n\n")
	nc := postridertest.NATS(t)
	checkDocumented(t, newBus(t, nc, func(c *bus.Config) { c.Mode = bus.JSON }), nc, headers, []byte(data))
}

func TestWireDocumentDelayed(t *testing.T) {
	t.Parallel()
	headers, data, _ := strings.Cut(wiredoc.Text(t, "text delayed"), "\n\n")
	nc := postridertest.NATS(t)
	m := &postrider.Message{
		ID: "n 1", Type: "notes.written.v1", Time: time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC),
		ContentType: "application/json", Data: []byte(`{"n":1}`),
	}
	if err := postrider.At(time.Date(2200, 1, 2, 3, 4, 5, 6000, time.UTC))(m); err != nil {
		t.Fatal(err)
	}
	if err := newBus(t, nc).Publish(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	compareStored(t, stored(t, nc, "SCHEDULES")[0], "sched.at.//test/notes.n%201", headers, []byte(data))
}

func TestWireDocumentError(t *testing.T) {
	t.Parallel()
	err := &postrider.Error{
		Code: postrider.FailedPrecondition, Msg: "only 3 of sku 11 are left", RetryAfter: 250 * time.Millisecond,
		Details: []postrider.Detail{{Type: "shop.v1.Shortage", Value: []byte{3}}},
	}
	if got := string(postrider.AppendError(nil, err)); got != wiredoc.Text(t, "json error") {
		t.Errorf("an error is written as\n%s\ndocs/wire.md says\n%s", got, wiredoc.Text(t, "json error"))
	}
}
