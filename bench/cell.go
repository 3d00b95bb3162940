package main

import (
	"fmt"
	"time"

	"github.com/postrider/postrider/bench/internal/harness"
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

// handlers is how many messages are handled at once.
func (c cell) handlers() int {
	if c.kind == memory {
		return memoryHandlers
	}
	return c.n
}

// The harness's types.
type (
	job    = harness.Job
	result = harness.Result
)

// backlog returns how many messages wait when a cell begins.
func backlog(j job, c cell) int {
	rate := float64(backlogRate)
	switch c.kind { //nolint:exhaustive // the others are alike
	case memory:
		return c.n
	case slow:
		rate = 16 * float64(time.Second/slowTime)
	}
	return max(100, min(int(rate*j.Seconds), backlogMemory/j.Size))
}
