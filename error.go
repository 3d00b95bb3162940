package postrider

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"
)

// Error is the one error that crosses package and process borders. Test its class with errors.Is(err, code) and get at
// its fields with errors.As. The zero value is not useful; Code is never OK.
type Error struct {
	// Code is the class.
	Code Code

	// Op is what was being done and to what, for example "call stock.v1/Reserve".
	Op string

	// Msg says what went wrong and, where that is known, what to do. It travels.
	Msg string

	// Details are machine-readable extras, kept over the wire in order.
	Details []Detail

	// RetryAfter is how long the other side asks the caller to wait before it tries again; zero means that it did not say.
	RetryAfter time.Duration

	// Unprocessed says that the request provably did not run, so that repeating it is safe whatever it does. False means
	// that it may have run.
	Unprocessed bool

	// Err is the cause in this process. It does not travel.
	Err error
}

// Detail is one machine-readable part of an [Error], for example a field violation.
type Detail struct {
	// Type names the format of Value, for example "type.googleapis.com/google.rpc.BadRequest".
	Type string `json:"type"`

	// Value is the encoded detail.
	Value []byte `json:"value"`
}

// Errorf returns an *Error with a code and a formatted message. With %w it also wraps.
func Errorf(code Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	cause := errors.Unwrap(err)
	if _, several := err.(interface{ Unwrap() []error }); several {
		cause = err
	}
	return &Error{Code: code, Msg: err.Error(), Err: cause}
}

// Error returns "op: message (CODE)".
func (e *Error) Error() string {
	text := e.text()
	if e.Op != "" {
		text = e.Op + ": " + text
	}
	code := " (" + e.Code.String() + ")"
	if strings.HasSuffix(text, code) { // the cause has said so
		return text
	}
	return text + code
}

func (e *Error) text() string {
	if e.Msg == "" && e.Err != nil {
		return e.Err.Error()
	}
	return e.Msg
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is this error's [Code].
func (e *Error) Is(target error) bool {
	c, ok := target.(Code)
	return ok && c == e.Code
}

// CodeOf returns the class of an error: OK for nil, the code of the outermost [Error] in its chain, Canceled and
// DeadlineExceeded for the context's errors, else Unknown.
func CodeOf(err error) Code {
	if err == nil {
		return OK
	}
	var e *Error
	var c Code
	switch {
	case errors.As(err, &e):
		return e.Code
	case errors.As(err, &c):
		return c
	case errors.Is(err, context.DeadlineExceeded):
		return DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return Canceled
	default:
		return Unknown
	}
}

// Permanent marks an error that no repetition mends: the message goes to the dead letters at once, a saga step counts
// as refused. Permanent(nil) is nil.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &steering{err: err, permanent: true}
}

// Park marks an error after which nothing else of the message's key may be handled until somebody has looked at it. In an
// ordered subscription (bus.Ordered) the message and those of its partition key that follow are kept aside, in their
// order, until they are released; other keys go on. Wherever there is no order to keep, a message without a key included,
// Park is [Permanent]. Park(nil) is nil.
func Park(err error) error {
	if err == nil {
		return nil
	}
	return &steering{err: err, permanent: true, park: true}
}

// Parks reports whether an error asks, by [Park], that its message's key be parked; as in [Retryable] the outermost decides.
func Parks(err error) bool {
	s, _ := verdict(err)
	return s != nil && s.park
}

// RetryAfter marks an error whose next attempt should wait d instead of the policy's backoff. It counts as an attempt.
// RetryAfter(d, nil) is nil.
func RetryAfter(d time.Duration, err error) error {
	if err == nil {
		return nil
	}
	return &steering{err: err, after: max(d, 0)}
}

// steering is what a handler says about the next attempt.
type steering struct {
	err       error
	permanent bool
	park      bool
	after     time.Duration
}

func (s *steering) Error() string { return s.err.Error() }
func (s *steering) Unwrap() error { return s.err }

