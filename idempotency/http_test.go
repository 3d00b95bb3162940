package idempotency

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

// site is a server behind the middleware, whose handler counts its runs.
type site struct {
	*bench
	*httptest.Server

	runs    atomic.Int64
	records Records
}

func (b *bench) site(cfg HTTPConfig, handle http.HandlerFunc) *site {
	b.t.Helper()
	return b.siteOn(b.store(Config{}), cfg, handle)
}

func (b *bench) siteOn(r Records, cfg HTTPConfig, handle http.HandlerFunc) *site {
	b.t.Helper()
	s := &site{bench: b, records: r}
	mw, err := HTTP(r, func(r *http.Request) string { return r.Header.Get("Caller") }, cfg)
	must(b.t, err)
	s.Server = httptest.NewServer(mw(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.runs.Add(1)
		handle(w, r)
	})))
	b.t.Cleanup(s.Close)
	return s
}

// reply is what a client got.
type reply struct {
	status   int
	header   http.Header
	body     string
	replayed bool
}

// post sends a request. Headers are "Name: value".
func (s *site) post(target, body string, headers ...string) (reply, error) {
	s.t.Helper()
	return s.send(s.t.Context(), http.MethodPost, target, body, headers...)
}

func (s *site) send(ctx context.Context, method, target, body string, headers ...string) (reply, error) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(ctx, method, s.URL+target, strings.NewReader(body))
	must(s.t, err)
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Add(name, value)
	}
	res, err := s.Client().Do(req)
	if err != nil {
		return reply{}, err
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	return reply{res.StatusCode, res.Header, string(data), res.Header.Get(ReplayedHeader) == "true"}, err
}

func (s *site) want(r reply, err error, status int, body string, replayed bool) reply {
	s.t.Helper()
	if err != nil || r.status != status || r.body != body || r.replayed != replayed {
		s.t.Fatalf("got %+v, %v; want status %d, body %q, replayed %v", r, err, status, body, replayed)
	}
	return r
}

func (s *site) wantProblem(r reply, err error, status int) reply {
	s.t.Helper()
	var p struct {
		Title, Detail, Type string
		Status              int
	}
	if err != nil || r.status != status || r.header.Get("Content-Type") != "application/problem+json" || r.replayed {
		s.t.Fatalf("got %+v, %v; want a problem %d", r, err, status)
	}
	if err := json.Unmarshal([]byte(r.body), &p); err != nil || p.Status != status || p.Title == "" || p.Detail == "" {
		s.t.Fatalf("problem %s: %v", r.body, err)
	}
	return r
}

func (s *site) wantRuns(n int64) {
	s.t.Helper()
	if got := s.runs.Load(); got != n {
		s.t.Fatalf("the handler ran %d times, want %d", got, n)
	}
}

const key1 = `Idempotency-Key: "k-1"`

func TestHTTPReplaysTheResponse(t *testing.T) {
	t.Parallel()
	var s *site
	s = setup(t).site(HTTPConfig{}, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || r.ContentLength != int64(len(body)) {
			t.Errorf("body of %d bytes, length %d: %v", len(body), r.ContentLength, err)
		}
		h := w.Header()
		h.Set("Location", "/charges/1")
		h["X-Two"] = []string{"one", "two"}
		h.Set("Set-Cookie", "session=secret")
		h.Set("Connection", "X-Hop")
		h.Set("X-Hop", "hop")
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, "%s %d %v", body, s.runs.Load(), FenceFromContext(r.Context()) > 0)
	})
	first, err := s.post("/charges?a=1", "ten", key1)
	s.want(first, err, 201, "ten 1 true", false)
	if first.header.Get("Set-Cookie") == "" {
		t.Error("the first response has no cookie")
	}
	for _, key := range []string{key1, "idempotency-key: k-1", `Idempotency-Key:   "k-1";a=b`} {
		r, err := s.post("/charges?a=1", "ten", key)
		s.want(r, err, 201, "ten 1 true", true)
		for name, want := range map[string]string{"Location": "[/charges/1]", "X-Two": "[one two]", "Set-Cookie": "[]", "X-Hop": "[]"} {
			if got := fmt.Sprint(r.header.Values(name)); got != want {
				t.Errorf("replayed %s is %s, want %s", name, got, want)
			}
		}
		if r.header.Get("Content-Type") != first.header.Get("Content-Type") || len(r.header.Values("Date")) != 1 {
			t.Errorf("replayed headers %v", r.header)
		}
	}
	s.wantRuns(1)

	// Another request with the key; another key, caller, path, method; no key.
	for _, target := range []string{"/charges?a=1", "/charges?a=2", "/charges"} {
		body := "eleven"
		if target != "/charges?a=1" {
			body = "ten"
		}
		r, err := s.post(target, body, key1)
		s.wantProblem(r, err, 422)
	}
	s.wantRuns(1)
	for i, send := range []func() (reply, error){
		func() (reply, error) { return s.post("/charges?a=1", "ten", `Idempotency-Key: "k-2"`) },
		func() (reply, error) { return s.post("/charges?a=1", "ten", key1, "Caller: bob") },
		func() (reply, error) { return s.post("/refunds?a=1", "ten", key1) },
		func() (reply, error) { return s.send(t.Context(), http.MethodPatch, "/charges?a=1", "ten", key1) },
		func() (reply, error) { return s.send(t.Context(), http.MethodPut, "/charges?a=1", "ten", key1) },
		func() (reply, error) { return s.post("/charges?a=1", "ten") },
	} {
		r, err := send()
		s.want(r, err, 201, fmt.Sprintf("ten %d %v", i+2, i < 4), false)
	}
}

