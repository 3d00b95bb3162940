package bus

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
)

// The instances of a group share the partitions of an ordered subscription. They tell each other that they are there, and
// each works out by itself, in the same way, which partitions are whose. What they believe may differ for a while; the
// pins of the consumers still see to it that a partition has one owner. So one that cannot be heard takes part in all
// partitions, and does no harm.
const (
	memberTopics  = "members"
	memberHere    = "here "
	memberGone    = "gone "
	announceEvery = time.Second
	memberTTL     = 2500 * time.Millisecond // less than a pin: its successors wait when it runs out
	joinWait      = 250 * time.Millisecond  // for the others to tell a new one of them
)

// members are those who serve a subscription.
type members struct {
	nc      *nats.Conn
	subject string
	id      string        // ours
	changed chan struct{} // tells that there are others now

	mu   sync.Mutex
	seen map[string]time.Time // by id
}

func newMembers(nc *nats.Conn, subject string) *members {
	return &members{nc: nc, subject: subject, id: postrider.NewID(), changed: make(chan struct{}, 1), seen: map[string]time.Time{}}
}

// hear notes what a member tells.
func (m *members) hear(msg *nats.Msg) {
	text := string(msg.Data)
	m.mu.Lock()
	defer m.mu.Unlock()
	if id, gone := strings.CutPrefix(text, memberGone); gone {
		delete(m.seen, id)
	} else if id, here := strings.CutPrefix(text, memberHere); here {
		_, known := m.seen[id]
		m.seen[id] = time.Now()
		if known {
			return
		}
		if id != m.id {
			m.announce(memberHere) // to one that has just come
		}
	}
	select {
	case m.changed <- struct{}{}:
	default:
	}
}

// announce tells the others of us. What is lost is told again.
func (m *members) announce(what string) {
	if m.nc.IsConnected() {
		_ = m.nc.Publish(m.subject, []byte(what+m.id))
	}
}

// present returns the members that were heard of lately, sorted. Without ourselves among them nobody hears us.
func (m *members) present() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.seen, func(_ string, at time.Time) bool { return time.Since(at) > memberTTL })
	if _, heard := m.seen[m.id]; !heard {
		return []string{m.id}
	}
	return slices.Sorted(maps.Keys(m.seen))
}

// assign returns which of n partitions are a member's: rendezvous hashing (Thaler and Ravishankar, 1998), where a member
// that has its fair share is passed over, so that few partitions move when a member comes or goes.
func assign(present []string, n int, id string) map[int]bool {
	fair := (n + len(present) - 1) / len(present)
	load, mine := map[string]int{}, map[int]bool{}
	for p := range n {
		var owner string
		var best uint64
		for _, m := range present {
			sum := sha256.Sum256([]byte(m + " " + strconv.Itoa(p)))
			if weight := binary.BigEndian.Uint64(sum[:]); load[m] < fair && (owner == "" || weight > best) {
				owner, best = m, weight
			}
		}
		load[owner]++
		if owner == id {
			mine[p] = true
		}
	}
	return mine
}

// runShares serves our partitions until ctx ends. One that becomes another's is drained and handed over.
func (s *subscription) runShares(ctx context.Context) error {
	m := newMembers(s.bus.nc, s.bus.subject(memberTopics+"."+s.durable))
	if sub, err := s.bus.nc.Subscribe(m.subject, m.hear); err == nil {
		defer func() { _ = sub.Unsubscribe() }()
	}
	m.announce(memberHere)
	wait := time.NewTimer(joinWait)
	select {
	case <-ctx.Done():
	case <-wait.C:
	}

	type end struct {
		partition int
		err       error
	}
	serving, ended := map[int]context.CancelFunc{}, make(chan end)
	var errs []error
	ticker := time.NewTicker(announceEvery / 4)
	defer ticker.Stop()
	announced, done := time.Now(), ctx.Done()
	for {
		var mine map[int]bool
		if ctx.Err() == nil {
			mine = assign(m.present(), s.shares, m.id)
		}
		for p, release := range serving {
			if !mine[p] {
				release()
			}
		}
		for p := range mine {
			if serving[p] != nil {
				continue
			}
			tenure, release := context.WithCancel(ctx)
			serving[p] = release
			share := s.share(p)
			go func() { ended <- end{p, share.serve(ctx, tenure)} }()
		}
		if ctx.Err() != nil && len(serving) == 0 {
			return errors.Join(errs...)
		}
		select {
		case <-done:
			done = nil
			m.announce(memberGone)
		case e := <-ended:
			serving[e.partition]()
			delete(serving, e.partition)
			errs = append(errs, e.err)
		case <-m.changed:
		case now := <-ticker.C:
			if ctx.Err() == nil && now.Sub(announced) >= announceEvery-announceEvery/8 {
				m.announce(memberHere)
				announced = now
			}
		}
	}
}

// share returns the part of the subscription that reads one partition.
func (s *subscription) share(partition int) *subscription {
	return &subscription{
		bus: s.bus, cfg: s.cfg, handler: s.handler, subject: s.subject, stream: s.stream, shares: s.shares, parkedStream: s.parkedStream,
		durable: shareName(s.durable, partition), partition: strconv.Itoa(partition),
		log: s.log.With("partition", partition), slots: s.slots, breaker: s.breaker, pacer: s.pacer,
	}
}

// shareName is the name of the consumer of a partition. The first is that of the group itself.
func shareName(durable string, partition int) string {
	if partition == 0 {
		return durable
	}
	return durable + "=p" + strconv.Itoa(partition)
}
