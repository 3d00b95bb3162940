package bus

import (
	"bytes"
	"strconv"
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
)

// FuzzDecode feeds the reader what a stream may hold: it must not panic, and what it takes for a valid event must come
// back the same after being written.
func FuzzDecode(f *testing.F) {
	f.Add("1.0", "id", "//source", "type", "", "partitionkey", "key", []byte(`{}`))
	f.Add("1.0", "n%201", "%2F%2F", "Gr%C3%B6%C3%9Fe", "", "time", "2026-01-02T03:04:05Z", []byte(nil))
	f.Add("0.3", "", "", "", "", "UPPER", "100%", []byte{0xff})
	f.Add("", "", "", "", "application/cloudevents+protobuf", "x", "", []byte("\n\x01a\x12\x01b\x1a\x031.0\"\x01c2\x01d"))
	f.Add("", "", "", "", "application/cloudevents+json", "x", "", []byte(`{"specversion":"1.0","id":"1","source":"s","type":"t"}`))
	f.Fuzz(func(t *testing.T, spec, id, source, typ, contentType, name, value string, data []byte) {
		in := &nats.Msg{Data: data, Header: nats.Header{
			"ce-id": {id}, "ce-source": {source}, "ce-type": {typ}, "ce-" + name: {value}, "Content-Type": {contentType},
		}}
		if spec != "" {
			in.Header["ce-specversion"] = []string{spec}
		}
		m, isEvent, err := decode(in, "topic")
		if m == nil {
			t.Fatal("no message: handlers and dead letters need one")
		}
		if !isEvent || err != nil || m.Validate() != nil {
			return
		}
		for _, b := range []*Bus{{}, {cfg: Config{Mode: Compact}}, {cfg: Config{Mode: JSON}}} {
			again, _, err := decode(b.encode(m, "topic"), "topic")
			if err != nil {
				t.Fatalf("what was written cannot be read: %v", err)
			}
			if !same(m, again) {
				t.Errorf("read %+v, written and read again %+v", m, again)
			}
		}
	})
}

func same(a, b *postrider.Message) bool {
	if len(a.Extensions) != len(b.Extensions) || !a.Time.Equal(b.Time) || string(a.Data) != string(b.Data) {
		return false
	}
	for i := range a.Extensions {
		if a.Extensions[i] != b.Extensions[i] {
			return false
		}
	}
	return a.ID == b.ID && a.Source == b.Source && a.Type == b.Type && a.Subject == b.Subject &&
		a.ContentType == b.ContentType && a.DataSchema == b.DataSchema
}

// FuzzAck feeds the reader of acknowledgements what an inbox may hold: it must not panic, and it must not take for a success
// what the server calls an error.
func FuzzAck(f *testing.F) {
	f.Add("", []byte(`{"stream":"NOTES","seq":7,"domain":"hub"}`))
	f.Add("", []byte(`{"stream":"NOTES","seq":7,"error":{"code":503,"err_code":10077,"description":"maximum bytes exceeded"}}`))
	f.Add("", []byte(`{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 3"},"stream":"NOTES","seq":0}`))
	f.Add("", []byte(`{"type":"ack","seq":500,"msgs":250}`))
	f.Add("", []byte(`{"type":"err","seq":3,"error":{"code":400,"err_code":10208}}`))
	f.Add("503", []byte(nil))
	f.Add("", []byte(`+OK`))
	f.Fuzz(func(t *testing.T, status string, data []byte) {
		msg := &nats.Msg{Data: data, Header: nats.Header{"Status": {status}}}
		ours, err := parseAck(msg)
		ack, whole, wholeErr := parsePubAck(msg)
		if ack.Error != nil && whole && wholeErr == nil {
			t.Error("an answer with an error is none")
		}
		if bytes.Contains(data, []byte(`"error"`)) && (err == nil) != (wholeErr == nil) {
			t.Errorf("read in short: %v, read as a whole: %v", err, wholeErr)
		}
		if stream := ack.Stream != "" || bytes.HasPrefix(data, []byte(`{"stream":`)); ours && err == nil && !stream {
			t.Error("an answer that names no stream acknowledges nothing")
		}
		batch := &flow{lane: &lane{}, waiter: &waiter{acks: &acks{}, done: make(chan error, 1)}, signal: make(chan struct{}, 1)}
		batch.receive(msg, "1.500.fail."+status+".0.$FI")
		if stored, _ := batch.progress(); stored < 0 {
			t.Errorf("%d messages are stored", stored)
		}
	})
}