func TestHTTPKeepsCookiesOnDemand(t *testing.T) {
	t.Parallel()
	s := setup(t).site(HTTPConfig{RecordCookies: true}, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Set-Cookie", "session=1")
	})
	for i := range 2 {
		r, err := s.post("/", "", key1)
		s.want(r, err, 200, "", i > 0)
		if r.header.Get("Set-Cookie") != "session=1" {
			t.Errorf("response %d has no cookie", i)
		}
	}
}

func TestHTTPRefusesBadKeys(t *testing.T) {
	t.Parallel()
	s := setup(t).site(HTTPConfig{Required: true, MaxRequest: 10, Docs: "https://example.com/keys"}, func(http.ResponseWriter, *http.Request) {})
	r, err := s.post("/", "")
	if r = s.wantProblem(r, err, 400); !strings.Contains(r.body, "missing") || !strings.Contains(r.body, `"type":"https://example.com/keys"`) {
		t.Errorf("problem %s", r.body)
	}
	r, err = s.post("/", "", key1, key1)
	s.wantProblem(r, err, 400)
	r, err = s.post("/", "", `Idempotency-Key: "open`)
	s.wantProblem(r, err, 400)
	r, err = s.post("/", "eleven bytes", key1)
	s.wantProblem(r, err, 413)
	s.wantRuns(0)
	r, err = s.send(t.Context(), http.MethodGet, "/", "")
	s.want(r, err, 200, "", false)

	caller := func(*http.Request) string { return "" }
	for name, test := range map[string]func() error{
		"no store":  func() error { _, err := HTTP(nil, caller, HTTPConfig{}); return err },
		"no caller": func() error { _, err := HTTP(s.records, nil, HTTPConfig{}); return err },
		"request":   func() error { _, err := HTTP(s.records, caller, HTTPConfig{MaxRequest: -1}); return err },
		"response":  func() error { _, err := HTTP(s.records, caller, HTTPConfig{MaxResponse: -1}); return err },
		"lease":     func() error { _, err := HTTP(s.records, caller, HTTPConfig{Lease: time.Millisecond}); return err },
	} {
		if err := test(); !errors.Is(err, postrider.InvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestHTTPWhileTheKeyIsInUse(t *testing.T) {
	t.Parallel()
	running, finish := make(chan struct{}), make(chan struct{})
	s := setup(t).site(HTTPConfig{}, func(w http.ResponseWriter, _ *http.Request) {
		close(running)
		<-finish
		fmt.Fprint(w, "done")
	})
	first := make(chan string)
	go func() {
		r, err := s.post("/", "", key1)
		first <- fmt.Sprint(r.status, r.body, err)
	}()
	<-running
	r, err := s.post("/", "", key1)
	if r = s.wantProblem(r, err, 409); r.header.Get("Retry-After") != "1" {
		t.Errorf("headers %v", r.header)
	}
	r, err = s.post("/", "other", key1)
	s.wantProblem(r, err, 422)
	close(finish)
	if got := <-first; got != "200done<nil>" {
		t.Errorf("the first got %s", got)
	}
	r, err = s.post("/", "", key1)
	s.want(r, err, 200, "done", true)
	s.wantRuns(1)
}

func TestHTTPFreesTheKey(t *testing.T) {
	t.Parallel()
	b := setup(t)
	statuses := b.site(HTTPConfig{}, func(w http.ResponseWriter, r *http.Request) {
		var status int
		fmt.Sscanf(r.URL.Path, "/%d", &status)
		w.WriteHeader(status)
	})
	for status, again := range map[int]bool{
		200: false, 204: false, 303: false, 400: false, 404: false, 409: false, 422: false,
		401: true, 408: true, 425: true, 429: true, 500: true, 503: true,
	} {
		path := fmt.Sprintf("/%d", status)
		statuses.Client().CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		for i := range 2 {
			r, err := statuses.post(path, "", key1)
			statuses.want(r, err, status, "", i > 0 && !again)
		}
	}

	panics := true
	s := b.site(HTTPConfig{}, func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "never seen")
		if panics {
			panic(http.ErrAbortHandler)
		}
	})
	if r, err := s.post("/", "", key1); err == nil {
		t.Fatalf("a panic was answered with %+v", r)
	}
	panics = false
	r, err := s.post("/", "", key1)
	s.want(r, err, 200, "never seen", false)

	all := b.site(HTTPConfig{Record: func(int) bool { return true }}, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusInternalServerError)
	})
	for i := range 2 {
		r, err := all.post("/all", "", key1)
		all.want(r, err, 500, "", i > 0)
	}
}

