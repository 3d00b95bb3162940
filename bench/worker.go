package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"runtime/pprof"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider/bench/internal/harness"
)

// work is the role of a worker: one peer, which does the jobs that come in, until there are no more.
func work(ctx context.Context, name, url string, in io.Reader, out io.Writer) error {
	i := slices.IndexFunc(allPeers(), func(p peer) bool { return p.name == name })
	if i < 0 {
		return fmt.Errorf("there is no peer %q", name)
	}
	nc, err := nats.Connect(url)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	w := worker{peer: allPeers()[i], url: url, js: js}
	return harness.Answer(in, out, func(j job) result {
		r, err := w.do(ctx, j)
		if err != nil {
			r.Err = err.Error()
		}
		return r
	})
}

type worker struct {
	peer peer
	url  string
	js   jetstream.JetStream
}

// do does one job on a new stream, which is deleted afterwards.
func (w worker) do(ctx context.Context, j job) (_ result, err error) {
	ctx, cancel := context.WithTimeout(ctx, jobTimeout*3/4)
	defer cancel()
	cells := namedCells()
	i := slices.IndexFunc(cells, func(c cell) bool { return c.String() == j.Cell })
	if i < 0 {
		return result{}, fmt.Errorf("there is no cell %q", j.Cell)
	}
	c := cells[i]
	stream, err := createStream(ctx, w.js)
	if err != nil {
		return result{}, err
	}
	defer func() { err = errors.Join(err, w.js.DeleteStream(context.WithoutCancel(ctx), streamName)) }()
	s, err := w.peer.open(ctx, site{url: w.url, keyed: c.kind == keyed})
	if err != nil {
		return result{}, fmt.Errorf("open: %w", err)
	}
	defer s.close()
	run := &cellRun{cell: c, job: j, session: s, stream: stream, tally: newTally(j.Size)}
	switch c.kind {
	case publishing, batching:
		return run.publish(ctx)
	case endToEnd:
		return run.endToEnd(ctx)
	case latency:
		return run.latency(ctx)
	default:
		return run.drain(ctx)
	}
}

// meter measures what the process spends.
type meter struct {
	profile *os.File
	mallocs uint64
	cpu     time.Duration
	began   time.Time
	heap    *heapWatch // nil: nobody asks
}

func startMeter(j job) (*meter, error) {
	var m meter
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
	m.mallocs, m.cpu, m.began = stats.Mallocs, harness.CPUTime(), time.Now()
	return &m, nil
}

// stop fills in what n messages cost; rate is left to the caller where the time of all is not the time to divide by.
func (m *meter) stop(n int64) (result, error) {
	elapsed, cpu := time.Since(m.began), harness.CPUTime()-m.cpu
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	var err error
	if m.profile != nil {
		pprof.StopCPUProfile()
		err = m.profile.Close()
	}
	if n == 0 {
		return result{}, errors.Join(err, errors.New("nothing was done in time"))
	}
	return result{
		Messages: n,
		Rate:     float64(n) / elapsed.Seconds(),
		Allocs:   float64(stats.Mallocs-m.mallocs) / float64(n),
		CPU:      cpu / time.Duration(n),
		Heap:     m.heap.stop(),
	}, err
}

// watchHeap has the meter find out how much of the heap is in use while the handlers work. It collects garbage all the
// time: what is not yet collected tells more of the collector than of the peer.
func (m *meter) watchHeap() {
	w := &heapWatch{over: make(chan struct{}), median: make(chan float64)}
	began := heapBytes()
	go func() {
		var seen []float64
		for {
			seen = append(seen, heapBytes())
			select {
			case <-w.over:
				w.median <- harness.Middle(seen) - began
				return
			default:
			}
		}
	}()
	m.heap = w
}

type heapWatch struct {
	over   chan struct{}
	median chan float64
}

func (w *heapWatch) stop() float64 {
	if w == nil {
		return 0
	}
	close(w.over)
	return <-w.median
}

// heapBytes is what objects take of the heap that somebody still needs.
func heapBytes() float64 {
	runtime.GC()
	sample := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(sample)
	return float64(sample[0].Value.Uint64())
}
