package harness

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"syscall"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Serve is the role of the servers, once they run: it says where, and waits until nobody needs them.
func Serve(addresses []string, in io.Reader, out io.Writer) error {
	err := json.NewEncoder(out).Encode(addresses)
	_, _ = io.Copy(io.Discard, in)
	return err
}

// Work is the role of a worker: it does the jobs that come in until there are no more.
func Work(ctx context.Context, in io.Reader, out io.Writer, do func(context.Context, Job) (Result, error)) error {
	for d, e := json.NewDecoder(in), json.NewEncoder(out); ; {
		var j Job
		if err := d.Decode(&j); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := e.Encode(attempt(ctx, j, do)); err != nil {
			return err
		}
	}
}

// StreamName returns the name of a job's stream, which no other had. nats-server removes a deleted stream's files later; if
// those of one of the same name before it are still there then, it leaves them (filestore.go, Delete: a rename to a name that is
// taken), and the next one begins with old messages, or fails with noStore.
func StreamName() string { return fmt.Sprintf("BENCH_%d", time.Now().UnixNano()) }

// noStore is the code of the server's error "error creating store for stream", which says nothing about the peer.
const noStore jetstream.ErrorCode = 10049

// attempt does a job, and once more, on a new stream, if the server had no store for its stream.
func attempt(ctx context.Context, j Job, do func(context.Context, Job) (Result, error)) Result {
	ctx, cancel := context.WithTimeout(ctx, jobTimeout*3/4)
	defer cancel()
	for again := ""; ; {
		r, err := do(ctx, j)
		var refused *jetstream.APIError
		if again == "" && errors.As(err, &refused) && refused.ErrorCode == noStore {
			again = err.Error()
			continue
		}
		if r.Again = again; err != nil {
			r.Err = err.Error()
		}
		return r
	}
}

// Meter measures what the process spends.
type Meter struct {
	profile *os.File
	mallocs uint64
	cpu     time.Duration
	began   time.Time
}

// StartMeter collects garbage and begins to measure.
func StartMeter(j Job) (*Meter, error) {
	var m Meter
	if j.Profile != "" {
		if err := os.MkdirAll(filepath.Dir(j.Profile), 0o750); err != nil {
			return nil, err
		}
		var err error
		if m.profile, err = os.Create(j.Profile); err != nil {
			return nil, err
		}
		if err := pprof.StartCPUProfile(m.profile); err != nil {
			return nil, err
		}
	}
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	m.mallocs, m.cpu, m.began = stats.Mallocs, cpuTime(), time.Now()
	return &m, nil
}

// Stop fills in what n messages cost; the rate is left to the caller where the time of all is not the time to divide by.
func (m *Meter) Stop(n int64) (Result, error) {
	elapsed, cpu := time.Since(m.began), cpuTime()-m.cpu
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	var err error
	if m.profile != nil {
		pprof.StopCPUProfile()
		err = m.profile.Close()
	}
	if n == 0 {
		return Result{}, errors.Join(err, errors.New("nothing was done in time"))
	}
	return Result{
		Messages: n,
		Rate:     float64(n) / elapsed.Seconds(),
		Allocs:   float64(stats.Mallocs-m.mallocs) / float64(n),
		CPU:      cpu / time.Duration(n),
	}, err
}

// cpuTime is the time that this process has spent, in its own code and in the kernel.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
