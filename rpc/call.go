package rpc

import (
	"context"
	"errors"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/backoff"
	"github.com/postrider/postrider/internal/envelope"
)

// CallOption changes one call.
type CallOption func(*callOptions) error

type callOptions struct {
	timeout    time.Duration
	wait       bool
	attributes []postrider.PublishOption
}

// Timeout bounds the call in place of [ClientConfig.Timeout]. It must be positive.
func Timeout(d time.Duration) CallOption {
	return func(o *callOptions) error {
		if d <= 0 {
			return postrider.Errorf(postrider.InvalidArgument, "rpc.Timeout is %v: want a positive duration", d)
		}
		o.timeout = d
		return nil
	}
}

// WaitForReady lets the call wait, up to its deadline, for an instance of the service and for a connection to NATS. The
// request is sent again, after a backoff, only while it provably met nobody. Without it such a call fails at once.
func WaitForReady() CallOption {
	return func(o *callOptions) error { o.wait = true; return nil }
}

// Attributes sets attributes of the request message: [postrider.IdempotencyKey], [postrider.Key] and so on.
func Attributes(opts ...postrider.PublishOption) CallOption {
	return func(o *callOptions) error { o.attributes = append(o.attributes, opts...); return nil }
}

// opCall begins the Op of every error of [Call].
const opCall = "call "

// Call calls a method and returns its response. It ends with one outcome, at most 5 ms after the deadline, which is the
// earlier one of the time-out and the deadline of ctx. The deadline travels with the request.
//
// The error is a *[postrider.Error], possibly marked by [postrider.Permanent]. One that the handler returned arrives
// with its code, message and details. Of our own making are: Unavailable when nobody serves the method, the connection
// is down or was lost; ResourceExhausted when the server is too busy or a message too large; DeadlineExceeded;
// Canceled; PermissionDenied when NATS permissions refuse the subject; Internal when the answer cannot be read. Its
// field Unprocessed says whether the request provably did not run.
//
// Inside a handler the request is linked to the message being handled by ctx.
func Call[Req, Res any](
	ctx context.Context, c *Client, m *postrider.Method[Req, Res], req *Req, opts ...CallOption,
) (*Res, error) {
	if m == nil {
		return nil, unsent(postrider.Errorf(postrider.InvalidArgument, "rpc: call: the Method is nil"))
	}
	res, err := call(ctx, c, m, req, opts)
	return res, named(opCall+m.Name(), err)
}

// named returns an error with its Op, if it has none. The error may be a variable that others read, from a middleware
// or an option, so that it is changed in a copy.
func named(op string, err error) error {
	var e *postrider.Error
	if !errors.As(err, &e) || e.Op != "" {
		return err
	}
	with := *e
	with.Op = op
	if err == error(e) { //nolint:errorlint // with nothing around it
		return &with
	}
	with.Err = err // and what is around it says about another attempt
	if d, ok := postrider.RetryDelay(err); ok {
		with.RetryAfter = d
	}
	if !postrider.Retryable(err) && postrider.Retryable(&with) {
		return postrider.Permanent(&with)
	}
	return &with
}

func call[Req, Res any](
	ctx context.Context, c *Client, m *postrider.Method[Req, Res], req *Req, opts []CallOption,
) (*Res, error) {
	if c == nil {
		return nil, unsent(postrider.Errorf(postrider.InvalidArgument, "the Client is nil: want what rpc.NewClient returned"))
	}
	o := callOptions{timeout: c.cfg.Timeout}
	for i, opt := range opts {
		if opt == nil {
			return nil, unsent(postrider.Errorf(postrider.InvalidArgument, "option %d is nil", i+1))
		}
		if err := opt(&o); err != nil {
			return nil, unsent(err)
		}
	}
	msg, err := m.Request(ctx, req, o.attributes...)
	if err != nil {
		return nil, unsent(err)
	}
	if msg.Source == "" {
		msg.Source = c.cfg.Source
	}
	if err := msg.Validate(); err != nil {
		return nil, unsent(err)
	}
	expires := time.Now().Add(o.timeout)
	if d, ok := ctx.Deadline(); ok && d.Before(expires) {
		expires = d
	}
	subject := subjectOf(c.cfg.Prefix, m.Name())
	var reply *postrider.Message
	if len(c.cfg.Middleware) == 0 {
		reply, err = c.exchange(ctx, subject, msg, expires, o.wait)
	} else {
		reply, err = c.wrapped(ctx, subject, msg, expires, o.wait)
	}
	if err != nil {
		return nil, err
	}
	res, err := m.Response(reply)
	if err != nil {
		if reply.Extension(postrider.ExtErrorCode) == "" {
			err = unreadable(err)
		}
		return nil, err
	}
	return res, nil
}

