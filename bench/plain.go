package main

import (
	"context"
	"errors"
	"hash/maphash"
	"strconv"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"
)

// plain is the program that one writes by hand with nats.go: the same CloudEvents headers, the same message id, the same
// acknowledgements, as the client library's documentation shows it.
type plain struct {
	connections
	site
	pubJS, subJS jetstream.JetStream
}

func openPlain(_ context.Context, s site) (session, error) {
	c, err := connect(s.url)
	if err != nil {
		return nil, err
	}
	pubJS, err := jetstream.New(c.pub)
	if err != nil {
		return nil, err
	}
	subJS, err := jetstream.New(c.sub)
	if err != nil {
		return nil, err
	}
	return &plain{connections: c, site: s, pubJS: pubJS, subJS: subJS}, nil
}

func (p *plain) message(v *value) (*nats.Msg, error) {
	data, err := proto.Marshal(v)
	if err != nil {
		return nil, err
	}
	id := uuid.NewString()
	h := nats.Header{
		"ce-specversion":     {"1.0"},
		"ce-id":              {id},
		"ce-source":          {source},
		"ce-type":            {subject},
		"ce-time":            {time.Now().UTC().Format(time.RFC3339Nano)},
		"ce-datacontenttype": {contentType},
		nats.MsgIdHdr:        {source + "#" + id},
	}
	if p.keyed {
		h["ce-partitionkey"] = []string{strconv.FormatUint(key(v), 10)}
	}
	return &nats.Msg{Subject: subject, Header: h, Data: data}, nil
}

func (p *plain) publish(ctx context.Context, v *value) error {
	m, err := p.message(v)
	if err != nil {
		return err
	}
	_, err = p.pubJS.PublishMsg(ctx, m)
	return err
}

func (p *plain) publishAll(ctx context.Context, values []*value) error {
	futures := make([]jetstream.PubAckFuture, len(values))
	for i, v := range values {
		m, err := p.message(v)
		if err != nil {
			return err
		}
		if futures[i], err = p.pubJS.PublishMsgAsync(m); err != nil {
			return err
		}
	}
	var errs error
	for _, f := range futures {
		select {
		case <-f.Ok():
		case err := <-f.Err():
			errs = errors.Join(errs, err)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return errs
}

func (p *plain) backlog(ctx context.Context, values []*value) error {
	msgs := make([]*nats.Msg, len(values))
	for i, v := range values {
		var err error
		if msgs[i], err = p.message(v); err != nil {
			return err
		}
	}
	return storeAll(ctx, p.pub, msgs)
}

// event is what the handler of a hand-written program gets.
type event struct {
	id, source, typ, contentType, key string
	time                              time.Time
	value                             value
}

func readEvent(m jetstream.Msg) (*event, error) {
	h := m.Headers()
	e := &event{
		id: h.Get("ce-id"), source: h.Get("ce-source"), typ: h.Get("ce-type"),
		contentType: h.Get("ce-datacontenttype"), key: h.Get("ce-partitionkey"),
	}
	if h.Get("ce-specversion") != "1.0" || e.id == "" || e.source == "" || e.typ != subject || e.contentType != contentType {
		return nil, errForeign
	}
	var err error
	if e.time, err = time.Parse(time.RFC3339Nano, h.Get("ce-time")); err != nil {
		return nil, err
	}
	return e, proto.Unmarshal(m.Data(), &e.value)
}

func (p *plain) handle(ctx context.Context, n int, fn func(*value) error) (func() error, error) {
	consumer, err := p.subJS.CreateOrUpdateConsumer(ctx, p.stream, jetstream.ConsumerConfig{
		Durable: group, FilterSubject: subject, AckPolicy: jetstream.AckExplicitPolicy, AckWait: ackWait, MaxDeliver: -1,
	})
	if err != nil {
		return nil, err
	}
	handle := func(m jetstream.Msg) {
		e, err := readEvent(m)
		if err != nil {
			_ = m.TermWithReason(err.Error())
			return
		}
		if fn(&e.value) != nil {
			_ = m.NakWithDelay(retryDelay)
			return
		}
		_ = m.Ack()
	}
	lanes := make([]chan jetstream.Msg, 1)
	if p.keyed {
		lanes = make([]chan jetstream.Msg, n)
	}
	var workers sync.WaitGroup
	for i := range lanes {
		lane := make(chan jetstream.Msg, max(n, 256/len(lanes)))
		lanes[i] = lane
		for range n / len(lanes) {
			workers.Go(func() {
				for m := range lane {
					handle(m)
				}
			})
		}
	}
	seed := maphash.MakeSeed()
	deliver := func(m jetstream.Msg) {
		lane := uint64(0)
		if p.keyed {
			lane = maphash.String(seed, m.Headers().Get("ce-partitionkey")) % uint64(n)
		}
		lanes[lane] <- m
	}
	if n == 1 {
		deliver = handle // the client library calls it for one message after the other
	}
	consuming, err := consumer.Consume(deliver)
	if err != nil {
		return nil, err
	}
	return func() error {
		consuming.Drain()
		<-consuming.Closed()
		for _, lane := range lanes {
			close(lane)
		}
		workers.Wait()
		return p.sub.Flush()
	}, nil
}
