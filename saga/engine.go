package saga

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/migrate"
)

// Outbox publishes within a transaction; *outbox.Outbox does.
type Outbox interface {
	// In returns a publisher whose messages leave if and only if tx commits.
	In(tx pgx.Tx) postrider.Publisher
}

// Config configures an [Engine].
type Config struct {
	// Name is that of the engine, shared by all its instances: letters, digits, - and _. Replies go to the topic
	// "saga.<Name>.replies". Required.
	Name string

	// Schema holds the tables, see [Migrate]. Default [DefaultSchema].
	Schema string

	// MaxData is the largest a saga's data may get, in bytes of JSON. Larger ones are refused by Start; grown by a reply,
	// they fail the attempt. Negative: no limit. Default 256 KiB.
	MaxData int

	// PollInterval is the longest wait between two looks for due timers. It bounds how late the first timer of a new saga
	// and the timers of an instance that has died are taken up. Default 1 s.
	PollInterval time.Duration

	// Workers is how many due timers are handled at once, each on a connection of the pool. Default 4.
	Workers int

	// DrainTimeout bounds a timer's transition, and with it the time that [Engine.Run] takes to return. Default 10 s.
	DrainTimeout time.Duration

	// Logger gets the alarms, at Warn. Default: none.
	Logger *slog.Logger
}

func (c Config) withDefaults() Config {
	c.Schema = cmp.Or(c.Schema, DefaultSchema)
	c.MaxData = cmp.Or(c.MaxData, 256<<10)
	c.PollInterval = cmp.Or(c.PollInterval, time.Second)
	c.Workers = cmp.Or(c.Workers, 4)
	c.DrainTimeout = cmp.Or(c.DrainTimeout, 10*time.Second)
	c.Logger = cmp.Or(c.Logger, slog.New(slog.DiscardHandler))
	return c
}

func (c Config) validate() error {
	bad := func(field, format string, args ...any) error {
		return postrider.Errorf(postrider.InvalidArgument, "saga: Config."+field+" "+format, args...)
	}
	switch {
	case !validName(c.Name, "-_"):
		return bad("Name", "is %q: want letters, digits, - and _", c.Name)
	case c.PollInterval < 0:
		return bad("PollInterval", "is %v: want a positive duration", c.PollInterval)
	case c.Workers < 0:
		return bad("Workers", "is %d: want a positive number", c.Workers)
	case c.DrainTimeout < 0:
		return bad("DrainTimeout", "is %v: want a positive duration", c.DrainTimeout)
	default:
		return nil
	}
}

// Engine runs the sagas of its plans. Any number of instances with the same name and database share the work without a
// leader: any of them takes any reply and any due timer. Safe for concurrent use.
type Engine struct {
	pool    *pgxpool.Pool
	outbox  Outbox
	cfg     Config
	log     *slog.Logger
	sql     statements
	plans   map[string]*definition // by hash
	hashes  []string
	timers  sleeper
	waiters waiters
}

// NewEngine makes an engine. It starts nothing: subscribe [Engine.Handler] on a bus and call [Engine.Run].
func NewEngine(pool *pgxpool.Pool, ob Outbox, cfg Config, plans ...AnyPlan) (*Engine, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if pool == nil || ob == nil {
		return nil, postrider.Errorf(postrider.InvalidArgument, "saga: an engine needs the pool and the outbox of its database, and one of them is nil")
	}
	schema, err := migrate.Quote(cfg.Schema)
	if err != nil {
		return nil, postrider.Errorf(postrider.InvalidArgument, "saga: Config.Schema: %w", err)
	}
	e := &Engine{
		pool: pool, outbox: ob, cfg: cfg, log: cfg.Logger, sql: newStatements(schema), plans: make(map[string]*definition),
		hashes: []string{}, timers: sleeper{poke: make(chan struct{}, 1)},
	}
	for i, p := range plans {
		var d *definition
		if p != nil {
			d = p.definition()
		}
		if d == nil {
			return nil, postrider.Errorf(postrider.InvalidArgument, "saga: plan %d of %d is nil", i+1, len(plans))
		}
		for _, other := range e.plans {
			if other.name == d.name && other.version == d.version {
				return nil, postrider.Errorf(postrider.InvalidArgument, "saga: plan %s version %d is given twice", d.name, d.version)
			}
		}
		e.plans[d.hash] = d
		e.hashes = append(e.hashes, d.hash)
	}
	return e, nil
}

// Handler returns the handler of the replies to this engine's commands, to be subscribed on the bus under a group that
// all instances share and that begins with the oldest message. A reply that is lost costs its attempt's time-out, no more.
func (e *Engine) Handler() postrider.Handler {
	return postrider.RawHandler(e.replyTopic(), e.handleReply)
}

