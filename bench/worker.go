package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"runtime/metrics"
	"slices"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider/bench/internal/harness"
)

// work is the role of a worker: one peer, which does the jobs that come in, until there are no more.
func work(ctx context.Context, name string, servers []string, in io.Reader, out io.Writer) error {
	i := slices.IndexFunc(allPeers(), func(p peer) bool { return p.name == name })
	if i < 0 {
		return fmt.Errorf("there is no peer %q", name)
	}
	nc, err := nats.Connect(servers[0])
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	w := worker{peer: allPeers()[i], url: servers[0], js: js}
	return harness.Work(ctx, in, out, w.do)
}

type worker struct {
	peer peer
	url  string
	js   jetstream.JetStream
}

// do does one job on a new stream, which is deleted afterwards.
func (w worker) do(ctx context.Context, j job) (_ result, err error) {
	cells := append(allCells(), memoryCells()...)
	i := slices.IndexFunc(cells, func(c cell) bool { return c.String() == j.Cell })
	if i < 0 {
		return result{}, fmt.Errorf("there is no cell %q", j.Cell)
	}
	c := cells[i]
	name := harness.StreamName()
	stream, err := createStream(ctx, w.js, name)
	if err != nil {
		return result{}, err
	}
	defer func() { err = errors.Join(err, w.js.DeleteStream(context.WithoutCancel(ctx), name)) }()
	s, err := w.peer.open(ctx, site{url: w.url, size: j.Size, stream: name, keyed: c.kind == keyed})
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

// watchHeap finds out how much of the heap is in use while the handlers work. It collects garbage all the time: what is not
// yet collected tells more of the collector than of the peer.
func watchHeap() *heapWatch {
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
	return w
}

type heapWatch struct {
	over   chan struct{}
	median chan float64
}

func (w *heapWatch) stop() float64 {
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
