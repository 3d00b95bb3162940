package idempotency

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/postrider/postrider"
)

// KeyHeader is the header with the key of a request: a string of RFC 9651 in double quotes. One without quotes is taken for the same.
const KeyHeader = "Idempotency-Key"

// ReplayedHeader is "true" in a response that was recorded before.
const ReplayedHeader = "Idempotent-Replayed"

// HTTPConfig configures [HTTP]. The zero value is ready to use.
type HTTPConfig struct {
	// Required refuses requests without a key, with 400. Else they pass as if there were no middleware.
	Required bool

	// Methods are those that it is for; requests with other methods pass. Default POST and PATCH.
	Methods []string

	// MaxRequest bounds the body of a request with a key, in bytes, for it is read before the handler runs. A larger one is refused
	// with 413. Default 1 MiB.
	MaxRequest int64

	// MaxResponse bounds the body that is recorded, in bytes. Of a larger one only the status is, and a repetition gets 410. Default
	// 256 KiB.
	MaxResponse int

	// Record says by the status of a response if it is an outcome. A response that is not frees the key. Default: all but 401, 408,
	// 425, 429 and those from 500.
	Record func(status int) bool

	// RecordCookies records Set-Cookie too, so that a repetition gets the session that the first response began.
	RecordCookies bool

	// Lease is how long a key stays in use when the process that has it died, at least a second. Default 10 s.
	Lease time.Duration

	// Docs is the address of what you tell your callers about keys, the type of the problem in an error response (RFC 9457). Default none.
	Docs string

	// Logger is told of outcomes that could not be recorded. Nil is silent.
	Logger *slog.Logger
}

func (c HTTPConfig) withDefaults() HTTPConfig {
	if c.Methods == nil {
		c.Methods = []string{http.MethodPost, http.MethodPatch}
	}
	c.MaxRequest = cmp.Or(c.MaxRequest, 1<<20)
	c.MaxResponse = cmp.Or(c.MaxResponse, 256<<10)
	if c.Record == nil {
		c.Record = isOutcome
	}
	c.Lease = cmp.Or(c.Lease, defaultLease)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

func (c HTTPConfig) validate() error {
	switch {
	case c.MaxRequest < 0:
		return postrider.Errorf(postrider.InvalidArgument, "idempotency: HTTPConfig.MaxRequest is %d: want a positive number", c.MaxRequest)
	case c.MaxResponse < 0:
		return postrider.Errorf(postrider.InvalidArgument, "idempotency: HTTPConfig.MaxResponse is %d: want a positive number", c.MaxResponse)
	case c.Lease < minLease:
		return postrider.Errorf(postrider.InvalidArgument, "idempotency: HTTPConfig.Lease is %v: want at least %v", c.Lease, minLease)
	default:
		return nil
	}
}

// isOutcome says if a repetition should get the same response. After the others it may get another one.
func isOutcome(status int) bool {
	switch status {
	case http.StatusUnauthorized, http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests:
		return false
	default:
		return status < 500
	}
}

// HTTP returns a middleware that runs a handler once per Idempotency-Key, as draft-ietf-httpapi-idempotency-key-header-07 has it. The
// response is recorded; a repetition gets the same status, headers and body, with [ReplayedHeader].
//
// A key is one of a caller, a method and a path. caller returns who makes a request, as authentication has found it: no one gets
// what was recorded for another. It must not change between a request and its repetition, as an access token does. Put the middleware
// inside of authentication.
//
//	400  the key is missing but required, or malformed
//	409  a request with this key is being handled; Retry-After says when to ask again
//	410  it was handled, and its response was too large to be recorded
//	413  the request is larger than MaxRequest
//	422  the key was used with another query or body
//	503  the store cannot be reached, before the handler or after it; the same key may be tried again
//
// The handler runs under a lease, as the function of [Do] does, with the same promise: once, unless this process dies, or the store
// is away, between its effect and the record. Its context does not end when the client goes away, so that the effect and its record are
// not torn apart; it ends when the lease is lost. A panic frees the key, and so does a status that [HTTPConfig.Record] does not take.
//
// The response is sent when it is recorded. A handler that flushes, or writes more than MaxResponse, sends at once: then the client may
// have a response that is not recorded. Hop-by-hop headers, Date and trailers are not recorded, and Set-Cookie only on demand. A handler
// cannot take over the connection (Hijack).
func HTTP(r Records, caller func(*http.Request) string, cfg HTTPConfig) (func(http.Handler) http.Handler, error) {
	if r == nil || caller == nil {
		return nil, postrider.Errorf(postrider.InvalidArgument,
			"idempotency: HTTP needs a store and a function that says who the caller is: one caller must not get another's response")
	}
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	return func(next http.Handler) http.Handler {
		return &gate{records: r, caller: caller, cfg: cfg, next: next}
	}, nil
}

// gate is the middleware around one handler.
type gate struct {
	records Records
	caller  func(*http.Request) string
	cfg     HTTPConfig
	next    http.Handler
}

// errNoOutcome frees the key of a response that is not to be recorded.
var errNoOutcome = errors.New("the response is no outcome")

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	fields := r.Header.Values(KeyHeader)
	if !slices.Contains(g.cfg.Methods, r.Method) || len(fields) == 0 && !g.cfg.Required {
		g.next.ServeHTTP(w, r)
		return
	}
	key, err := parseKey(fields)
	if err != nil {
		title := KeyHeader + " is malformed"
		if len(fields) == 0 {
			title = KeyHeader + " is missing"
		}
		g.problem(w, http.StatusBadRequest, title, "The "+KeyHeader+" "+err.Error()+".")
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, g.cfg.MaxRequest))
	if err != nil {
		if _, large := errors.AsType[*http.MaxBytesError](err); large {
			g.problem(w, http.StatusRequestEntityTooLarge, "Request is too large",
				"A request with an "+KeyHeader+" may have "+strconv.FormatInt(g.cfg.MaxRequest, 10)+" bytes.")
		} else {
			g.problem(w, http.StatusBadRequest, "Request was not read", "The body ended too early.")
		}
		return
	}
	t := task{
		records: g.records, op: "idempotency: " + r.Method + " " + r.URL.Path, lease: g.cfg.Lease, detached: true,
		key:     httpKey(g.caller(r), r.Method, r.URL.EscapedPath(), key),
		request: fingerprint([]byte(r.URL.RawQuery), []byte{0}, body),
	}
	rec := &recorder{w: w, max: g.cfg.MaxResponse, header: http.Header{}}
	o, repeated, err := t.do(r.Context(), func(ctx context.Context) (Outcome, error) {
		again := r.WithContext(ctx)
		again.Body, again.ContentLength, again.TransferEncoding = io.NopCloser(bytes.NewReader(body)), int64(len(body)), nil
		g.next.ServeHTTP(rec, again)
		rec.WriteHeader(http.StatusOK) // unless it has
		if !g.cfg.Record(rec.status) {
			return Outcome{}, errNoOutcome
		}
		return rec.outcome(g.cfg.RecordCookies), nil
	})
	switch {
	case err == nil && repeated:
		g.replay(w, o)
	case err == nil, errors.Is(err, errNoOutcome):
		rec.finish()
	default:
		g.fail(r.Context(), rec, err)
	}
}

