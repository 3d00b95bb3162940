package postridertest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// fakeTB is a test whose end we watch. Its fatal and skip return, unlike the real ones.
type fakeTB struct {
	testing.TB
	outcome, said string
	out           bytes.Buffer
	cleanups      []func()
}

func (f *fakeTB) Helper()           {}
func (f *fakeTB) Cleanup(fn func()) { f.cleanups = append(f.cleanups, fn) }
func (f *fakeTB) Output() io.Writer { return &f.out }

func (f *fakeTB) end(outcome, said string) {
	if f.outcome == "" {
		f.outcome, f.said = outcome, said
	}
}
func (f *fakeTB) Fatal(args ...any) { f.end("fatal", fmt.Sprint(args...)) }
func (f *fakeTB) Fatalf(format string, args ...any) {
	f.end("fatal", fmt.Sprintf(format, args...))
	panic(f)
}
func (f *fakeTB) Skip(args ...any) { f.end("skip", fmt.Sprint(args...)) }

func TestEventually(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		calls := 0
		Eventually(t, func() error {
			if calls++; calls < 10 {
				return errors.New("not yet")
			}
			return nil
		})
		if calls != 10 || time.Since(begin) > time.Second {
			t.Errorf("%d calls in %v, want 10 within a second", calls, time.Since(begin))
		}
	})
}

func TestEventuallyGivesUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		fake := &fakeTB{TB: t}
		func() {
			defer func() { _ = recover() }()
			Eventually(fake, func() error { return errors.New("3 of 10") })
		}()
		if fake.outcome != "fatal" || !strings.Contains(fake.said, "3 of 10") || time.Since(begin) != patience {
			t.Errorf("%s %q after %v, want fatal with the last error after %v", fake.outcome, fake.said, time.Since(begin), patience)
		}
	})
}

func TestLogger(t *testing.T) {
	t.Parallel()
	fake := &fakeTB{TB: t}
	log := Logger(fake)
	log.Debug("during", "n", 1)
	if got := fake.out.String(); !strings.Contains(got, "during") || !strings.Contains(got, "n=1") {
		t.Errorf("output %q", got)
	}

	// A goroutine of the tested service may log while, and after, the test ends.
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 1000 {
			log.Debug("around the end")
		}
	})
	for _, fn := range fake.cleanups {
		fn()
	}
	size := fake.out.Len()
	log.Error("after")
	wg.Wait()
	if fake.out.Len() != size {
		t.Error("something was written after the test's end")
	}
}