func TestHTTPStreams(t *testing.T) {
	t.Parallel()
	b := setup(t)
	seen := make(chan struct{})
	s := b.site(HTTPConfig{MaxResponse: 10}, func(w http.ResponseWriter, r *http.Request) {
		c := http.NewResponseController(w)
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Set("Trailer", "X-Sum")
		fmt.Fprint(w, "first,")
		if _, ok := w.(http.Flusher); !ok || c.Flush() != nil {
			t.Error("cannot flush")
		}
		if _, _, err := c.Hijack(); !errors.Is(err, http.ErrNotSupported) {
			t.Errorf("hijacked: %v", err)
		}
		if err := c.SetWriteDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Errorf("no deadline: %v", err)
		}
		<-seen
		fmt.Fprint(w, r.URL.RawQuery)
		w.Header().Set("X-Sum", "7")
	})
	stream := func(query string) (string, http.Header) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL+"/?"+query, http.NoBody)
		must(t, err)
		req.Header.Set(KeyHeader, query)
		res, err := s.Client().Do(req)
		must(t, err)
		defer res.Body.Close()
		head := make([]byte, len("first,"))
		_, err = io.ReadFull(res.Body, head) // while the handler still runs
		must(t, err)
		seen <- struct{}{}
		rest, err := io.ReadAll(res.Body)
		must(t, err)
		return string(head) + string(rest), res.Trailer
	}
	if body, trailer := stream("last"); body != "first,last" || trailer.Get("X-Sum") != "7" {
		t.Fatalf("streamed %q, %v", body, trailer)
	}
	r, err := s.post("/?last", "", "Idempotency-Key: last")
	s.want(r, err, 200, "first,last", true)

	// Too large to be recorded: the first client gets it all, a repetition learns that it was handled.
	long := strings.Repeat("long", 1000)
	if body, _ := stream(long[:200]); body != "first,"+long[:200] {
		t.Fatalf("streamed %q", body)
	}
	r, err = s.post("/?"+long[:200], "", "Idempotency-Key: "+long[:200])
	if r = s.wantProblem(r, err, 410); !strings.Contains(r.body, "status 200") {
		t.Errorf("problem %s", r.body)
	}
	s.wantRuns(2)
	large := b.site(HTTPConfig{}, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, strings.Repeat(long, 100)) })
	r, err = large.post("/large", "", key1)
	large.want(r, err, 200, strings.Repeat(long, 100), false)
	r, err = large.post("/large", "", key1)
	large.wantProblem(r, err, 410)
}

