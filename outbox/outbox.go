package outbox

import (
	"fmt"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

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

	// MaxDepth is about how many messages may wait to be sent: above that Publish fails with ResourceExhausted, which may be tried again, and the
	// transaction remains usable. Each process looks once a second, with the statement that inserts, so that a second's worth of messages
	// may come on top; what was sent in the last quarter of a second may count as waiting. Whoever publishes must be allowed to read
	// the table postrider_outbox_relay and the sequence. Default 0: no limit.
	MaxDepth int64

	// Poker tells relays in other processes that there is something to send, at most every 2 ms. bus.Bus.Poker makes one. Without it,
	// and when a poke gets lost, they find out by RelayConfig.PollInterval. Default none.
	Poker Poker

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

// Poker carries a word without content, a poke, from the processes that publish to that of the relay. It may lose some. Both
// methods must be safe for concurrent use.
type Poker interface {
	// Poke sends a poke. It must not block.
	Poke() error

	// OnPoke has f called for each poke, those of this process included or not, until stop is called. f is quick.
	OnPoke(f func()) (stop func(), err error)
}

// Outbox publishes in database transactions. Its configuration is immutable, and it is safe for concurrent use.
type Outbox struct {
	cfg Config
	q   queries

	// To the relay of this process: something will be committed soon, or has been.
	wake, committed chan struct{}

	directs sync.Map // from *pgxpool.Pool to *direct, where a relay leads

	pokes   sync.Mutex
	poked   time.Time // when a poke was sent last
	poking  bool      // one will be, with a timer
	began   time.Time
	looked  atomic.Int64 // when the depth was looked at last, since began; 0: never
	waiting atomic.Int64 // the depth
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
	return &Outbox{
		cfg: cfg, q: newQueries(schema), wake: make(chan struct{}, 1), committed: make(chan struct{}, 1), began: time.Now(),
	}, nil
}

// soon has relays look soon: what was published will be committed. They look more than once.
func (o *Outbox) soon() {
	poke(o.wake)
	o.pokeOthers()
}

// now has relays look now, here at once unless the relay of this process was handed the messages.
func (o *Outbox) now(direct bool) {
	if !direct {
		poke(o.committed)
	}
	o.pokeOthers()
}

func poke(relay chan<- struct{}) {
	select {
	case relay <- struct{}{}:
	default:
	}
}

// pokeEvery is the shortest time between two pokes of a process.
const pokeEvery = 2 * time.Millisecond

// pokeOthers pokes the relays of other processes.
func (o *Outbox) pokeOthers() {
	if o.cfg.Poker == nil {
		return
	}
	o.pokes.Lock()
	defer o.pokes.Unlock()
	now := time.Now()
	switch left := o.poked.Add(pokeEvery).Sub(now); {
	case o.poking: // whoever comes until then, shares it
	case left <= 0:
		o.poked = now
		_ = o.cfg.Poker.Poke() // a poke that is lost costs the time to the next poll
	default:
		o.poking = true
		time.AfterFunc(left, func() {
			o.pokes.Lock()
			defer o.pokes.Unlock()
			o.poking, o.poked = false, time.Now()
			_ = o.cfg.Poker.Poke()
		})
	}
}