// Retryable reports whether trying the same thing again may help. [Permanent] and [Park] say no, [RetryAfter] yes; an [Error]
// says it by its code: InvalidArgument, NotFound, AlreadyExists, PermissionDenied, FailedPrecondition, OutOfRange,
// Unimplemented, DataLoss and Unauthenticated are answers, unless it names a wait; everything else is weather. Other
// errors are retried.
//
// The outermost of these decides, since whoever wraps an error knows what it means to what he was doing: an Error that is
// Unavailable is retried though its cause is Permanent. Wrappers such as those of fmt.Errorf say nothing themselves. Of errors
// that are joined, Permanent, Park and RetryAfter come before an Error, and then the first.
func Retryable(err error) bool {
	switch s, e := verdict(err); {
	case s != nil:
		return !s.permanent
	case e != nil:
		return e.RetryAfter > 0 || e.Code.retryable()
	default:
		return err != nil && CodeOf(err).retryable()
	}
}

// RetryDelay returns the wait that an error asks for, through [RetryAfter] or [Error.RetryAfter], the outermost of them. What an
// answer wraps is not asked.
func RetryDelay(err error) (time.Duration, bool) {
	switch s, e := verdict(err); {
	case s != nil && s.permanent:
		return RetryDelay(s.err)
	case s != nil:
		return s.after, true
	case e != nil && e.RetryAfter > 0:
		return e.RetryAfter, true
	case e != nil && e.Code.retryable():
		return RetryDelay(e.Err)
	default:
		return 0, false
	}
}

// verdict returns the outermost of an error's chain that says whether to try again: one of the two, or neither.
func verdict(err error) (*steering, *Error) {
	for err != nil {
		switch x := err.(type) { //nolint:errorlint // it walks the chain itself
		case *steering:
			return x, nil
		case *Error:
			return nil, x
		case interface{ Unwrap() error }:
			err = x.Unwrap()
		case interface{ Unwrap() []error }:
			return firstVerdict(x.Unwrap())
		default:
			err = nil
		}
	}
	return nil, nil
}

// firstVerdict is the verdict on errors that are joined.
func firstVerdict(errs []error) (*steering, *Error) {
	var first *Error
	for _, err := range errs {
		s, e := verdict(err)
		if s != nil {
			return s, nil
		}
		if first == nil {
			first = e
		}
	}
	return nil, first
}

// wireError is the JSON form of an Error, the data of an error reply. See docs/wire.md.
type wireError struct {
	Code         string   `json:"code"`
	Message      string   `json:"message"`
	Details      []Detail `json:"details,omitempty"`
	RetryAfterMs int64    `json:"retry_after_ms,omitempty"`
	Unprocessed  bool     `json:"unprocessed,omitempty"`
	Permanent    bool     `json:"permanent,omitempty"`
}

// AppendError appends the JSON form in which an error, not nil, travels: code, message, details, retry delay (rounded up
// to a millisecond) and the two flags. The cause stays in this process, and so does the stack of a panic.
func AppendError(dst []byte, err error) []byte {
	w := wireError{Code: CodeOf(err).String(), Message: err.Error()}
	var e *Error
	if errors.As(err, &e) {
		w.Message, w.Details, w.Unprocessed = e.text(), e.Details, e.Unprocessed
	}
	var p *panicked
	if errors.As(err, &p) && (e == nil || e.Msg == "") {
		w.Message = p.summary()
	}
	d, waits := RetryDelay(err)
	if waits {
		w.RetryAfterMs = max(1, d.Milliseconds())
		if d > time.Duration(w.RetryAfterMs)*time.Millisecond {
			w.RetryAfterMs++
		}
	}
	w.Permanent = !Retryable(err) && (waits || CodeOf(err).retryable())
	b, jsonErr := json.Marshal(w)
	if jsonErr != nil { // strings, numbers and bytes: cannot happen
		panic(jsonErr)
	}
	return append(dst, b...)
}

// ParseError reads what [AppendError] wrote. Bytes that are not such an error give an Internal error that says so.
func ParseError(data []byte) error {
	var w wireError
	err := json.Unmarshal(data, &w)
	if err == nil && w.Code == "" {
		err = errors.New("it has no code")
	}
	if err != nil {
		return Errorf(Internal, "the other side reported an error that cannot be read: %w", err)
	}
	code, _ := ParseCode(w.Code)
	if code == OK {
		code = Unknown
	}
	const maxMs = math.MaxInt64 / int64(time.Millisecond)
	err = &Error{
		Code: code, Msg: w.Message, Details: w.Details, Unprocessed: w.Unprocessed,
		RetryAfter: time.Duration(min(max(w.RetryAfterMs, 0), maxMs)) * time.Millisecond,
	}
	if w.Permanent {
		err = Permanent(err)
	}
	return err
}
