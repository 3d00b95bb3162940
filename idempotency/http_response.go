package idempotency

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/textproto"
	"slices"
	"strconv"
	"strings"
)

// What is recorded of a response is the response as HTTP/1.1 writes it (RFC 9112), or its status alone.
const (
	wholeResponse = "application/http"
	statusOnly    = "application/http; body=omitted"
)

// recorder is the http.ResponseWriter of a handler. It keeps the response until it is recorded, or until the handler flushes or
// writes too much.
type recorder struct {
	w      http.ResponseWriter
	max    int
	header http.Header // the handler's; w's own has what is around the handler

	status int  // 0 until it is known
	sent   bool // to w: from now on writes go there
	gone   bool // the client is
	large  bool // the body is not kept any more
	body   bytes.Buffer
}

// Header returns the headers that the handler sets.
func (rec *recorder) Header() http.Header { return rec.header }

// WriteHeader keeps the status. Those below 200 are sent at once.
func (rec *recorder) WriteHeader(status int) {
	switch {
	case rec.status != 0:
	case status < 200:
		rec.copyHeader()
		rec.w.WriteHeader(status)
	default:
		rec.status = status
	}
}

// Write keeps p. When the client is gone it still succeeds, since the response is for those who repeat the request.
func (rec *recorder) Write(p []byte) (int, error) {
	rec.WriteHeader(http.StatusOK)
	if rec.status == http.StatusNoContent || rec.status == http.StatusNotModified {
		return 0, http.ErrBodyNotAllowed
	}
	if !rec.large && rec.body.Len()+len(p) > rec.max {
		rec.send()
		rec.large, rec.body = true, bytes.Buffer{}
	}
	if rec.sent {
		rec.pass(p)
	}
	if !rec.large {
		rec.body.Write(p)
	}
	return len(p), nil
}

func (rec *recorder) pass(p []byte) {
	if !rec.gone {
		_, err := rec.w.Write(p)
		rec.gone = err != nil
	}
}

// send begins to pass the response on.
func (rec *recorder) send() {
	if rec.sent {
		return
	}
	rec.sent = true
	rec.copyHeader()
	rec.w.WriteHeader(rec.status)
	if rec.body.Len() > 0 {
		rec.pass(rec.body.Bytes())
	}
}

// finish sends what is left.
func (rec *recorder) finish() {
	rec.send()
	rec.copyHeader() // the trailers; for others it is too late
}

func (rec *recorder) copyHeader() { maps.Copy(rec.w.Header(), rec.header) }

// FlushError sends what there is, as the handler wants.
func (rec *recorder) FlushError() error {
	rec.WriteHeader(http.StatusOK)
	rec.send()
	if rec.gone {
		return nil
	}
	return http.NewResponseController(rec.w).Flush()
}

// Flush implements [http.Flusher].
func (rec *recorder) Flush() { _ = rec.FlushError() }

// Hijack refuses: what goes over the connection then could not be recorded.
func (rec *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return nil, nil, fmt.Errorf("idempotency: a handler of a request with a key: %w", http.ErrNotSupported)
}

// Unwrap lets an [http.ResponseController] set deadlines.
func (rec *recorder) Unwrap() http.ResponseWriter { return rec.w }

// outcome returns what is recorded.
func (rec *recorder) outcome(cookies bool) Outcome {
	contentType, body := wholeResponse, rec.body.Bytes()
	if rec.large {
		contentType, body = statusOnly, nil
	}
	return Outcome{ContentType: contentType, Data: formatResponse(rec.status, recorded(rec.header, cookies), body)}
}

// recorded returns the headers that a repetition gets: not those that are about the connection (RFC 9110, section 7.6.1), the
// length, which follows, and the date, which is another one.
func recorded(h http.Header, cookies bool) http.Header {
	drop := []string{
		"Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authentication-Info", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding",
		"Upgrade", "Content-Length", "Date",
	}
	if !cookies {
		drop = append(drop, "Set-Cookie")
	}
	for _, field := range []string{"Connection", "Trailer"} {
		for _, value := range h.Values(field) {
			for name := range strings.SplitSeq(value, ",") {
				drop = append(drop, http.CanonicalHeaderKey(strings.TrimSpace(name)))
			}
		}
	}
	kept := http.Header{}
	for name, values := range h {
		if !slices.Contains(drop, http.CanonicalHeaderKey(name)) && !strings.HasPrefix(name, http.TrailerPrefix) {
			kept[name] = values
		}
	}
	return kept
}

// formatResponse writes a response as HTTP/1.1 does.
func formatResponse(status int, header http.Header, body []byte) []byte {
	b := &bytes.Buffer{}
	fmt.Fprintf(b, "HTTP/1.1 %03d %s\r\n", status, http.StatusText(status))
	_ = header.Write(b) // to memory
	b.WriteString("\r\n")
	b.Write(body)
	return b.Bytes()
}

// parseResponse reads what formatResponse wrote.
func parseResponse(data []byte) (status int, header http.Header, body []byte, err error) {
	head, body, found := bytes.Cut(data, []byte("\r\n\r\n"))
	if !found {
		return 0, nil, nil, errors.New("no end of the headers")
	}
	line, _, _ := bytes.Cut(head, []byte("\r\n"))
	code, ok := strings.CutPrefix(string(line), "HTTP/1.1 ")
	code, _, _ = strings.Cut(code, " ")
	status, err = strconv.Atoi(code)
	if !ok || len(code) != 3 || err != nil || status < 200 {
		return 0, nil, nil, fmt.Errorf("no status line: %.40q", line)
	}
	fields := data[len(line)+2 : len(head)+4]
	mime, err := textproto.NewReader(bufio.NewReader(bytes.NewReader(fields))).ReadMIMEHeader()
	if err != nil {
		return 0, nil, nil, fmt.Errorf("headers: %w", err)
	}
	return status, http.Header(mime), body, nil
}
