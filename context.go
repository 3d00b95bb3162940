package postrider

import "context"

type (
	messageKey struct{}
	traceKey   struct{}
)

// ContextWithMessage returns a context in which m is the message being handled. Transports call it before a handler;
// what the handler publishes, calls or sends then carries m's correlation id, m's id as its causation id, and m's
// trace context.
func ContextWithMessage(ctx context.Context, m *Message) context.Context {
	return context.WithValue(ctx, messageKey{}, m)
}

// MessageFromContext returns the message being handled, or nil outside a handler.
func MessageFromContext(ctx context.Context) *Message {
	m, _ := ctx.Value(messageKey{}).(*Message)
	return m
}

type trace struct{ parent, state string }

// ContextWithTrace returns a context whose messages carry this W3C trace context (the values of the traceparent and
// tracestate headers). It takes precedence over that of the message being handled, so that a tracer can put its own
// span between the two.
func ContextWithTrace(ctx context.Context, traceparent, tracestate string) context.Context {
	return context.WithValue(ctx, traceKey{}, trace{traceparent, tracestate})
}

// link gives m the correlation, causation and trace attributes that ctx implies, unless it has its own.
func (m *Message) link(ctx context.Context) {
	set := func(name, value string) {
		if value != "" && m.Extension(name) == "" {
			m.setExtension(name, value)
		}
	}
	setTrace := func(parent, state string) { // as a pair: the state means nothing beside another parent
		if parent != "" && m.Extension(ExtTraceParent) == "" {
			m.setExtension(ExtTraceParent, parent)
			set(ExtTraceState, state)
		}
	}
	if t, ok := ctx.Value(traceKey{}).(trace); ok {
		setTrace(t.parent, t.state)
	}
	cause := MessageFromContext(ctx)
	if cause == nil {
		return
	}
	set(ExtCausationID, cause.ID)
	if id := cause.Extension(ExtCorrelationID); id != "" {
		set(ExtCorrelationID, id)
	} else {
		set(ExtCorrelationID, cause.ID)
	}
	setTrace(cause.Extension(ExtTraceParent), cause.Extension(ExtTraceState))
}
