package outbox

import (
	"errors"
	"time"

	"github.com/postrider/postrider"
)

// LogicalMode says whether messages may come to the relay by logical replication.
type LogicalMode int

const (
	// LogicalOff reads the tables. It is the default.
	LogicalOff LogicalMode = iota

	// LogicalAuto uses logical replication where it can be had. Where it cannot, that is logged at level Info.
	LogicalAuto

	// LogicalOn is for who relies on it. If somebody must do something before it can be had (wal_level, the right to replicate, the
	// publication, a replication slot or WAL sender at all), Relay.Run fails at its start with FailedPrecondition. Later, and
	// for what passes, the tables are read as with LogicalAuto: that is logged at level Warn, and in Status.LastError.
	LogicalOn
)

// LogicalConfig configures the logical replication source of a Relay. The server then pushes what is committed to the relay
// that leads: no writer need wake it, and it makes four queries a second whatever is published.
//
// It needs PostgreSQL 14, wal_level=logical, a role with REPLICATION, a free replication slot and WAL sender, and a publication of
// the table. The relay makes the publication if its role owns the table and may CREATE in the database; else somebody else does,
// for the schema postrider (a schema of more than 46 bytes is shortened in the name, see the log):
//
//	create publication postrider_outbox_postrider for table postrider.postrider_outbox
//		with (publish = 'insert', publish_via_partition_root = true);
//
// The tables stay the truth: the cursor that the relay writes is the same as without, and moves on when the server
// has sent all that a snapshot sees. So whenever something is missing, ends or takes too long, an open transaction that a
// new slot must wait for included, the relay reads the tables from its cursor on, and tries again from time to
// time, after a second at first and then up to a minute. Messages sent since the cursor was written are sent again then, with the
// same ids.
//
// The slot is temporary, so it ends with its connection, and that ends with the relay, at the latest ten seconds after it was heard
// of last. Nothing is left behind that keeps WAL.
//
// One thing is different: a message may be sent a moment before other sessions see what its transaction wrote, or, where the
// commit waits for a synchronous standby, as long as that takes.
type LogicalConfig struct {
	// Mode is off by default.
	Mode LogicalMode

	// URL is the server for the replication connection, with its role and the outbox's database, for a pool that goes through a
	// pooler. A connection string as pgx takes it. Default: where the pool connects.
	URL string

	// MaxRetained is how much WAL the server may keep for the slot, in bytes, at least 1 MiB. It keeps what is not sent yet, and all
	// since the oldest open transaction began. Above it the relay drops the slot. Default 1 GiB.
	MaxRetained int64
}

const (
	// feedTimeout is after how long the server gives up on a relay that is not heard of, and ends its slot.
	feedTimeout = 10 * time.Second

	// slotWait bounds the wait of a new slot for each transaction that is open.
	slotWait = 5 * time.Second

	// feedStuck is for how long the publisher may take nothing before the slot is dropped: a server that is to shut down waits for
	// replication connections to take what it has.
	feedStuck = 5 * time.Second

	// feedStatus is how often the server is told how far the relay is.
	feedStatus = time.Second

	// feedRetry and feedRetryMax bound the wait until logical replication is tried again.
	feedRetry    = 100 * time.Millisecond
	feedRetryMax = time.Minute
)

func (c LogicalConfig) withDefaults() LogicalConfig {
	if c.MaxRetained == 0 {
		c.MaxRetained = 1 << 30
	}
	return c
}

func (c LogicalConfig) validate() error {
	switch bad := postrider.InvalidArgument; {
	case c.Mode < LogicalOff || c.Mode > LogicalOn:
		return postrider.Errorf(bad, "outbox: LogicalConfig.Mode is %d: want LogicalOff, LogicalAuto or LogicalOn", c.Mode)
	case c.MaxRetained < 1<<20:
		return postrider.Errorf(bad, "outbox: LogicalConfig.MaxRetained is %d: want at least 1 MiB", c.MaxRetained)
	default:
		return nil
	}
}

// Why the relay goes back to reading the tables.
var (
	errFeedPaused  = errors.New("the outbox is paused")
	errFeedStuck   = errors.New("the publisher takes nothing")
	errFeedGone    = errors.New("the replication slot is gone")
	errFeedChanged = errors.New("the publication was altered")
)
