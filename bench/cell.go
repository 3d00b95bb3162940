package main

import (
	"fmt"
	"time"
)

// kind is a kind of work.
type kind string

const (
	publishing kind = "publish" // callers publish one value at a time
	batching   kind = "batch"   // one caller publishes 1000 values at a time
	endToEnd   kind = "e2e"     // 64 callers publish, handlers handle
	draining   kind = "drain"   // handlers work off a backlog
	keyed      kind = "keyed"   // the same, in order for each of 256 keys
	retrying   kind = "retry"   // the same, one message in ten fails the first time
	slow       kind = "slow"    // the same, a handler takes 1 ms
	latency    kind = "latency" // 500 values a second, from before the publish to the handler
	memory     kind = "memory"  // 16 handlers work off a backlog of so many, however long it takes
)

const (
	batchSize    = 1000
	endCallers   = 64
	window       = 4096 // messages between publisher and handler, at most
	keys         = 256
	failEvery    = 10
	slowTime     = time.Millisecond
	pace         = 500 // values a second
	paceHandlers = 16

	memoryHandlers = 16
	memoryTime     = time.Minute // to work off a backlog of the kind memory, at most
	retryDelay     = time.Millisecond
	maxRate        = 250_000  // messages a second that are published end to end, at most
	backlogRate    = 40_000   // messages for each second of measuring
	backlogMemory  = 96 << 20 // bytes of a backlog, at most
)

// cell is one line of the table.
type cell struct {
	kind kind
	n    int // callers or handlers, messages of the kind memory; 0 where the kind has but one way
}

func (c cell) String() string {
	if c.n == 0 {
		return string(c.kind)
	}
	return fmt.Sprintf("%s-%d", c.kind, c.n)
}

func allCells() []cell {
	return []cell{
		{publishing, 1},
		{publishing, 16},
		{publishing, 64},
		{publishing, 256},
		{batching, 0},
		{endToEnd, 1},
		{endToEnd, 16},
		{draining, 1},
		{draining, 16},
		{keyed, 16},
		{retrying, 16},
		{slow, 16},
		{latency, 0},
	}
}

// memoryCells are not among all cells: they tell something only together, and a million messages take their time.
func memoryCells() []cell { return []cell{{memory, 10_000}, {memory, 100_000}, {memory, 1_000_000}} }

func namedCells() []cell { return append(allCells(), memoryCells()...) }

// handlers is how many messages are handled at once.
func (c cell) handlers() int {
	if c.kind == memory {
		return memoryHandlers
	}
	return c.n
}

// job is what a worker is asked to do.
type job struct {
	Cell    string
	Size    int // of the payload, in bytes
	Seconds float64
	Profile string // where the CPU profile goes, if anywhere
}

// backlog returns how many messages wait when a cell begins.
func (j job) backlog(c cell) int {
	rate := float64(backlogRate)
	switch c.kind { //nolint:exhaustive // the others are alike
	case memory:
		return c.n
	case slow:
		rate = 16 * float64(time.Second/slowTime)
	}
	return max(100, min(int(rate*j.Seconds), backlogMemory/j.Size))
}

// result is what came of a job.
type result struct {
	Peer, Cell  string
	Size, Round int

	Err      string        `json:",omitempty"`
	Messages int64         // published or handled
	Rate     float64       // messages a second
	P50, P99 time.Duration // of the kind latency
	Allocs   float64       // a message
	CPU      time.Duration // of the worker's process, a message
	Heap     float64       // of the kind memory: bytes in use, beyond those before it began
	Lost     int64         // acknowledged and not there, or acknowledged to the server and not handled
	Again    int64         // stored or handled twice
	Disorder int64         // handled before an earlier one of the same key
}

func (r result) line() string {
	if r.Err != "" {
		return fmt.Sprintf("%d %-14s %-10s %6d  %s", r.Round, r.Peer, r.Cell, r.Size, r.Err)
	}
	return fmt.Sprintf("%d %-14s %-10s %6d  %9.0f/s  n %7d  p50 %v p99 %v  allocs %5.1f  cpu %v  lost %d again %d disorder %d",
		r.Round, r.Peer, r.Cell, r.Size, r.Rate, r.Messages, r.P50, r.P99, r.Allocs, r.CPU, r.Lost, r.Again, r.Disorder)
}
