package main

import (
	"fmt"
	"time"
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

// job is what a worker is asked to do.
type job struct {
	Cell    string
	Size    int // of the data of a message, in bytes
	Seconds float64
	Profile string // where the CPU profile goes, if anywhere
}

func (j job) duration() time.Duration { return time.Duration(j.Seconds * float64(time.Second)) }

// result is what came of a job.
type result struct {
	Peer, Cell string
	Round      int

	Err      string        `json:",omitempty"`
	Messages int64         // or transactions
	Rate     float64       // a second
	Base     float64       // the rate of the same work without messages
	P50, P99 time.Duration // of the kind latency
	CPU      time.Duration // of the worker's process, a message
	WAL      float64       // bytes a message, with all that belongs to it
	Dead     float64       // dead row versions a message
	Backlog  int64         // messages that were left when the writers ended
	Lost     int64         // committed and not in the stream, or not in the table
	Again    int64         // in the stream twice
	Disorder int64         // in the stream behind a later one of the same key
}

func (r result) line() string {
	if r.Err != "" {
		return fmt.Sprintf("%d %-14s %-10s %s", r.Round, r.Peer, r.Cell, r.Err)
	}
	return fmt.Sprintf("%d %-14s %-10s  %8.0f/s base %6.0f  n %6d  p50 %v p99 %v  cpu %v  wal %.0f dead %.3f backlog %d  lost %d again %d disorder %d",
		r.Round, r.Peer, r.Cell, r.Rate, r.Base, r.Messages, r.P50, r.P99, r.CPU, r.WAL, r.Dead, r.Backlog, r.Lost, r.Again, r.Disorder)
}
