package postridertest

import (
	"io"
	"log/slog"
	"sync"
	"testing"
)

// Logger returns a logger that writes to the test's output, from Debug up. It may be used from any goroutine; what is logged
// after the test's end is dropped, where t.Log would panic.
func Logger(t testing.TB) *slog.Logger {
	out := &output{w: t.Output()}
	t.Cleanup(out.close)
	return slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// output is a test's output while the test lasts.
type output struct {
	mu sync.Mutex
	w  io.Writer // nil: the test has ended
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.w == nil {
		return len(p), nil
	}
	return o.w.Write(p)
}

func (o *output) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.w = nil
}
