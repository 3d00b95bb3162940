package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
)

// chaos breaks things while the orders run: it kills services without letting them finish, ends relays, cuts connections
// to both servers, and delivers messages twice. Its dice have a seed, so that a run can be thrown again; what falls
// between two throws is up to the machine.
type chaos struct {
	seed  uint64
	hosts []*host
	at    servers

	mu    sync.Mutex
	dice  *rand.Rand
	count struct{ kills, relays, cuts, sessions, duplicates, orders int }
}

func newChaos(seed uint64, hosts []*host, at servers) *chaos {
	return &chaos{seed: seed, hosts: hosts, at: at, dice: rand.New(rand.NewPCG(seed, seed))}
}

// duplicateHeader marks what chaos has published itself.
const duplicateHeader = "Shop-Duplicate"

// during breaks things while work is done. A nil chaos breaks nothing.
func (c *chaos) during(ctx context.Context, work func() error) error {
	if c == nil {
		return work()
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- c.run(ctx) }()
	err := work()
	stop()
	return errors.Join(err, <-ended)
}

func (c *chaos) run(ctx context.Context) error {
	nc, err := connect("chaos", c.at.nats)
	if err != nil {
		return err
	}
	defer nc.Close()
	if _, err := nc.Subscribe(prefix+".>", func(msg *nats.Msg) { c.duplicate(nc, msg) }); err != nil {
		return fmt.Errorf("chaos: %w", err)
	}
	db, err := pgx.Connect(ctx, c.at.postgres)
	if err != nil {
		return fmt.Errorf("chaos: %w", err)
	}
	defer db.Close(context.WithoutCancel(ctx))
	for {
		pause(ctx, time.Duration(50+c.throw(300))*time.Millisecond)
		if ctx.Err() != nil {
			return nil
		}
		c.strike(ctx, db, c.hosts[c.throw(len(c.hosts))])
	}
}

func (c *chaos) throw(n int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dice.IntN(n)
}

// strike does one of the bad things to a service.
func (c *chaos) strike(ctx context.Context, db *pgx.Conn, h *host) {
	what := c.throw(5)
	h.mu.Lock()
	now := h.now
	h.mu.Unlock()
	if now == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case what == 0 || c.count.kills == 0: // one at least, however short the run
		c.endSessions(ctx, db, h) // in the middle of their transactions
		if h.kill() {
			c.count.kills++
		}
	case what == 1 && now.relay != nil:
		now.relay.restart()
		c.count.relays++
	case what == 2:
		c.endSessions(ctx, db, h)
		c.count.sessions++
	default:
		if now.nc.ForceReconnect() == nil {
			c.count.cuts++
		}
	}
	c.at.log.Debug("chaos", slog.String("service", h.name), slog.Int("what", what))
}

// endSessions ends a service's connections to PostgreSQL.
func (c *chaos) endSessions(ctx context.Context, db *pgx.Conn, h *host) {
	_, err := db.Exec(ctx, `select pg_terminate_backend(pid) from pg_stat_activity
		where application_name = $1 and datname = current_database()`, "shop-"+h.name)
	if err != nil && ctx.Err() == nil {
		c.at.log.Warn("chaos: sessions not ended", "error", err)
	}
}

// duplicate publishes one in ten events, commands and replies again, as another message to NATS: its duplicate window,
// which knows messages by their Nats-Msg-Id, lets it pass.
func (c *chaos) duplicate(nc *nats.Conn, msg *nats.Msg) {
	if strings.HasPrefix(msg.Subject, prefix+".rpc.") || msg.Header.Get(duplicateHeader) != "" || c.throw(10) > 0 {
		return
	}
	again := nats.NewMsg(msg.Subject)
	again.Data = msg.Data
	for name, values := range msg.Header {
		if !strings.HasPrefix(name, "Nats-") {
			again.Header[name] = values
		}
	}
	again.Header.Set(duplicateHeader, "1")
	if nc.PublishMsg(again) == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.count.duplicates++
	}
}

// twice tells the loader to place one in twenty orders a second time. A nil chaos says no.
func (c *chaos) twice() bool {
	if c == nil || c.throw(20) > 0 {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count.orders++
	return true
}

// String says what was done.
func (c *chaos) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.count
	return fmt.Sprintf("seed %d: %d services killed, %d relays restarted, %d NATS connections cut, %d times all PostgreSQL sessions of a service ended, "+
		"%d messages and %d orders doubled", c.seed, n.kills, n.relays, n.cuts, n.sessions, n.duplicates, n.orders)
}
