package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/rpc"
)

// loader is the customers: it places orders, many at a time, and waits until each has come to its end.
type loader struct {
	client   *rpc.Client
	parallel int           // orders under way at a time
	patience time.Duration // with one order
	twice    func() bool   // whether to place an order a second time
	pace     time.Duration // between two lines of the input
	progress *progress
	tally    tally
}

// tally is what the loader has seen.
type tally struct {
	mu          sync.Mutex
	lines       int
	accepted    map[int64]Receipt
	again       int // lines that repeat another
	completed   int
	compensated int
	bad         []complaint     // lines of the input that were rejected
	lost        []complaint     // lines whose order was not seen to end
	calls       []time.Duration // of each call that placed an order
	repeated    int             // calls that were made again after a failure that passes
}

// complaint is what is wrong with a line of the input.
type complaint struct {
	line int
	err  error
}

func (c complaint) String() string { return fmt.Sprintf("line %d: %v", c.line, c.err) }

// job is one line of the input.
type job struct {
	line   int
	length int64
	order  *Order
}

// loadStock tells stock and payments of products and customers. What they have already stays as it is.
func (l *loader) loadStock(ctx context.Context, products []Product, customers []Customer, factor int64) error {
	for i := range products {
		products[i].InStock *= factor
	}
	if _, err := persist(ctx, l, AddProducts, &Catalogue{products}); err != nil {
		return fmt.Errorf("load products: %w", err)
	}
	if _, err := persist(ctx, l, AddAccounts, &Customers{customers}); err != nil {
		return fmt.Errorf("load customers: %w", err)
	}
	return nil
}

// run places all orders of the input and returns when each has ended, was rejected, or was waited for in vain.
func (l *loader) run(ctx context.Context, in io.Reader) error {
	l.tally.accepted = map[int64]Receipt{}
	jobs := make(chan job)
	var workers sync.WaitGroup
	for range l.parallel {
		workers.Go(func() {
			for j := range jobs {
				l.carry(ctx, j)
				l.progress.done(j.length)
			}
		})
	}
	err := lines(in, func(number int, text []byte, length int64) error {
		l.tally.line()
		if l.pace > 0 {
			pause(ctx, l.pace)
		}
		order, err := parse[Order](text)
		if err != nil {
			l.reject(number, err)
			l.progress.done(length)
			return nil
		}
		select {
		case jobs <- job{number, length, order}:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	close(jobs)
	workers.Wait()
	return errors.Join(err, ctx.Err())
}

// carry places one order and waits for its end.
func (l *loader) carry(ctx context.Context, j job) {
	ctx, cancel := context.WithTimeout(ctx, l.patience)
	defer cancel()
	receipt, err := l.place(ctx, j.order)
	switch {
	case err == nil:
	case postrider.Retryable(err):
		l.tally.lose(j, err)
		return
	default:
		l.reject(j.line, err)
		return
	}
	if !l.tally.accept(*receipt) {
		return
	}
	for {
		outcome, err := persist(ctx, l, AwaitOrder, receipt)
		if err != nil {
			l.tally.lose(j, err)
			return
		}
		if outcome.Ended {
			l.tally.end(outcome)
			l.progress.ended(outcome.Completed)
			return
		}
	}
}

// place places an order until there is an answer. Repeating it is safe, as the order's number tells that it is the same.
func (l *loader) place(ctx context.Context, o *Order) (*Receipt, error) {
	receipt, err := persist(ctx, l, PlaceOrder, o)
	if err == nil && l.twice() {
		var again *Receipt
		if again, err = persist(ctx, l, PlaceOrder, o); err == nil && *again != *receipt {
			err = postrider.Errorf(postrider.Internal, "order %d got another receipt when it was placed again", o.ID)
		}
	}
	return receipt, err
}

// persist calls until there is an answer, with growing pauses, as long as ctx lasts. Services may be away meanwhile.
func persist[Req, Res any](
	ctx context.Context, l *loader, m *postrider.Method[Req, Res], req *Req, opts ...rpc.CallOption,
) (*Res, error) {
	opts = append(opts, rpc.WaitForReady())
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		start := time.Now()
		res, err := rpc.Call(ctx, l.client, m, req, opts...)
		if err == nil && m.Name() == PlaceOrder.Name() {
			l.tally.call(time.Since(start))
		}
		if err == nil || !postrider.Retryable(err) || ctx.Err() != nil {
			return res, err
		}
		l.tally.repeat()
		pause(ctx, wait)
	}
}

func (l *loader) reject(line int, err error) {
	c := complaint{line, err}
	l.progress.say("rejected: " + c.String())
	l.tally.mu.Lock()
	defer l.tally.mu.Unlock()
	l.tally.bad = append(l.tally.bad, c)
}

func (t *tally) line() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lines++
}

// accept notes a receipt. False: the order stood in the input before, and is seen to its end there.
func (t *tally) accept(r Receipt) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, known := t.accepted[r.Order]; known {
		t.again++
		return false
	}
	t.accepted[r.Order] = r
	return true
}

func (t *tally) end(o *Outcome) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if o.Completed {
		t.completed++
	} else {
		t.compensated++
	}
}

func (t *tally) lose(j job, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lost = append(t.lost, complaint{j.line, fmt.Errorf("order %d has not ended: %w", j.order.ID, err)})
}

func (t *tally) call(took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls = append(t.calls, took)
}

func (t *tally) repeat() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.repeated++
}

// ping asks a service through the discovery protocol of NATS if it is there.
func ping(ctx context.Context, nc *nats.Conn, service string) error {
	_, err := nc.RequestWithContext(ctx, "$SRV.PING."+service+"-v1", nil)
	if err != nil {
		return fmt.Errorf("the service %s does not answer: %w", service, err)
	}
	return nil
}

// await waits until a service answers.
func await(ctx context.Context, nc *nats.Conn, service string) error {
	for {
		err := ping(ctx, nc, service)
		if err == nil || ctx.Err() != nil {
			return err
		}
		pause(ctx, 50*time.Millisecond)
	}
}