// wrapped is exchange with the middleware around it.
func (c *Client) wrapped(ctx context.Context, subject string, msg *postrider.Message, expires time.Time, wait bool) (*postrider.Message, error) {
	send := func(ctx context.Context, msg *postrider.Message) (*postrider.Message, error) {
		return c.exchange(ctx, subject, msg, expires, wait)
	}
	for _, mw := range slices.Backward(c.cfg.Middleware) {
		send = mw(send)
	}
	ctx, cancel := context.WithDeadline(ctx, expires)
	defer cancel()
	reply, err := send(ctx, msg)
	if err == nil && reply == nil {
		err = unreadable(errors.New("a middleware returned neither a reply nor an error"))
	}
	return reply, err
}

// exchange sends the request and returns the reply.
func (c *Client) exchange(ctx context.Context, subject string, msg *postrider.Message, expires time.Time, wait bool) (*postrider.Message, error) {
	event, failed := c.roundTrip(ctx, subject, msg, expires, wait)
	if failed != nil {
		return nil, failed
	}
	reply := &postrider.Message{Extensions: make(postrider.Extensions, 0, 4)}
	if err := envelope.ParseProto(event, reply); err != nil {
		return nil, unreadable(err)
	}
	return reply, nil
}

// unsent says of an error that came before the request was sent that the call did not run.
func unsent(err error) error {
	var e *postrider.Error
	if !errors.As(err, &e) {
		return &postrider.Error{Code: postrider.InvalidArgument, Unprocessed: true, Err: err}
	}
	before := *e // it may be the user's, from an option
	before.Unprocessed = true
	return &before
}

func unreadable(err error) error {
	return postrider.Permanent(&postrider.Error{
		Code: postrider.Internal, Err: err, Msg: "the call ran, but its response cannot be read: " + err.Error(),
	})
}

// readyInitial and readyMax bound the waits of a call that waits for somebody to serve it.
const (
	readyInitial = 10 * time.Millisecond
	readyMax     = 250 * time.Millisecond
)

// roundTrip sends the request until it has an outcome: once, or with wait again while it met nobody.
func (c *Client) roundTrip(ctx context.Context, subject string, msg *postrider.Message, expires time.Time, wait bool) ([]byte, *postrider.Error) {
	for attempt := 1; ; attempt++ {
		event, err := c.send(ctx, subject, msg, expires)
		if err == nil {
			return event, nil
		}
		if !wait || err.Code != postrider.Unavailable || !err.Unprocessed {
			return nil, err
		}
		delay := backoff.Delay(postrider.RetryPolicy{Initial: readyInitial, Max: readyMax}, attempt)
		left := time.Until(expires)
		if left <= 0 {
			return nil, err
		}
		timer := time.NewTimer(min(delay, left))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, &postrider.Error{
				Code: postrider.CodeOf(ctx.Err()), Unprocessed: true, Err: ctx.Err(),
				Msg: "the call's context ended while it waited for the service: " + err.Msg,
			}
		}
		if time.Until(expires) <= 0 {
			return nil, err
		}
	}
}

// formatDeadline returns a remaining time as it stands on the wire: whole milliseconds, rounded up, at most the 24 days
// that fit a CloudEvents integer.
func formatDeadline(left time.Duration) string {
	ms := int64((left + time.Millisecond - 1) / time.Millisecond)
	return strconv.FormatInt(min(ms, math.MaxInt32), 10)
}

func parseDeadline(text string) (time.Duration, error) {
	ms, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		return 0, postrider.Errorf(postrider.InvalidArgument,
			"extension %s is %q: want milliseconds, 0 to %d", postrider.ExtDeadline, text, math.MaxInt32)
	}
	return time.Duration(ms) * time.Millisecond, nil
}
