package idempotency

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
)

// The faults of a connection, armed by a handler for what comes after it: the commit.
const (
	noFault    = iota
	loseCommit // the client's flight is lost with the connection: not committed
	loseAnswer // the server commits, and the connection breaks before the client hears of it
)

// faultyConn breaks a connection at a commit. Only the client's goroutine uses it.
type faultyConn struct {
	net.Conn
	fault *atomic.Int32
	hits  *atomic.Int32
}

func (c *faultyConn) Write(p []byte) (int, error) {
	if c.fault.CompareAndSwap(loseCommit, noFault) {
		c.hits.Add(1)
		return 0, errors.Join(io.ErrClosedPipe, c.Close())
	}
	return c.Conn.Write(p)
}

func (c *faultyConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.fault.Load() == loseAnswer && bytes.Contains(p[:n], []byte("COMMIT\x00")) {
		c.fault.Store(noFault)
		c.hits.Add(1)
		return 0, errors.Join(io.ErrUnexpectedEOF, c.Close())
	}
	return n, err
}

// connect returns a pool, closed with the test.
func (b *bench) connect(cfg *pgxpool.Config) *pgxpool.Pool {
	b.t.Helper()
	pool, err := pgxpool.NewWithConfig(b.t.Context(), cfg)
	must(b.t, err)
	b.t.Cleanup(pool.Close)
	return pool
}

// faulty returns a pool of one connection at a time, whose next fault is set through the first and counted by the second.
func (b *bench) faulty() (pool *pgxpool.Pool, fault, hits *atomic.Int32) {
	fault, hits = new(atomic.Int32), new(atomic.Int32)
	cfg := b.pool.Config()
	cfg.MaxConns = 1
	dial := cfg.ConnConfig.DialFunc
	cfg.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		return &faultyConn{conn, fault, hits}, err
	}
	return b.connect(cfg), fault, hits
}

func TestAmbiguousCommitOfAHandler(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]int32{"commit lost": loseCommit, "answer lost": loseAnswer} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			pool, armed, hits := b.faulty()
			s, runs := b.storeOn(pool, Config{}), 0
			h := Handler(s, "billing", b.placed, func(ctx context.Context, tx pgx.Tx, e postrider.Event[order]) error {
				if runs++; runs == 1 {
					defer armed.Store(fault)
				}
				return write(ctx, tx, e.ID)
			})
			// Once before, so that the connection's statements are prepared and the partition is there.
			must(t, handle(t, b.writer(s, "warm-up"), b.event("w", time.Now())))
			m := b.event("m-1", time.Now())
			wantCode(t, handle(t, h, m), postrider.Unavailable, true)
			if hits.Load() != 1 {
				t.Fatalf("the fault happened %d times", hits.Load())
			}
			b.wantEffects("m-1", map[int32]int{loseCommit: 0, loseAnswer: 1}[fault])
			must(t, handle(t, h, m))
			b.wantEffects("m-1", 1)
		})
	}
}

func TestAmbiguousCommitOfAnAction(t *testing.T) {
	t.Parallel()
	refusal := postrider.Errorf(postrider.FailedPrecondition, "sold out")
	for name, test := range map[string]struct {
		fault     int32
		refuse    error
		committed int
		runs      int
	}{
		"commit lost":            {loseCommit, nil, 0, 2},
		"answer lost":            {loseAnswer, nil, 1, 1},
		"commit of refusal lost": {loseCommit, refusal, 0, 2},
		"answer to refusal lost": {loseAnswer, refusal, 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			pool, armed, hits := b.faulty()
			runs := 0
			h := Action(b.storeOn(pool, Config{}), b.reserve, func(ctx context.Context, tx pgx.Tx, req *order) (*hold, error) {
				if runs++; runs == 1 {
					defer armed.Store(test.fault)
				}
				if err := write(ctx, tx, req.ID); err != nil {
					return nil, err
				}
				return &hold{ID: req.ID}, test.refuse
			})
			m := b.command(b.reserve, "s/1/do", order{ID: "o-1"})
			// A refusal that may not be stored is not told either: a repetition might succeed.
			wantCode(t, handle(t, h, m), postrider.Unavailable, true)
			if hits.Load() != 1 {
				t.Fatalf("the fault happened %d times", hits.Load())
			}
			b.wantEffects("o-1", test.committed)
			err := handle(t, h, m)
			if test.refuse == nil {
				must(t, err)
				b.wantEffects("o-1", 1)
			} else {
				wantCode(t, err, postrider.FailedPrecondition, false)
				b.wantEffects("o-1", 0)
			}
			if runs != test.runs {
				t.Errorf("the action ran %d times, want %d", runs, test.runs)
			}
		})
	}
}