func TestHTTPOutlivesItsClient(t *testing.T) {
	t.Parallel()
	running := make(chan struct{})
	left := make(chan struct{})
	s := setup(t).site(HTTPConfig{}, func(w http.ResponseWriter, r *http.Request) {
		close(running)
		<-left
		if _, err := fmt.Fprint(w, "charged "); err != nil {
			t.Errorf("write: %v", err)
		}
		if err := http.NewResponseController(w).Flush(); err != nil {
			t.Logf("flush: %v", err)
		}
		fmt.Fprint(w, r.Context().Err())
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-running
		cancel()
	}()
	if r, err := s.send(ctx, http.MethodPost, "/", "", key1); err == nil {
		t.Fatalf("got %+v", r)
	}
	close(left)
	postridertest.Eventually(t, func() error {
		r, err := s.post("/", "", key1)
		must(t, err)
		if r.status == 409 {
			return errors.New("it still runs")
		}
		s.want(r, err, 200, "charged <nil>", true)
		return nil
	})
	s.wantRuns(1)
}

func TestHTTPWithoutItsStore(t *testing.T) {
	t.Parallel()
	b := setup(t)
	store, proxy := b.proxied()
	s := b.siteOn(store, HTTPConfig{}, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/stolen" {
			b.exec(`update effects.postrider_request set fence = fence + 1, until = now() where state = 0`)
		} else {
			proxy.Cut()
		}
		fmt.Fprint(w, "done")
	})
	r, err := s.post("/", "", key1)
	s.want(r, err, 200, "done", false)
	r, err = s.post("/", "", key1)
	s.want(r, err, 200, "done", true)

	r, err = s.post("/stolen", "", key1) // the response is not that of the record
	s.wantProblem(r, err, 409)
	must(t, proxy.Close())
	r, err = s.post("/", "", key1)
	if r = s.wantProblem(r, err, 503); r.header.Get("Retry-After") == "" {
		t.Errorf("headers %v", r.header)
	}
	s.wantRuns(2)
}

func TestHTTPDamagedRecord(t *testing.T) {
	t.Parallel()
	s := setup(t).site(HTTPConfig{}, func(http.ResponseWriter, *http.Request) {})
	r, err := s.post("/", "", key1)
	s.want(r, err, 200, "", false)
	s.exec(`update effects.postrider_request set reply = 'HTTP/9'`)
	r, err = s.post("/", "", key1)
	s.wantProblem(r, err, 500)
}

func TestParseKey(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("k", 255)
	for field, want := range map[string]string{
		`"k"`: "k", `k`: "k", ` "k" `: "k", `"a b"`: "a b", `"a\"b\\c"`: `a"b\c`, `"k";a=1`: "k", `"k" ; b`: "k", `"a,b"`: "a,b",
		`8e03978e-40d5-43dd-bc93-6894a57f9324`: "8e03978e-40d5-43dd-bc93-6894a57f9324", long: long, `"` + long + `"`: long,
		``: "", `""`: "", `"k`: "", `k"`: "", `"k"x`: "", `"\k"`: "", `"k\`: "", `a b`: "", `a,b`: "", `"ü"`: "", "\"a\tb\"": "", `k;a`: "",
		`"a", "b"`: "", long + "k": "",
	} {
		if got, err := parseKey([]string{field}); got != want || (err == nil) != (want != "") {
			t.Errorf("parseKey(%s) is %q, %v, want %q", field, got, err, want)
		}
	}
}

func FuzzParseKey(f *testing.F) {
	f.Add(`"a\"b";c=1`)
	f.Add(`8e03978e-40d5`)
	f.Fuzz(func(t *testing.T, field string) {
		key, err := parseKey([]string{field})
		if (key == "") != (err != nil) || len(key) > maxHeaderKey {
			t.Fatalf("%q: %q, %v", field, key, err)
		}
		if err != nil {
			return
		}
		quoted := `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(key) + `"`
		if again, err := parseKey([]string{quoted}); err != nil || again != key {
			t.Fatalf("%q: %q, and as a string %q, %v", field, key, again, err)
		}
	})
}

func FuzzParseResponse(f *testing.F) {
	f.Add(formatResponse(201, http.Header{"Location": {"/1"}, "X": {"a", "b"}}, []byte("body\r\n\r\n")))
	f.Add([]byte("HTTP/1.1 200 OK\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 200\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		status, header, body, err := parseResponse(data)
		if err != nil {
			return
		}
		if status < 200 || status > 999 {
			t.Fatalf("status %d", status)
		}
		status2, header2, body2, err := parseResponse(formatResponse(status, header, body))
		if err != nil || status2 != status || !bytes.Equal(body2, body) || len(header2) > len(header) {
			t.Fatalf("%q: %d %v %q, again %d %v %q, %v", data, status, header, body, status2, header2, body2, err)
		}
	})
}
