package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider/bench/internal/harness"
)

// cellRun is one cell as one peer runs it.
type cellRun struct {
	cell     cell
	job      job
	session  session
	pool     *pgxpool.Pool // on the peer's database
	database string
	admin    *pgxpool.Pool // on another one
	stream   jetstream.Stream
	pad      string

	numbers, works atomic.Int64 // given out
}

func (r *cellRun) run(ctx context.Context) (result, error) {
	switch r.cell.kind {
	case draining, held:
		return r.drain(ctx)
	case reading:
		return r.read(ctx)
	case latency:
		return r.latency(ctx)
	case business:
		return r.business(ctx)
	case inserting, bulk:
		return r.insert(ctx)
	case sustained:
		return r.sustained(ctx)
	case handling, remembered:
		return r.dedup(ctx)
	default:
		return r.idle(ctx)
	}
}

// orders returns n new ones.
func (r *cellRun) orders(n int) []*order {
	first := r.numbers.Add(int64(n)) - int64(n)
	all := make([]*order, n)
	for i := range all {
		all[i] = &order{Number: first + int64(i), Pad: r.pad}
	}
	return all
}

// begins is what begins the peer's transactions.
func (r *cellRun) begins() beginner {
	if s, ok := r.session.(interface{ begins() beginner }); ok {
		return s.begins()
	}
	return r.pool
}

// commit publishes n messages in a transaction of their own.
func (r *cellRun) commit(ctx context.Context, n int) error {
	orders := r.orders(n)
	return pgx.BeginFunc(ctx, r.begins(), func(tx pgx.Tx) error { return r.session.publish(ctx, tx, orders) })
}

// fill publishes a backlog.
func (r *cellRun) fill(ctx context.Context) (int64, error) {
	total := int(backlogRate * r.job.Seconds)
	for left := total; left > 0; left -= backlogGroup {
		if err := r.commit(ctx, min(backlogGroup, left)); err != nil {
			return 0, err
		}
	}
	_, err := r.pool.Exec(ctx, "analyze") // as the server does by itself, sooner or later
	return int64(total), err
}

// count returns how many messages are in the stream.
func (r *cellRun) count(ctx context.Context) (int64, error) {
	info, err := r.stream.Info(ctx)
	if err != nil {
		return 0, err
	}
	return int64(info.State.Msgs), nil
}

