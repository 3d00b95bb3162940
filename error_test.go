package postrider_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/postrider/postrider"
)

// codes are gRPC's, with the numbers of google.rpc.Code.
func codes() map[postrider.Code]string {
	return map[postrider.Code]string{
		0: "OK", 1: "CANCELLED", 2: "UNKNOWN", 3: "INVALID_ARGUMENT", 4: "DEADLINE_EXCEEDED", 5: "NOT_FOUND",
		6: "ALREADY_EXISTS", 7: "PERMISSION_DENIED", 8: "RESOURCE_EXHAUSTED", 9: "FAILED_PRECONDITION", 10: "ABORTED",
		11: "OUT_OF_RANGE", 12: "UNIMPLEMENTED", 13: "INTERNAL", 14: "UNAVAILABLE", 15: "DATA_LOSS", 16: "UNAUTHENTICATED",
	}
}

func TestCodeNames(t *testing.T) {
	t.Parallel()
	for code, name := range codes() {
		if code.String() != name || code.Error() != name {
			t.Errorf("code %d is %q, want %q", uint32(code), code, name)
		}
		if got, ok := postrider.ParseCode(name); !ok || got != code {
			t.Errorf("ParseCode(%q) is %v, %v", name, got, ok)
		}
	}
	if got := postrider.Code(17).String(); got != "CODE_17" {
		t.Errorf("code 17 is %q", got)
	}
	for _, name := range []string{"", "not_found", "CODE_17", "CANCELED"} {
		if got, ok := postrider.ParseCode(name); ok || got != postrider.Unknown {
			t.Errorf("ParseCode(%q) is %v, %v, want Unknown, false", name, got, ok)
		}
	}
}

func TestErrorTravels(t *testing.T) {
	t.Parallel()
	for code := range codes() {
		if code == postrider.OK {
			continue
		}
		sent := &postrider.Error{
			Code: code, Op: "here only", Msg: "kein Platz für <b>€</b> 😀", RetryAfter: 1500 * time.Millisecond, Unprocessed: true,
			Details: []postrider.Detail{{Type: "t2", Value: []byte{0, 255}}, {Type: "t1", Value: []byte("x")}}, Err: io.EOF,
		}
		for name, err := range map[string]error{"plain": sent, "wrapped": fmt.Errorf("around: %w", sent), "permanent": postrider.Permanent(sent)} {
			got := postrider.ParseError(postrider.AppendError(nil, err))
			want := *sent
			want.Op, want.Err = "", nil
			var e *postrider.Error
			if !errors.As(got, &e) || !reflect.DeepEqual(*e, want) {
				t.Errorf("%v %s: arrived as %+v, want %+v", code, name, e, want)
			}
			if !errors.Is(got, code) || postrider.CodeOf(got) != code {
				t.Errorf("%v %s: arrived with code %v", code, name, postrider.CodeOf(got))
			}
			if postrider.Retryable(got) != postrider.Retryable(err) {
				t.Errorf("%v %s: retryable %v here, %v there", code, name, postrider.Retryable(err), postrider.Retryable(got))
			}
			if errors.Is(got, io.EOF) {
				t.Errorf("%v %s: the cause travelled", code, name)
			}
		}
	}
}

// What a handler says about the next attempt holds on the other side, whatever the code.
func TestSteeringTravels(t *testing.T) {
	t.Parallel()
	for code := range codes() {
		if code == postrider.OK {
			continue
		}
		base := postrider.Errorf(code, "base")
		for _, err := range []error{
			base,
			postrider.Permanent(base),
			postrider.RetryAfter(time.Minute, base),
			postrider.RetryAfter(0, base),
			postrider.RetryAfter(time.Microsecond, base),
			postrider.RetryAfter(-time.Second, base),
			postrider.Permanent(postrider.RetryAfter(time.Second, base)),
			postrider.RetryAfter(time.Second, postrider.Permanent(base)),
			postrider.Permanent(&postrider.Error{Code: code, Msg: "base", RetryAfter: time.Second}),
			fmt.Errorf("two: %w, %w", io.EOF, postrider.Permanent(base)),
		} {
			got := postrider.ParseError(postrider.AppendError(nil, err))
			if postrider.Retryable(got) != postrider.Retryable(err) {
				t.Errorf("%T %v: retryable %v here, %v there", err, err, postrider.Retryable(err), postrider.Retryable(got))
			}
			if !postrider.Retryable(err) {
				continue
			}
			here, ok := postrider.RetryDelay(err)
			there, ok2 := postrider.RetryDelay(got)
			if ok != ok2 || there < here || there > here+time.Millisecond {
				t.Errorf("%T %v: delay %v %v here, %v %v there", err, err, here, ok, there, ok2)
			}
		}
	}
}