func (e *Engine) replyTopic() string { return "saga." + e.cfg.Name + ".replies" }

// Tx is an engine within a transaction of the caller's; [Plan.Start] takes it.
type Tx struct {
	engine *Engine
	tx     pgx.Tx
}

// In returns the engine within a transaction: sagas started in it begin if and only if it commits.
func (e *Engine) In(tx pgx.Tx) Tx { return Tx{e, tx} }

// Start begins a saga within the transaction and returns its id. When the plan's business key is taken, by a saga that
// runs or one that has ended, nothing is started: Start returns that saga's id with an AlreadyExists error, and the
// transaction lives on, so that a caller who wants the same thing once may go on with the id. A concurrent Start of the
// same key waits for the other transaction's end.
//
// Other errors: InvalidArgument for nil data, a bad key, or a first message that cannot be made; FailedPrecondition for a plan
// that the engine does not have, and without tables; ResourceExhausted for data larger than [Config.MaxData]; those of the
// outbox; Unavailable for any other trouble with the database, after which the transaction has to be rolled back.
func (p *Plan[D]) Start(ctx context.Context, in Tx, data *D) (string, error) {
	if in.engine == nil || in.tx == nil || data == nil {
		return "", postrider.Errorf(postrider.InvalidArgument,
			"saga: start %s: the engine, its transaction or the data are nil: want Start(ctx, engine.In(tx), &data)", p.def.name)
	}
	id, err := in.engine.start(ctx, in.tx, &p.def, data)
	var known *postrider.Error
	if err != nil && !errors.As(err, &known) {
		err = in.engine.trouble("saga: start "+p.def.name, err)
	}
	return id, err
}

func (e *Engine) start(ctx context.Context, tx pgx.Tx, d *definition, data any) (string, error) {
	if e.plans[d.hash] == nil {
		return "", postrider.Errorf(postrider.FailedPrecondition, "saga: start %s: engine %s does not run this plan: give it to NewEngine", d.name, e.cfg.Name)
	}
	key := d.key(data)
	if key == "" || len(key) > 500 || clean(key) != key || !utf8.ValidString(key) {
		return "", postrider.Errorf(postrider.InvalidArgument, "saga: start %s: business key %q: want 1 to 500 bytes of text", d.name, key)
	}
	encoded, err := encode(data, e.cfg.MaxData)
	if err != nil {
		return "", err
	}
	r := &run{
		row: &row{id: postrider.NewID(), plan: d.name, version: d.version, hash: d.hash, key: key, data: encoded},
		def: d, engine: e, value: data,
	}
	var existing *string
	if err := tx.QueryRow(ctx, e.sql.peek, e.cfg.Name, d.name, key).Scan(&r.now, &existing); err != nil {
		return "", err
	}
	if existing != nil {
		return *existing, alreadyExists(d.name, key, *existing)
	}
	r.now = r.now.UTC()
	// The messages go out only after the row is known to be the key's first.
	var msgs []*postrider.Message
	r.publish = func(_ context.Context, m *postrider.Message) error {
		msgs = append(msgs, m)
		return nil
	}
	if err := r.advance(ctx, event{kind: started}); err != nil {
		return "", err
	}
	if r.failure != nil {
		return "", r.failure
	}
	inserted, err := e.insert(ctx, tx, r.row, r.history)
	if err != nil {
		return "", err
	}
	if !inserted {
		if err := tx.QueryRow(ctx, e.sql.peek, e.cfg.Name, d.name, key).Scan(&r.now, &r.id); err != nil {
			return "", err
		}
		return r.id, alreadyExists(d.name, key, r.id)
	}
	return r.id, e.outbox.In(tx).Publish(ctx, msgs...)
}

func alreadyExists(plan, key, id string) error {
	return postrider.Errorf(postrider.AlreadyExists, "saga: start %s: key %q is that of saga %s", plan, key, id)
}

// Data reads the data of a saga of this plan.
func (p *Plan[D]) Data(i *Instance) (*D, error) {
	data, err := p.def.decode(i.Data)
	if err != nil {
		return nil, err
	}
	return data.(*D), nil
}

// Wait returns a saga, whose start is committed, once it has ended, [Completed] or [Compensated]; or the error of ctx. It learns of the end at once
// when this engine made the last transition, else within a quarter of a second.
func (e *Engine) Wait(ctx context.Context, id string) (*Instance, error) {
	ended := e.waiters.add(id)
	defer e.waiters.remove(id, ended)
	// The poll is for ends that another instance makes.
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, 250*time.Millisecond) {
		i, err := e.Get(ctx, id)
		if err != nil || i.Status.Ended() {
			return i, err
		}
		timer := time.NewTimer(pause)
		select {
		case <-ended:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return i, ctx.Err()
		}
		timer.Stop()
	}
}
