package postrider

import (
	"context"
	"strings"
	"time"

	"github.com/postrider/postrider/codec"
)

// Method is the contract of a call: its name, the types of request and response, and their encoding. One contract has
// three uses: called now (rpc.Call), sent durably as a command through any [Publisher] (Send), or driven by a saga. The
// same [Handler] serves all three. A Method is immutable and safe for concurrent use.
type Method[Req, Res any] struct{ contract }

// NewMethod returns the contract of a call. The name is "service/Method", the service with a version
// ("stock.v1/Reserve"). Req and Res are the structs, no pointers to them. It panics on a malformed name or option.
func NewMethod[Req, Res any](name string, opts ...ContractOption) *Method[Req, Res] {
	service, method, ok := strings.Cut(name, "/")
	if !ok || strings.Contains(method, ".") {
		panic("postrider: method name " + name + `: want "service/Method"`)
	}
	checkName("service", service)
	checkName("method", method)
	_ = newContract(name, new(Res), nil) // the response is no pointer either
	return &Method[Req, Res]{newContract(name, new(Req), opts)}
}

// Name returns "service/Method".
func (m *Method[Req, Res]) Name() string { return m.name }

// Codecs returns the codecs of request and response.
func (m *Method[Req, Res]) Codecs() codec.Set { return m.codecs }

// Request builds the message that carries a request. The error is InvalidArgument: the request is nil or cannot be encoded, or
// an option is wrong.
func (m *Method[Req, Res]) Request(ctx context.Context, req *Req, opts ...PublishOption) (*Message, error) {
	if req == nil {
		return nil, m.nilValue()
	}
	return m.message(ctx, req, opts)
}

// Send sends the request as a durable command: the handler runs once it is delivered, now or later. With [ReplyTo] its
// response, or its refusal, is published to that topic.
func (m *Method[Req, Res]) Send(ctx context.Context, p Publisher, req *Req, opts ...PublishOption) error {
	msg, err := m.Request(ctx, req, opts...)
	if err != nil {
		return err
	}
	return m.send(ctx, p, msg)
}

// Handler makes a handler of fn, which must be safe for concurrent use. An error travels to the caller with its code and
// details; a nil response without an error is the zero one. Handler panics if fn is nil.
func (m *Method[Req, Res]) Handler(fn func(ctx context.Context, req *Req) (*Res, error)) Handler {
	needFunction(m.name, fn == nil)
	return newHandler(m.name, strings.ReplaceAll(m.name, "/", "."), true,
		func(ctx context.Context, msg *Message) (*Message, error) {
			req := new(Req)
			if err := m.decode(msg, req); err != nil {
				return nil, err
			}
			res, err := fn(ctx, req)
			if err != nil {
				return nil, err
			}
			if res == nil {
				res = new(Res)
			}
			// The answer is in the codec of the question where the contract has it.
			cd, err := m.codecs.For(msg.ContentType)
			if err != nil {
				return nil, err
			}
			data, err := cd.Append(nil, res)
			if err != nil {
				return nil, &Error{Code: Internal, Op: "encode response of " + m.name, Err: err}
			}
			reply := newReply(msg)
			reply.ContentType, reply.Data = cd.ContentType(), data
			return reply, nil
		})
}

// Response reads a reply: the response, or the error that the handler returned.
func (m *Method[Req, Res]) Response(reply *Message) (*Res, error) {
	if reply.Extension(ExtErrorCode) != "" {
		return nil, ParseError(reply.Data)
	}
	res := new(Res)
	return res, m.decode(reply, res)
}

// replySuffix makes the type of a reply from that of its request.
const replySuffix = ".reply"

// newReply returns the reply to a request, still without data. It goes to the request's replyto topic, has an id that
// follows from the request's, so that a repeated reply is a duplicate, and keeps key and saga of the request.
func newReply(req *Message) *Message {
	reply := &Message{
		ID: req.ID + replySuffix, Type: req.Type + replySuffix, Time: time.Now(), Topic: req.Extension(ExtReplyTo),
	}
	reply.setExtension(ExtCausationID, req.ID)
	for _, name := range [...]string{
		ExtCorrelationID, ExtTraceParent, ExtTraceState, ExtPartitionKey, ExtSagaID, ExtIdempotencyKey,
	} {
		reply.setExtension(name, req.Extension(name))
	}
	if reply.Extension(ExtCorrelationID) == "" {
		reply.setExtension(ExtCorrelationID, req.ID)
	}
	return reply
}

// ErrorReply returns the reply that tells the sender of req of an error. Transports use it.
func ErrorReply(req *Message, err error) *Message {
	reply := newReply(req)
	reply.ContentType = codec.JSON.ContentType()
	reply.setExtension(ExtErrorCode, CodeOf(err).String())
	reply.Data = AppendError(nil, err)
	return reply
}