// httpKey hashes what makes up a key: a caller's name may be a secret and a path may be long.
func httpKey(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		_ = binary.Write(h, binary.BigEndian, int64(len(p))) // a hash takes it
		_, _ = io.WriteString(h, p)
	}
	return "http " + base64.RawURLEncoding.EncodeToString(h.Sum(nil))
}

// replay sends what was recorded.
func (g *gate) replay(w http.ResponseWriter, o Outcome) {
	status, header, body, err := parseResponse(o.Data)
	switch {
	case err != nil:
		g.problem(w, http.StatusInternalServerError, "Response cannot be read", "What was recorded for this key is damaged.")
	case o.ContentType == statusOnly:
		g.problem(w, http.StatusGone, "Response was not kept", "The request was handled before, with status "+strconv.Itoa(status)+
			". Its response was too large to be recorded.")
	default:
		maps.Copy(w.Header(), header)
		w.Header().Set(ReplayedHeader, "true")
		w.WriteHeader(status)
		if len(body) > 0 {
			_, _ = w.Write(body) // the client may be gone
		}
	}
}

// fail answers a request that was not handled, or whose outcome was not recorded.
func (g *gate) fail(ctx context.Context, rec *recorder, err error) {
	if rec.status != 0 {
		g.cfg.Logger.WarnContext(ctx, "idempotency: a request was handled, and its outcome is not recorded", "status", rec.status, "error", err)
	}
	if rec.sent {
		rec.finish()
		return
	}
	if d, ok := postrider.RetryDelay(err); ok || postrider.Retryable(err) {
		rec.w.Header().Set("Retry-After", strconv.Itoa(int(max(d, time.Second)+time.Second-1)/int(time.Second)))
	}
	switch postrider.CodeOf(err) {
	case postrider.Aborted:
		g.problem(rec.w, http.StatusConflict, "A request is outstanding for this "+KeyHeader,
			"A request with the same "+KeyHeader+" is being handled, or was not finished. Repeat it later with the same key.")
	case postrider.AlreadyExists:
		g.problem(rec.w, http.StatusUnprocessableEntity, KeyHeader+" is already used",
			"The "+KeyHeader+" was used for another request. Use a new key for each request.")
	case postrider.Unavailable, postrider.DeadlineExceeded, postrider.Canceled:
		g.problem(rec.w, http.StatusServiceUnavailable, "Keys cannot be checked",
			"The request may have been handled. Repeat it later with the same "+KeyHeader+".")
	default:
		g.cfg.Logger.ErrorContext(ctx, "idempotency: the store refuses", "error", err)
		g.problem(rec.w, http.StatusInternalServerError, "Keys cannot be checked", "The request may have been handled.")
	}
}

// problem sends problem details as of RFC 9457.
func (g *gate) problem(w http.ResponseWriter, status int, title, detail string) {
	body, _ := json.Marshal(struct { //nolint:errchkjson // strings and a number
		Type   string `json:"type,omitempty"`
		Title  string `json:"title"`
		Status int    `json:"status"`
		Detail string `json:"detail"`
	}{g.cfg.Docs, title, status, detail})
	w.Header().Set("Content-Type", "application/problem+json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(body)
}
