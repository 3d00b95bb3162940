package main

import (
	"fmt"
	"time"

	"github.com/postrider/postrider/bench/internal/harness"
)

// kind is a kind of work.
type kind string

const (
	draining   kind = "drain"      // a backlog goes to the stream
	held       kind = "drain-held" // the same while a write transaction is open in another database
	reading    kind = "read"       // a backlog goes to a publisher that accepts everything at once: the database's part
	latency    kind = "latency"    // 500 transactions a second, from the end of COMMIT to a subscriber
	business   kind = "tx"         // a transaction of BEGIN, UPDATE, INSERT, COMMIT with so many messages, and without
	inserting  kind = "insert"     // transactions of one message, so many writers
	bulk       kind = "bulk"       // transactions of so many messages, one writer
	sustained  kind = "sustained"  // so many writers as fast as they can, and the relay
	idle       kind = "idle"       // the relay with nothing to do
	handling   kind = "dedup"      // a handler that is idempotent, of batches of so many, and one of single messages that is not
	remembered kind = "do"         // the recorded answer of a key that was used before, and a SELECT by a key
)

const (
	writers      = 8 // of business transactions and handlers
	accounts     = 20_000
	backlogGroup = 1000 // messages in a transaction of a backlog
	backlogRate  = 40_000
	pace         = 500 // transactions a second of the kind latency
	slice        = 250 * time.Millisecond
	drainTime    = 30 * time.Second // for what is left at the end of a sustained run, at most
	idleTime     = 5 * time.Second
	keys         = 1000
)

// cell is one line of the table.
type cell struct {
	kind kind
	n    int // messages or writers; 0 where the kind has but one way
}

func (c cell) String() string {
	if c.n == 0 {
		return string(c.kind)
	}
	return fmt.Sprintf("%s-%d", c.kind, c.n)
}

func allCells() []cell {
	return []cell{
		{draining, 0},
		{held, 0},
		{reading, 0},
		{latency, 0},
		{business, 1},
		{business, 10},
		{inserting, 8},
		{bulk, 1000},
		{sustained, 8},
		{idle, 0},
		{handling, 0},
		{handling, 100},
		{remembered, 0},
	}
}

// The harness's types.
type (
	job    = harness.Job
	result = harness.Result
)
