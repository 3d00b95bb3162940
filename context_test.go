package postrider_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/postrider/postrider"
)

const (
	parentA = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	parentB = "00-11111111111111111111111111111111-2222222222222222-01"
)

func TestMessagesAreLinkedToTheirCause(t *testing.T) {
	t.Parallel()
	topic := postrider.NewTopic[order]("orders.placed.v1")
	cause := &postrider.Message{ID: "cause"}
	traced := &postrider.Message{ID: "cause", Extensions: postrider.Extensions{
		{Name: "correlationid", Value: "root"}, {Name: "traceparent", Value: parentA}, {Name: "tracestate", Value: "a=1"},
	}}
	for name, tt := range map[string]struct {
		ctx  func(context.Context) context.Context
		opts []postrider.PublishOption
		want string
	}{
		"no cause": {func(ctx context.Context) context.Context { return ctx }, nil, "[]"},
		"first in a chain": {
			func(ctx context.Context) context.Context { return postrider.ContextWithMessage(ctx, cause) }, nil,
			"[{causationid cause} {correlationid cause}]",
		},
		"later in a chain, with a trace": {
			func(ctx context.Context) context.Context { return postrider.ContextWithMessage(ctx, traced) }, nil,
			"[{causationid cause} {correlationid root} {traceparent " + parentA + "} {tracestate a=1}]",
		},
		"a tracer between": {
			func(ctx context.Context) context.Context {
				return postrider.ContextWithTrace(postrider.ContextWithMessage(ctx, traced), parentB, "b=2")
			}, nil,
			"[{causationid cause} {correlationid root} {traceparent " + parentB + "} {tracestate b=2}]",
		},
		"a tracer without state does not keep another's": {
			func(ctx context.Context) context.Context {
				return postrider.ContextWithTrace(postrider.ContextWithMessage(ctx, traced), parentB, "")
			}, nil,
			"[{causationid cause} {correlationid root} {traceparent " + parentB + "}]",
		},
		"an empty trace is none": {
			func(ctx context.Context) context.Context {
				return postrider.ContextWithTrace(postrider.ContextWithMessage(ctx, traced), "", "b=2")
			}, nil,
			"[{causationid cause} {correlationid root} {traceparent " + parentA + "} {tracestate a=1}]",
		},
		"trace only": {
			func(ctx context.Context) context.Context { return postrider.ContextWithTrace(ctx, parentB, "b=2") }, nil,
			"[{traceparent " + parentB + "} {tracestate b=2}]",
		},
		"its own attributes stay": {
			func(ctx context.Context) context.Context {
				return postrider.ContextWithTrace(postrider.ContextWithMessage(ctx, traced), parentA, "a=1")
			},
			[]postrider.PublishOption{
				postrider.WithExtension("correlationid", "mine"), postrider.WithExtension("traceparent", parentB),
			},
			"[{causationid cause} {correlationid mine} {traceparent " + parentB + "}]", // the state belongs to the parent
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m, err := topic.Message(tt.ctx(t.Context()), &order{}, tt.opts...)
			if err != nil || fmt.Sprint(m.Extensions) != tt.want {
				t.Errorf("extensions %v, %v, want %s", m.Extensions, err, tt.want)
			}
		})
	}
}

func TestMessageFromContext(t *testing.T) {
	t.Parallel()
	if m := postrider.MessageFromContext(t.Context()); m != nil {
		t.Errorf("outside a handler there is %v", m)
	}
	m := validMessage()
	h := postrider.RawHandler("a", func(ctx context.Context, got *postrider.Message) error {
		if got != m || postrider.MessageFromContext(ctx) != m {
			t.Error("the handler's context does not know the message")
		}
		return nil
	})
	if _, err := h.Handle(t.Context(), m); err != nil {
		t.Error(err)
	}
}
