package rpc

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/codec"
	"github.com/postrider/postrider/internal/envelope"
)

// form is how a request came; its reply goes back in the same form.
type form uint8

const (
	formCompact form = iota // no headers, the marker byte, frames
	formBinary              // CloudEvents binary mode: attributes in ce- headers
	formBare                // anything else: the payload alone, JSON unless Content-Type says otherwise
)

const (
	attributePrefix   = "ce-"
	headerSpecVersion = attributePrefix + "specversion"
	headerContentType = "Content-Type"
)

// inbound is one request on its way through the server.
type inbound struct {
	method  *method
	form    form
	subject string // where the reply goes; empty: nowhere
	number  uint64 // of a compact call
	request *postrider.Message
	arrived time.Time
	expires time.Time // zero: the caller did not say
	refused error     // the request is not one
}

// parseRequest reads the calls of one NATS message and hands each to take. A request that is wrong in itself comes with
// refused set. The error is for bytes that hold no call that could be answered.
func parseRequest(m *method, msg *nats.Msg, arrived time.Time, take func(*inbound)) error {
	switch header := headerNames(msg.Header); {
	case header.binary:
		c := newInbound(m, formBinary, msg.Reply, arrived)
		c.request.Data = msg.Data
		c.accept(readAttributes(c.request, msg.Header))
		take(c)
		return nil
	case len(msg.Data) > 0 && msg.Data[0] == compactMarker && header.contentType == "":
		return parseFrames(m, msg, arrived, take)
	default:
		c := newInbound(m, formBare, msg.Reply, arrived)
		c.accept(readBare(c.request, m, msg.Data, header.contentType))
		take(c)
		return nil
	}
}

func newInbound(m *method, f form, reply string, arrived time.Time) *inbound {
	one := &struct { // one allocation for what every request needs
		inbound    inbound
		message    postrider.Message
		extensions [4]postrider.Extension
	}{
		inbound: inbound{method: m, form: f, subject: reply, arrived: arrived},
		message: postrider.Message{Topic: m.handler.Topic(), Delivery: postrider.Delivery{Attempt: 1}},
	}
	one.message.Extensions = one.extensions[:0]
	one.inbound.request = &one.message
	return &one.inbound
}

func parseFrames(m *method, msg *nats.Msg, arrived time.Time, take func(*inbound)) error {
	for rest := msg.Data[1:]; ; {
		number, event, more, err := cutFrame(rest)
		if err != nil {
			return err
		}
		c := newInbound(m, formCompact, msg.Reply, arrived)
		c.number = number
		c.accept(envelope.ParseProto(event, c.request))
		take(c)
		if rest = more; len(rest) == 0 {
			return nil
		}
	}
}

// accept completes a call whose request was read with the given error: it checks the request and takes its deadline.
func (c *inbound) accept(err error) {
	if err == nil {
		err = c.request.Validate()
	}
	if err == nil && c.request.Type != c.method.handler.Name() {
		err = fmt.Errorf("the request has type %q, this is method %s", c.request.Type, c.method.handler.Name())
	}
	if text := c.request.Extension(postrider.ExtDeadline); err == nil && text != "" {
		var left time.Duration
		if left, err = parseDeadline(text); err == nil {
			c.expires = c.arrived.Add(left)
		}
	}
	if err != nil {
		c.refused = &postrider.Error{Code: postrider.InvalidArgument, Unprocessed: true, Msg: err.Error(), Err: err}
	}
}

// readAttributes reads the attributes of binary mode. Names are taken in any case, since some clients canonicalise them.
func readAttributes(m *postrider.Message, header nats.Header) error {
	for key, values := range header {
		if len(values) == 0 || len(key) <= len(attributePrefix) || !strings.EqualFold(key[:len(attributePrefix)], attributePrefix) {
			continue
		}
		name := strings.ToLower(key[len(attributePrefix):])
		if err := envelope.SetHeader(m, name, envelope.Unescape(values[0])); err != nil {
			return fmt.Errorf("header %s: %w", key, err)
		}
	}
	return nil
}

// readBare makes a request of a payload alone.
func readBare(m *postrider.Message, method *method, data []byte, contentType string) error {
	m.ID, m.Source, m.Type = postrider.NewID(), "//bare", method.handler.Name()
	m.ContentType, m.Data = contentType, data
	if strings.HasPrefix(contentType, "application/cloudevents") {
		return errors.New("calls take no CloudEvents in structured mode: use binary mode, or the payload alone")
	}
	if contentType == "" {
		m.ContentType = codec.JSON.ContentType()
		if len(data) == 0 { // nats req rpc.stock.v1.List ''
			m.Data = []byte("{}")
		}
	}
	return nil
}

type requestHeader struct {
	binary      bool
	contentType string
}

func headerNames(header nats.Header) (h requestHeader) {
	for key, values := range header {
		switch {
		case strings.EqualFold(key, headerSpecVersion):
			h.binary = true
		case strings.EqualFold(key, headerContentType) && len(values) > 0:
			h.contentType = values[0]
		}
	}
	return h
}

// reply sends a reply in the form of the request. One that is larger than NATS takes becomes an error.
func (s *Server) reply(c *inbound, reply *postrider.Message) {
	if c.subject == "" {
		return
	}
	err := s.sendReply(c, reply)
	if errors.As(err, new(*postrider.Error)) {
		c.method.stats.fail(err)
		err = s.sendReply(c, postrider.ErrorReply(c.request, err))
	}
	if err != nil {
		s.cfg.Logger.Warn("rpc: reply not sent", "method", c.method.handler.Name(), "id", c.request.ID, "error", err)
	}
}

// sendReply sends a reply. An *Error says that it is too large.
func (s *Server) sendReply(c *inbound, reply *postrider.Message) error {
	if reply.Source == "" {
		reply.Source = c.method.source
	}
	limit := s.nc.MaxPayload()
	if c.form == formCompact {
		buf := s.buffers.Get().(*[]byte) //nolint:forcetypeassert // the pool holds nothing else
		defer s.buffers.Put(buf)
		*buf = appendFrame(append((*buf)[:0], compactMarker), c.number, reply)
		if int64(len(*buf)) > limit {
			return tooLarge("response", len(*buf), limit, false)
		}
		return s.nc.Publish(c.subject, *buf)
	}
	msg := &nats.Msg{Subject: c.subject, Data: reply.Data}
	if c.form == formBinary {
		msg.Header = make(nats.Header, 8+len(reply.Extensions))
		envelope.Headers(reply, func(name, value string) {
			msg.Header[attributePrefix+name] = []string{envelope.Escape(value)}
		})
	} else if text := reply.Extension(postrider.ExtErrorCode); text != "" {
		code, _ := postrider.ParseCode(text)
		msg.Header = nats.Header{
			micro.ErrorHeader:     {text + ": " + errorText(reply.Data)},
			micro.ErrorCodeHeader: {strconv.Itoa(int(code))},
		}
	}
	if size := msg.Size(); int64(size) > limit {
		return tooLarge("response", size, limit, false)
	}
	return s.nc.PublishMsg(msg)
}

// errorText returns the message of an error in its JSON form, on one line as a header wants it.
func errorText(data []byte) string {
	var e *postrider.Error
	if !errors.As(postrider.ParseError(data), &e) {
		return ""
	}
	line, _, _ := strings.Cut(e.Msg, "\n")
	return line
}