func TestAppendErrorOfOthers(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		err  error
		want string
	}{
		{io.EOF, `{"code":"UNKNOWN","message":"EOF"}`},
		{context.DeadlineExceeded, `{"code":"DEADLINE_EXCEEDED","message":"context deadline exceeded"}`},
		{fmt.Errorf("call: %w", context.Canceled), `{"code":"CANCELLED","message":"call: context canceled"}`},
		{postrider.NotFound, `{"code":"NOT_FOUND","message":"NOT_FOUND"}`},
		// The code has its own field: it does not stand in the message a second time.
		{&postrider.Error{Code: postrider.NotFound, Op: "read", Err: io.EOF}, `{"code":"NOT_FOUND","message":"EOF"}`},
		{postrider.Permanent(io.EOF), `{"code":"UNKNOWN","message":"EOF","permanent":true}`},
	} {
		if got := string(postrider.AppendError([]byte("x"), tt.err)); got != "x"+tt.want {
			t.Errorf("AppendError(%v) is %s, want x%s", tt.err, got, tt.want)
		}
	}
}

func TestParseErrorRefuses(t *testing.T) {
	t.Parallel()
	for _, data := range []string{"", "{", "null", "[]", "{}", `"NOT_FOUND"`, `{"message":"no code"}`, "\xff"} {
		err := postrider.ParseError([]byte(data))
		if !errors.Is(err, postrider.Internal) || !strings.Contains(err.Error(), "cannot be read") {
			t.Errorf("ParseError(%q): %v, want Internal, cannot be read", data, err)
		}
	}
	// A newer peer's code is an error of an unknown class, never success.
	for _, code := range []string{"NEW_CODE", "OK"} {
		if err := postrider.ParseError([]byte(`{"code":"` + code + `"}`)); !errors.Is(err, postrider.Unknown) {
			t.Errorf("code %s: %v, want Unknown", code, err)
		}
	}
	for _, ms := range []string{"-5", "9223372036854775807", "9300000000000"} {
		err := postrider.ParseError([]byte(`{"code":"UNAVAILABLE","retry_after_ms":` + ms + `}`))
		var e *postrider.Error
		if !errors.As(err, &e) || e.RetryAfter < 0 || (ms[0] != '-' && e.RetryAfter < time.Hour) {
			t.Errorf("retry_after_ms %s: arrived as %+v", ms, e)
		}
	}
}