// FuzzOwnHeaders feeds the readers of our own headers what anybody may have published to a group, or into the dead letters.
func FuzzOwnHeaders(f *testing.F) {
	f.Add("notes.written.v1", "3", "NOTES", "17", "NOT_FOUND", `"no \"reader\""`, "2026-01-02T03:04:05Z", "application/json", []byte(`{"n":1}`))
	f.Add("a b", "-1", "", "x", "", "plain", "", "application/cloudevents-batch+json", []byte(`[{"specversion":"1.0"},{}]`))
	f.Add("*", "9223372036854775807", ">", "18446744073709551616", "9", `"`, "0", "application/cloudevents-batch+protobuf", []byte("\n\x02\n\x00"))
	f.Fuzz(func(t *testing.T, topic, attempts, stream, sequence, code, cause, at, contentType string, data []byte) {
		msg := &nats.Msg{Subject: "group.tester.notes", Data: data, Header: nats.Header{
			headerTopic: {topic}, headerAttempts: {attempts}, headerStream: {stream}, headerSequence: {sequence}, headerCode: {code},
			headerCause: {cause}, headerTime: {at}, headerRedrives: {attempts}, headerLetter: {sequence}, headerCopyOf: {sequence},
			headerAction: {code}, headerBy: {cause}, headerWhy: {cause}, headerActionTime: {at}, headerCopy: {sequence},
			headerParkedKey: {cause}, headerPayload: {stream}, headerContentType: {contentType},
		}}
		e := parseLogEntry(1, msg)
		if e.Letter.Message == nil {
			t.Error("a letter without a message")
		}
		for name := range e.Letter.Header {
			if strings.HasPrefix(name, headerOwn) {
				t.Errorf("%s is taken for a header of the message", name)
			}
		}
		d := newDelivered(msg)
		_ = d.key()
		delivery := postrider.Delivery{Attempt: 1}
		(&Bus{}).restore(msg, &delivery)
		if delivery.Attempt < 1 {
			t.Errorf("attempt %d", delivery.Attempt)
		}
		if !isAddress(msg.Subject) { // nothing could be published in its name, not even a dead letter
			t.Errorf("subject %q", msg.Subject)
		}
		items, err := splitBatch(msg, d.format)
		for i, item := range items {
			if err != nil || item.Header.Get(headerItem) != strconv.Itoa(i) || item.Subject != msg.Subject {
				t.Errorf("item %d is %+v, %v", i, item, err)
			}
			_ = newDelivered(item).key()
		}
	})
}

// FuzzTopics holds what subjects become in partitions, and which cover which, to what the server does.
func FuzzTopics(f *testing.F) {
	f.Add("orders.>", "orders.placed.v1", "key", 16)
	f.Add("orders.*.v1", "orders.placed.v1.partition.3", "", 1)
	f.Add("*", ">", "Åse", 64)
	f.Fuzz(func(t *testing.T, pattern, subject, key string, n int) {
		n = 1 + max(n, -n)&63
		p := partitionOf(key, n)
		if p < 0 || p >= n {
			t.Fatalf("partition %d of %d", p, n)
		}
		if got := withoutPartition(inPartition(subject, strconv.Itoa(p))); got != subject {
			t.Errorf("%q in partition %d comes back as %q", subject, p, got)
		}
		if !server.IsValidSubject(pattern) || !server.IsValidSubject(subject) {
			return
		}
		if got, want := covers(pattern, subject), server.SubjectsCollide(pattern, subject); got && !want {
			t.Errorf("%q covers %q, and no subject matches both", pattern, subject)
		}
		if isAddress(subject) && covers(pattern, subject) != server.SubjectsCollide(pattern, subject) {
			t.Errorf("%q covers %q: %v", pattern, subject, covers(pattern, subject))
		}
		if all := withTopics([]string{subject}, []string{pattern, subject, pattern}); !covers(all[len(all)-1], pattern) && !covers(all[0], pattern) {
			t.Errorf("%v do not cover %q", all, pattern)
		}
	})
}
