package outbox

import (
	"fmt"
	"net/url"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/migrate"
)

// Config configures an Outbox.
type Config struct {
	// Schema holds the tables, which [Migrate] creates. Lower-case letters, digits and "_". Default [DefaultSchema].
	Schema string

	// Source is the CloudEvents source of messages that have none, a URI reference such as "//shop/orders". Required.
	Source string

	// MaxBytes is the largest message that Publish takes: its data and its encoded attributes. A larger one would be
	// refused by the broker after the commit. Default 1 MiB, the default of nats-server, less 16 KiB for headers.
	// Negative: no limit.
	MaxBytes int

	// Check, if not nil, may refuse a message for more reasons than its attributes and MaxBytes: its error is that of Publish.
	// bus.Bus.Check knows what its server takes, headers included. It must be quick, and safe for concurrent use.
	Check func(*postrider.Message) error

	// NoKeyLock leaves out the lock on a message's key. Set it only if every transaction that publishes a key holds another
	// lock from before Publish to its end, such as that of the business row; else the order of the key is lost.
	NoKeyLock bool
}

func (c Config) withDefaults() Config {
	c.Schema = schemaOrDefault(c.Schema)
	if c.MaxBytes == 0 {
		c.MaxBytes = 1<<20 - 16<<10
	}
	return c
}

func (c Config) validate() error {
	if c.Source == "" {
		return postrider.Errorf(postrider.InvalidArgument, "outbox: Config.Source is empty: want a URI reference such as //shop/orders")
	}
	if _, err := url.Parse(c.Source); err != nil {
		return postrider.Errorf(postrider.InvalidArgument, "outbox: Config.Source: want a URI reference: %w", err)
	}
	return nil
}

// Outbox publishes in database transactions. It is immutable and safe for concurrent use.
type Outbox struct {
	cfg Config
	q   queries

	// To the relay of this process: something will be committed soon, or has been.
	wake, committed chan struct{}
}

// New returns the outbox of a schema. It does no I/O.
func New(cfg Config) (*Outbox, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	schema, err := migrate.Quote(cfg.Schema)
	if err != nil {
		return nil, fmt.Errorf("outbox: Config.Schema: %w", err)
	}
	return &Outbox{cfg: cfg, q: newQueries(schema), wake: make(chan struct{}, 1), committed: make(chan struct{}, 1)}, nil
}

// poke makes the relay of this process look soon, or at once if something is committed already. Before a commit the relay
// looks more than once.
func poke(relay chan<- struct{}) {
	select {
	case relay <- struct{}{}:
	default:
	}
}