// await looks at the stream until it has so many messages or the time is up, and tells how many it had at first, when it was no
// longer empty, and at last.
func (r *cellRun) await(ctx context.Context, total int64, limit time.Duration) (first, last mark, err error) {
	for until := time.Now().Add(limit); ; {
		n, err := r.count(ctx)
		if err != nil {
			return first, last, err
		}
		last = mark{n, time.Now()}
		if first.n == 0 {
			first = last
		}
		if n >= total || time.Now().After(until) {
			return first, last, nil
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// mark is how many messages there were at a time.
type mark struct {
	n  int64
	at time.Time
}

// drain measures how fast a backlog goes to the stream, from the first message that is seen there.
func (r *cellRun) drain(ctx context.Context) (result, error) {
	if r.cell.kind == held { // before the backlog: what began later is what waits for it where anything does
		tx, err := r.admin.Begin(ctx)
		if err != nil {
			return result{}, err
		}
		defer tx.Rollback(context.WithoutCancel(ctx)) //nolint:errcheck // it has done nothing
		if _, err := tx.Exec(ctx, "select pg_current_xact_id()"); err != nil {
			return result{}, err
		}
	}
	total, err := r.fill(ctx)
	if err != nil {
		return result{}, err
	}
	m, err := harness.StartMeter(r.job)
	if err != nil {
		return result{}, err
	}
	began := time.Now()
	stop, err := r.session.relay(ctx)
	if err != nil {
		return result{}, err
	}
	first, last, err := r.await(ctx, total, 2*r.job.Duration()+time.Second)
	res, stopErr := m.Stop(max(last.n, 1))
	res.Messages = last.n
	if took := last.at.Sub(first.at).Seconds(); last.n > first.n {
		res.Rate = float64(last.n-first.n) / took
	} else { // all of it between two looks, or nothing
		res.Rate = float64(last.n) / last.at.Sub(began).Seconds()
	}
	if err := errors.Join(err, stopErr, stop()); err != nil {
		return res, err
	}
	if last.n < total { // it was not given the time: what was left is not lost
		total = 0
	}
	return r.check(ctx, res, total)
}

// read measures the relay without a stream.
func (r *cellRun) read(ctx context.Context) (result, error) {
	total, err := r.fill(ctx)
	if err != nil {
		return result{}, err
	}
	rider, ok := r.session.(*rider)
	if !ok {
		return result{}, errors.New("only Postrider reads without a stream")
	}
	m, err := harness.StartMeter(r.job)
	if err != nil {
		return result{}, err
	}
	var s sink
	stop, err := rider.relayTo(ctx, &s)
	if err != nil {
		return result{}, err
	}
	for s.n.Load() == 0 && ctx.Err() == nil {
		time.Sleep(100 * time.Microsecond)
	}
	first := mark{s.n.Load(), time.Now()}
	for s.n.Load() < total && ctx.Err() == nil {
		time.Sleep(100 * time.Microsecond)
	}
	last := mark{s.n.Load(), time.Now()}
	res, err := m.Stop(total)
	res.Rate, res.Lost = float64(last.n-first.n)/last.at.Sub(first.at).Seconds(), max(total-last.n, 0)
	return res, errors.Join(ctx.Err(), err, stop())
}

// latency commits at a steady pace, whether or not what came before has arrived, and takes the time from the end of COMMIT
// until a subscriber of the stream has the message.
func (r *cellRun) latency(ctx context.Context) (result, error) {
	total := int(2 * r.job.Seconds * pace)
	committed, arrived := make([]atomic.Int64, total), make([]atomic.Int64, total)
	var missing atomic.Int64
	missing.Store(int64(total))
	done := make(chan struct{})
	began := time.Now()
	consumer, err := r.stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{})
	if err != nil {
		return result{}, err
	}
	consuming, err := consumer.Consume(func(m jetstream.Msg) {
		now := time.Since(began)
		n, err := number(m.Data())
		if err == nil && n < int64(total) && arrived[n].CompareAndSwap(0, int64(now)) && missing.Add(-1) == 0 {
			close(done)
		}
	})
	if err != nil {
		return result{}, err
	}
	defer consuming.Stop()
	stop, err := r.session.relay(ctx)
	if err != nil {
		return result{}, err
	}
	m, err := harness.StartMeter(r.job)
	if err != nil {
		return result{}, errors.Join(err, stop())
	}
	errs := make([]error, total)
	var wg sync.WaitGroup
	for n, start := 0, time.Now(); n < total; n++ {
		time.Sleep(time.Until(start.Add(time.Duration(n) * time.Second / pace)))
		wg.Go(func() {
			orders := r.orders(1)
			errs[n] = pgx.BeginFunc(ctx, r.begins(), func(tx pgx.Tx) error { return r.session.publish(ctx, tx, orders) })
			committed[orders[0].Number].Store(int64(time.Since(began)))
		})
	}
	wg.Wait()
	err = errors.Join(errs...)
	select {
	case <-done:
	case <-time.After(drainTime):
		err = errors.Join(err, fmt.Errorf("%d of %d messages have not arrived", missing.Load(), total))
	}
	res, stopErr := m.Stop(int64(total))
	if err := errors.Join(err, stopErr, stop()); err != nil {
		return res, err
	}
	delays := make([]time.Duration, total)
	for n := range delays {
		delays[n] = max(0, time.Duration(arrived[n].Load()-committed[n].Load())) // it may have been faster than COMMIT's answer
	}
	delays = delays[total/10:] // these warm up
	slices.Sort(delays)
	res.P50, res.P99 = delays[len(delays)/2], delays[len(delays)*99/100]
	return r.check(ctx, res, int64(total))
}

func number(data []byte) (int64, error) {
	o := order{Number: -1}
	err := json.Unmarshal(data, &o)
	if err == nil && o.Number < 0 {
		err = errors.New("a message that nobody published")
	}
	return o.Number, err
}

// check reads the stream: each number below total, if that is not 0, must be there, and none twice.
func (r *cellRun) check(ctx context.Context, res result, total int64) (result, error) {
	n, err := r.count(ctx)
	if err != nil || n == 0 {
		res.Lost = total
		return res, err
	}
	consumer, err := r.stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{})
	if err != nil {
		return res, err
	}
	msgs, err := consumer.Messages(jetstream.PullMaxMessages(5000))
	if err != nil {
		return res, err
	}
	defer msgs.Stop()
	seen, last := map[int64]bool{}, map[int64]int64{}
	for range n {
		m, err := msgs.Next(jetstream.NextContext(ctx))
		if err != nil {
			return res, err
		}
		number, err := number(m.Data())
		if err != nil {
			return res, err
		}
		if seen[number] {
			res.Twice++
			continue
		}
		seen[number] = true
		if _, keyed := r.session.(*rider); keyed && r.cell.kind == draining {
			if last[number%keys] > number {
				res.Disorder++
			}
			last[number%keys] = number
		}
	}
	for number := range total {
		if !seen[number] {
			res.Lost++
		}
	}
	return res, nil
}
