package rpc

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/codec"
	"github.com/postrider/postrider/internal/envelope"
	"github.com/postrider/postrider/postridertest"
)

// answerOrRefuse echoes, and refuses number 404.
func answerOrRefuse(ctx context.Context, it *item) (*hold, error) {
	if it.SKU == 404 {
		return nil, &postrider.Error{
			Code: postrider.NotFound, Msg: "no such thing:\n404", Details: []postrider.Detail{{Type: "t", Value: []byte("v")}},
		}
	}
	return echo(ctx, it)
}

func request(t *testing.T, nc *nats.Conn, header nats.Header, data string) *nats.Msg {
	t.Helper()
	msg, err := nc.RequestMsg(&nats.Msg{Subject: "rpc.stock.v1.Reserve", Header: header, Data: []byte(data)}, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	return msg
}

func TestBareForm(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	serve(t, nc, ServerConfig{}, reserve.Handler(answerOrRefuse))

	for _, c := range []struct {
		header nats.Header
		data   string
		want   string
	}{
		{nil, `{"sku":11}`, `{"id":"11"}`},
		{nil, " \n{\"sku\":12,\"note\":\"ż\"}", `{"id":"12ż"}`},
		{nil, ``, `{"id":"0"}`},
		{nats.Header{"content-type": {"application/json; charset=utf-8"}}, `{"sku":13}`, `{"id":"13"}`},
		{nats.Header{"X-Other": {"1"}}, `{"sku":14}`, `{"id":"14"}`},
	} {
		msg := request(t, nc, c.header, c.data)
		if string(msg.Data) != c.want || len(msg.Header) != 0 {
			t.Errorf("%v %q: got %v %q, want %q without headers", c.header, c.data, msg.Header, msg.Data, c.want)
		}
	}

	msg := request(t, nc, nil, `{"sku":404}`)
	if code, text := msg.Header.Get(micro.ErrorCodeHeader), msg.Header.Get(micro.ErrorHeader); code != "5" || text != "NOT_FOUND: no such thing:" {
		t.Errorf("headers %v", msg.Header)
	}
	var e *postrider.Error
	if !errors.As(postrider.ParseError(msg.Data), &e) || e.Code != postrider.NotFound || e.Msg != "no such thing:\n404" || len(e.Details) != 1 {
		t.Errorf("body %s", msg.Data)
	}

	for _, c := range []struct {
		header nats.Header
		data   string
	}{
		{nil, `hello`},
		{nil, `{"sku":"eleven"}`},
		{nil, "\xff"},                           // a marker and nothing more
		{nil, "\xff" + strings.Repeat("x", 40)}, // a size that is not there
		{nats.Header{"Content-Type": {"application/x-unknown"}}, `{}`},
		{nats.Header{"Content-Type": {"application/cloudevents+json"}}, `{"specversion":"1.0"}`},
	} {
		msg := request(t, nc, c.header, c.data)
		if code := msg.Header.Get(micro.ErrorCodeHeader); code != "3" {
			t.Errorf("%v %q: got code %q and %q, want 3", c.header, c.data, code, msg.Data)
		}
	}
}

func TestBareFormText(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	mark := postrider.NewMethod[string, string]("text.v1/Mark", postrider.Encoding(codec.Text))
	serve(t, nc, ServerConfig{}, mark.Handler(func(_ context.Context, s *string) (*string, error) {
		marked := *s + "!"
		return &marked, nil
	}))
	msg, err := nc.RequestMsg(&nats.Msg{
		Subject: "rpc.text.v1.Mark", Header: nats.Header{"Content-Type": {"text/plain"}}, Data: []byte("\xffhey"),
	}, 10*time.Second)
	if err != nil || string(msg.Data) != "\xffhey!" {
		t.Errorf("got %v, %v", msg, err)
	}
}

func TestBinaryForm(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	serve(t, nc, ServerConfig{}, reserve.Handler(answerOrRefuse))
	header := func(change func(nats.Header)) nats.Header {
		h := nats.Header{
			"ce-specversion": {"1.0"}, "Ce-Id": {"a-1"}, "ce-source": {"//test"}, "ce-type": {"stock.v1/Reserve"},
			"ce-datacontenttype": {"application/json"}, "ce-correlationid": {"za%C5%BC%20%25"},
		}
		if change != nil {
			change(h)
		}
		return h
	}
	decode := func(msg *nats.Msg) *postrider.Message {
		m := &postrider.Message{Data: msg.Data}
		if err := readAttributes(m, msg.Header); err != nil {
			t.Fatal(err)
		}
		if err := m.Validate(); err != nil {
			t.Errorf("the reply is no CloudEvent: %v", err)
		}
		return m
	}

	m := decode(request(t, nc, header(nil), `{"sku":11}`))
	res, err := reserve.Response(m)
	if err != nil || res.ID != "11" {
		t.Errorf("response %v, %v", res, err)
	}
	if m.Source != "//stock.v1" || m.Type != "stock.v1/Reserve.reply" || m.Extension(postrider.ExtCausationID) != "a-1" ||
		m.Extension(postrider.ExtCorrelationID) != "zaż %" {
		t.Errorf("reply %+v", m)
	}

	_, err = reserve.Response(decode(request(t, nc, header(nil), `{"sku":404}`)))
	wantError(t, err, postrider.NotFound, false)

	for name, change := range map[string]func(nats.Header){
		"no id":             func(h nats.Header) { delete(h, "Ce-Id") },
		"other type":        func(h nats.Header) { h.Set("ce-type", "stock.v1/Release") },
		"specversion":       func(h nats.Header) { h["ce-specversion"] = []string{"0.3"} },
		"deadline":          func(h nats.Header) { h["ce-deadline"] = []string{"soon"} },
		"negative deadline": func(h nats.Header) { h["ce-deadline"] = []string{"-5"} },
		"long deadline":     func(h nats.Header) { h["ce-deadline"] = []string{"99999999999"} },
		"attribute name":    func(h nats.Header) { h["ce-no_such"] = []string{"1"} },
	} {
		msg := request(t, nc, header(change), `{"sku":11}`)
		_, err := reserve.Response(&postrider.Message{
			Data: msg.Data, Extensions: postrider.Extensions{{Name: postrider.ExtErrorCode, Value: msg.Header.Get("ce-errorcode")}},
		})
		if !errors.Is(err, postrider.InvalidArgument) {
			t.Errorf("%s: error %v, want InvalidArgument", name, err)
		}
	}

	// A deadline that is over does not reach the handler.
	msg := request(t, nc, header(func(h nats.Header) { h["ce-deadline"] = []string{"0"} }), `{"sku":11}`)
	if code := msg.Header.Get("ce-errorcode"); code != "DEADLINE_EXCEEDED" {
		t.Errorf("deadline 0: %q", code)
	}
}

// One NATS message may hold several calls; each is answered.
func TestCompactFormSeveralFrames(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	serve(t, nc, ServerConfig{}, reserve.Handler(answerOrRefuse))
	inbox := nc.NewInbox()
	sub, err := nc.SubscribeSync(inbox)
	if err != nil {
		t.Fatal(err)
	}
	data := []byte{compactMarker}
	for number, body := range []string{`{"sku":1}`, `{"sku":404}`, `{"sku":3}`} {
		data = appendFrame(data, uint64(number), &postrider.Message{
			ID: "x", Source: "//test", Type: "stock.v1/Reserve", Data: []byte(body),
		})
	}
	if err := nc.PublishRequest("rpc.stock.v1.Reserve", inbox, data); err != nil {
		t.Fatal(err)
	}
	got := map[uint64]string{}
	for range 3 {
		msg, err := sub.NextMsg(10 * time.Second)
		if err != nil {
			t.Fatal(err)
		}
		number, event, rest, err := cutFrame(msg.Data[1:])
		if err != nil || msg.Data[0] != compactMarker || len(rest) != 0 {
			t.Fatalf("reply %x: %v", msg.Data, err)
		}
		var m postrider.Message
		if err := envelope.ParseProto(event, &m); err != nil {
			t.Fatal(err)
		}
		got[number] = string(m.Data) + m.Extension(postrider.ExtErrorCode)
	}
	if got[0] != `{"id":"1"}` || !strings.HasSuffix(got[1], "NOT_FOUND") || got[2] != `{"id":"3"}` {
		t.Errorf("replies %v", got)
	}
}

// parse reads the calls of one NATS message without headers.
func parse(m *method, data []byte) (calls []*inbound, err error) {
	err = parseRequest(m, &nats.Msg{Data: data, Reply: "r"}, time.Now(), func(c *inbound) { calls = append(calls, c) })
	return calls, err
}

func FuzzParseRequest(f *testing.F) {
	h := reserve.Handler(echo)
	m := &method{handler: h, service: "stock.v1", name: "Reserve", subject: "rpc.stock.v1.Reserve"}
	good := &postrider.Message{ID: "1", Source: "//fuzz", Type: "stock.v1/Reserve", Data: []byte(`{"sku":1}`)}
	if err := good.SetExtension(postrider.ExtDeadline, 100); err != nil {
		f.Fatal(err)
	}
	one := appendFrame([]byte{compactMarker}, 7, good)
	for _, seed := range [][]byte{nil, {}, {compactMarker}, one, appendFrame(one, 8, good), []byte(`{"sku":1}`), one[:20]} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		calls, err := parse(m, data)
		if len(calls) == 0 && err == nil {
			t.Fatal("neither a call nor an error: the caller would wait for its time-out")
		}
		isCompact := len(data) > 0 && data[0] == compactMarker
		for _, c := range calls {
			if (c.form == formCompact) != isCompact {
				t.Fatalf("form %d of %x", c.form, data)
			}
			if c.refused == nil && c.request.Validate() != nil {
				t.Fatal("an invalid request is not refused")
			}
		}
		if isCompact && json.Valid(data) {
			t.Fatal("JSON was taken for the compact form")
		}
		if !isCompact || err != nil {
			return
		}
		// What was read is written again to the same frames, as far as the numbers and the requests go.
		again := []byte{compactMarker}
		for _, c := range calls {
			if c.refused != nil {
				return
			}
			again = appendFrame(again, c.number, c.request)
		}
		back, err := parse(m, again)
		if err != nil || len(back) != len(calls) {
			t.Fatalf("written again: %d calls, %v, want %d", len(back), err, len(calls))
		}
		for i, c := range back {
			if c.number != calls[i].number || c.refused != nil || string(c.request.Data) != string(calls[i].request.Data) {
				t.Fatalf("written again: call %d is %+v, %v", i, c.request, c.refused)
			}
		}
	})
}
