package postrider_test

import (
	"context"
	"errors"
	"reflect"
	"testing"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/codec"
)

type reserve struct{ SKU, Quantity int }

type hold struct{ ID string }

func TestMethodRequestAndReply(t *testing.T) {
	t.Parallel()
	method := postrider.NewMethod[reserve, hold]("stock.v1/Reserve")
	h := method.Handler(func(_ context.Context, r *reserve) (*hold, error) {
		if r.Quantity > 10 {
			return nil, &postrider.Error{
				Code: postrider.FailedPrecondition, Msg: "only 10 left", Details: []postrider.Detail{{Type: "left", Value: []byte("10")}},
			}
		}
		return &hold{ID: "h-1"}, nil
	})
	if h.Name() != "stock.v1/Reserve" || h.Topic() != "stock.v1.Reserve" || !h.IsCall() {
		t.Errorf("name %q, topic %q, call %v", h.Name(), h.Topic(), h.IsCall())
	}

	req, err := method.Request(t.Context(), &reserve{11, 2}, postrider.ReplyTo("saga.replies"), postrider.Key("11"),
		postrider.WithExtension(postrider.ExtSagaID, "s-1"), postrider.IdempotencyKey("s-1/reserve/do"),
		postrider.WithExtension(postrider.ExtTraceParent, parentA))
	if err != nil {
		t.Fatal(err)
	}
	reply, err := h.Handle(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	checkReply(t, req, reply)
	if res, err := method.Response(reply); err != nil || res.ID != "h-1" {
		t.Errorf("response %+v, %v", res, err)
	}
	again, err := h.Handle(t.Context(), req)
	if err != nil || again.ID != reply.ID {
		t.Errorf("the reply to the same request has the id %q first and %q then: it must be a duplicate", reply.ID, again.ID)
	}

	req, err = method.Request(t.Context(), &reserve{11, 99}, postrider.ReplyTo("saga.replies"))
	if err != nil {
		t.Fatal(err)
	}
	_, refusal := h.Handle(t.Context(), req)
	if !errors.Is(refusal, postrider.FailedPrecondition) {
		t.Fatalf("got %v, want FailedPrecondition", refusal)
	}
	reply = postrider.ErrorReply(req, refusal)
	checkReply(t, req, reply)
	res, err := method.Response(reply)
	var e *postrider.Error
	if res != nil || !errors.As(err, &e) || e.Code != postrider.FailedPrecondition || e.Msg != "only 10 left" || len(e.Details) != 1 {
		t.Errorf("response %v, error %+v", res, e)
	}
}

func checkReply(t *testing.T, req, reply *postrider.Message) {
	t.Helper()
	if reply.Topic != "saga.replies" || reply.Address() != "saga.replies" || reply.Type != "stock.v1/Reserve.reply" {
		t.Errorf("the reply goes to %q as %q", reply.Address(), reply.Type)
	}
	for name, want := range map[string]string{
		postrider.ExtCausationID: req.ID, postrider.ExtCorrelationID: req.ID, postrider.ExtSagaID: req.Extension(postrider.ExtSagaID),
		postrider.ExtPartitionKey: req.Key(), postrider.ExtIdempotencyKey: req.Extension(postrider.ExtIdempotencyKey),
		postrider.ExtTraceParent: req.Extension(postrider.ExtTraceParent), postrider.ExtReplyTo: "",
	} {
		if got := reply.Extension(name); got != want {
			t.Errorf("the reply's %s is %q, want %q", name, got, want)
		}
	}
	reply.Source = "//shop"
	if err := reply.Validate(); err != nil {
		t.Error(err)
	}
}

func TestReplyKeepsCorrelation(t *testing.T) {
	t.Parallel()
	req := &postrider.Message{
		ID: "r-1", Type: "stock.v1/Reserve", Extensions: postrider.Extensions{{Name: postrider.ExtCorrelationID, Value: "root"}},
	}
	if got := postrider.ErrorReply(req, postrider.NotFound).Extension(postrider.ExtCorrelationID); got != "root" {
		t.Errorf("correlation id %q, want root", got)
	}
}

func TestReplyIsInTheCodecOfTheRequest(t *testing.T) {
	t.Parallel()
	echo := postrider.NewMethod[string, string]("echo.v1/Echo")
	h := echo.Handler(func(_ context.Context, s *string) (*string, error) { return s, nil })
	for contentType, data := range map[string]string{"application/json": `"hi"`, "text/plain; charset=utf-8": "hi", "": `"hi"`} {
		reply, err := h.Handle(t.Context(), &postrider.Message{ID: "1", Type: echo.Name(), ContentType: contentType, Data: []byte(data)})
		if err != nil || string(reply.Data) != data {
			t.Errorf("%q: reply %+v, %v", contentType, reply, err)
			continue
		}
		if res, err := echo.Response(reply); err != nil || *res != "hi" {
			t.Errorf("%q: response %v, %v", contentType, res, err)
		}
	}
	if !reflect.DeepEqual(echo.Codecs(), codec.Standard()) {
		t.Errorf("codecs %v", echo.Codecs())
	}
}

func TestMethodErrors(t *testing.T) {
	t.Parallel()
	method := postrider.NewMethod[reserve, func()]("stock.v1/Broken")
	h := method.Handler(func(context.Context, *reserve) (*func(), error) { return new(func()), nil })
	req, err := method.Request(t.Context(), &reserve{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Handle(t.Context(), req); !errors.Is(err, postrider.Internal) {
		t.Errorf("a response that cannot be encoded: %v, want Internal", err)
	}
	req.Data = []byte("{")
	if _, err := h.Handle(t.Context(), req); !errors.Is(err, postrider.InvalidArgument) || postrider.Retryable(err) {
		t.Errorf("a request that cannot be decoded: %v, want a permanent InvalidArgument", err)
	}
	reply := &postrider.Message{ID: "1", ContentType: "application/json", Data: []byte("{")}
	if _, err := postrider.NewMethod[reserve, hold]("stock.v1/Reserve").Response(reply); err == nil {
		t.Error("a reply that cannot be decoded is no error")
	}
}

func TestSend(t *testing.T) {
	t.Parallel()
	method := postrider.NewMethod[reserve, hold]("stock.v1/Reserve")
	var out sink
	if err := method.Send(t.Context(), &out, &reserve{11, 2}, postrider.ReplyTo("replies")); err != nil {
		t.Fatal(err)
	}
	if m := out[0]; m.Address() != "stock.v1.Reserve" || m.Extension(postrider.ExtReplyTo) != "replies" || string(m.Data) != `{"SKU":11,"Quantity":2}` {
		t.Errorf("sent %+v", m)
	}
	if err := method.Send(t.Context(), &out, &reserve{}, postrider.ReplyTo("a\nb")); err == nil || len(out) != 1 {
		t.Errorf("a bad option: %v", err)
	}
}