func FuzzParseError(f *testing.F) {
	f.Add([]byte(`{"code":"NOT_FOUND","message":"m","details":[{"type":"t","value":"AA=="}],"retry_after_ms":5,"permanent":true}`))
	f.Add([]byte(`{"code":"NOT_FOUND","retry_after_ms":9223372036854775807,"unprocessed":true}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		err := postrider.ParseError(data)
		if code := postrider.CodeOf(err); code == postrider.OK || codes()[code] == "" {
			t.Fatalf("%q gives the code %v", data, code)
		}
		again := postrider.ParseError(postrider.AppendError(nil, err))
		if json.Valid(data) && !reflect.DeepEqual(strip(err), strip(again)) {
			t.Fatalf("%q is %#v, and after another trip %#v", data, err, again)
		}
	})
}

// strip is what must survive a trip.
func strip(err error) postrider.Error {
	var e *postrider.Error
	errors.As(err, &e)
	s := *e
	s.Err, s.Details = nil, append([]postrider.Detail(nil), e.Details...)
	for i, d := range s.Details { // JSON knows neither nil nor empty
		s.Details[i].Value = append([]byte{}, d.Value...)
	}
	return s
}

func TestCodeOf(t *testing.T) {
	t.Parallel()
	inner := postrider.Errorf(postrider.NotFound, "inner")
	for _, tt := range []struct {
		err  error
		want postrider.Code
	}{
		{nil, postrider.OK},
		{io.EOF, postrider.Unknown},
		{context.Canceled, postrider.Canceled},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), postrider.DeadlineExceeded},
		{postrider.Aborted, postrider.Aborted},
		{fmt.Errorf("x: %w", postrider.Aborted), postrider.Aborted},
		{inner, postrider.NotFound},
		{&postrider.Error{Code: postrider.Internal, Err: inner}, postrider.Internal},
		{&postrider.Error{Code: postrider.Unavailable, Err: context.Canceled}, postrider.Unavailable},
		{errors.Join(io.EOF, inner), postrider.NotFound},
		{postrider.Permanent(inner), postrider.NotFound},
	} {
		if got := postrider.CodeOf(tt.err); got != tt.want {
			t.Errorf("CodeOf(%v) is %v, want %v", tt.err, got, tt.want)
		}
	}
}

func TestErrorf(t *testing.T) {
	t.Parallel()
	err := postrider.Errorf(postrider.NotFound, "order %s: %w", "o-1", io.EOF)
	if err.Error() != "order o-1: EOF (NOT_FOUND)" || !errors.Is(err, io.EOF) || !errors.Is(err, postrider.NotFound) {
		t.Errorf("got %v, wrapping EOF %v", err, errors.Is(err, io.EOF))
	}
	err = postrider.Errorf(postrider.NotFound, "%w and %w", io.EOF, io.ErrClosedPipe)
	if !errors.Is(err, io.EOF) || !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("%v wraps only one of its two causes", err)
	}
	err.Op = "read"
	if err.Error() != "read: EOF and io: read/write on closed pipe (NOT_FOUND)" {
		t.Errorf("with Op: %v", err)
	}
}

func TestRetryable(t *testing.T) {
	t.Parallel()
	weather := map[postrider.Code]bool{
		postrider.Canceled: true, postrider.Unknown: true, postrider.DeadlineExceeded: true, postrider.ResourceExhausted: true,
		postrider.Aborted: true, postrider.Internal: true, postrider.Unavailable: true,
	}
	for code := range codes() {
		err := postrider.Errorf(code, "x")
		if got := postrider.Retryable(err); got != weather[code] {
			t.Errorf("Retryable(%v) is %v", code, got)
		}
		if postrider.Retryable(fmt.Errorf("wrapped: %w", postrider.Permanent(err))) {
			t.Errorf("Permanent(%v) is retryable", code)
		}
		if !postrider.Retryable(postrider.RetryAfter(time.Second, err)) {
			t.Errorf("RetryAfter(%v) is not retryable", code)
		}
	}
	if postrider.Retryable(nil) || !postrider.Retryable(io.EOF) {
		t.Error("nil is no error, and any other error is retried")
	}
	if postrider.Permanent(nil) != nil || postrider.RetryAfter(time.Second, nil) != nil {
		t.Error("Permanent(nil) and RetryAfter(d, nil) must be nil")
	}
	if err := postrider.Permanent(io.EOF); err.Error() != "EOF" || !errors.Is(err, io.EOF) {
		t.Errorf("Permanent changed the error to %v", err)
	}
}

// Whoever wraps an error says last what is to be done.
func TestOutermostDecides(t *testing.T) {
	t.Parallel()
	const second = time.Second
	final, later := postrider.Permanent(io.EOF), postrider.RetryAfter(second, io.EOF)
	weather, no := postrider.Errorf(postrider.Unavailable, "away"), postrider.Errorf(postrider.NotFound, "no such order")
	around := func(code postrider.Code, err error) error {
		return fmt.Errorf("b: %w", postrider.Errorf(code, "a: %w", err))
	}
	for i, tt := range []struct {
		err       error
		retryable bool
		delay     time.Duration
	}{
		{around(postrider.Unavailable, final), true, 0},
		{around(postrider.Aborted, fmt.Errorf("c: %w", errors.Join(io.EOF, final))), true, 0},
		{around(postrider.NotFound, later), false, 0},
		{around(postrider.Unavailable, later), true, second}, // it has nothing against that wait
		{around(postrider.Unavailable, no), true, 0},
		{around(postrider.NotFound, weather), false, 0},
		{postrider.Permanent(later), false, 0},
		{postrider.RetryAfter(second, final), true, second},
		{postrider.Permanent(around(postrider.Unavailable, later)), false, 0},
		{&postrider.Error{Code: postrider.NotFound, RetryAfter: second, Err: final}, true, second},
		{&postrider.Error{Code: postrider.Unavailable, RetryAfter: second, Err: postrider.RetryAfter(time.Hour, io.EOF)}, true, second},
		{errors.Join(weather, final), false, 0},
		{errors.Join(around(postrider.Unavailable, final), no), true, 0},
		{errors.Join(no, fmt.Errorf("c: %w", later)), true, second},
		{errors.Join(no, weather), false, 0},
		{&postrider.BatchError{Errs: []error{nil, weather, final}}, false, 0},
		{fmt.Errorf("%w", postrider.NotFound), false, 0},
		{around(postrider.Unavailable, postrider.NotFound), true, 0},
	} {
		if got := postrider.Retryable(tt.err); got != tt.retryable {
			t.Errorf("%d: Retryable(%v) is %v", i, tt.err, got)
		}
		if d, ok := postrider.RetryDelay(tt.err); tt.retryable && (d != tt.delay || ok != (d > 0)) {
			t.Errorf("%d: RetryDelay(%v) is %v, %v, want %v", i, tt.err, d, ok, tt.delay)
		}
		there := postrider.ParseError(postrider.AppendError(nil, tt.err))
		if postrider.Retryable(there) != tt.retryable {
			t.Errorf("%d: %v arrives as %v, retryable %v", i, tt.err, there, !tt.retryable)
		}
		if d, _ := postrider.RetryDelay(there); tt.retryable && d != tt.delay {
			t.Errorf("%d: %v arrives with a delay of %v", i, tt.err, d)
		}
	}
	if postrider.Parks(around(postrider.Unavailable, postrider.Park(io.EOF))) || !postrider.Parks(postrider.Park(weather)) {
		t.Error("whether a key is parked is not said by the outermost")
	}
}

func TestPark(t *testing.T) {
	t.Parallel()
	inner := postrider.Errorf(postrider.Unavailable, "no stock")
	parked := fmt.Errorf("reserve: %w", postrider.Park(inner))
	if !postrider.Parks(parked) || postrider.Retryable(parked) || !errors.Is(parked, postrider.Unavailable) {
		t.Errorf("%v: parks %v, retryable %v", parked, postrider.Parks(parked), postrider.Retryable(parked))
	}
	for _, err := range []error{nil, io.EOF, inner, postrider.Permanent(parked), postrider.RetryAfter(time.Second, parked), postrider.Park(nil)} {
		if postrider.Parks(err) {
			t.Errorf("%v parks", err)
		}
	}
}

func TestRetryDelay(t *testing.T) {
	t.Parallel()
	asked := &postrider.Error{Code: postrider.Unavailable, RetryAfter: time.Second}
	for _, tt := range []struct {
		err  error
		want time.Duration
		ok   bool
	}{
		{nil, 0, false},
		{io.EOF, 0, false},
		{asked, time.Second, true},
		{fmt.Errorf("x: %w", asked), time.Second, true},
		{postrider.RetryAfter(time.Minute, asked), time.Minute, true},
		{postrider.RetryAfter(0, asked), 0, true},
		{postrider.RetryAfter(math.MinInt64, asked), 0, true},
	} {
		if got, ok := postrider.RetryDelay(tt.err); got != tt.want || ok != tt.ok {
			t.Errorf("RetryDelay(%v) is %v, %v, want %v, %v", tt.err, got, ok, tt.want, tt.ok)
		}
	}
}
