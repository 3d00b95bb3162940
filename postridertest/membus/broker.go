package membus

import (
	"container/heap"
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/internal/envelope"
)

// Broker is what the buses of one test share: the streams, and the places of the groups in them. The zero value is ready
// to use. Safe for concurrent use; its fields are set before the first use.
type Broker struct {
	// Deterministic makes every run the same: one handler runs at a time, messages are handed out in the order in which
	// they were published or are due again, groups in the order in which they began, and a delay is as long as the retry
	// policy allows, without jitter. A handler must not wait for another one then.
	Deterministic bool

	// MaxDelay bounds the delay before another attempt, for tests that do not run in a bubble of testing/synctest and
	// should not wait for a policy. Default: none.
	MaxDelay time.Duration

	mu      sync.Mutex
	changed chan struct{} // closed when something can be handed out that could not before
	streams []*stream
	parked  map[string]*stream // parked messages, by the prefix of their buses
	groups  []*group
	waiting []*waiting // in the order in which they were put off
	running int        // handlers that run
	order   uint64     // of the last message queued
	fence   uint64     // of the last member that joined an ordered group
}

// stream keeps what was published to its subjects.
type stream struct {
	name     string
	subjects []string
	window   time.Duration
	messages []*stored
	log      []bus.LogEntry // of dead letters, or parked keys
	last     uint64         // sequence of the last message that was stored
	seen     map[messageID]time.Time
}

// messageID tells duplicates: one source does not use an id twice.
type messageID struct{ source, id string }

// stored is a message in a stream.
type stored struct {
	stream   string
	sequence uint64
	subject  string
	at       time.Time       // when it was stored
	expiry   time.Time       // zero: never
	key      string          // partition key
	event    []byte          // the CloudEvents protobuf format; nil: not a CloudEvent
	raw      []byte          // the data of what is not a CloudEvent
	redrives int             // how often it was re-driven
	letter   *bus.DeadLetter // of a dead letter, or a parked message, all but its Message
}

// message decodes it anew: what one handler changes, no other sees.
func (s *stored) message(topic string) (*postrider.Message, error) {
	m := &postrider.Message{Topic: topic}
	if s.event == nil {
		m.Data = slices.Clone(s.raw)
		return m, nil
	}
	return m, envelope.ParseProto(slices.Clone(s.event), m)
}

// group is one consumer: the deliveries that nobody holds.
type group struct {
	name, subject string
	topic         string // the subject without the buses' prefix
	broadcast     bool   // the place of one instance only
	paused        time.Time
	queue         deliveries
	lanes         map[string][]*delivery // of an ordered group, by key: its first is in queue or held, the others wait
	parked        *stream                // parked messages, of this group and others
	released      map[string]bool        // keys that are being released: see park.go
	members       []*subscription        // that run, in the order of their start
}

// delivery is a message on its way to a group.
type delivery struct {
	*stored
	parked  uint64 // its sequence among the parked messages, if it comes from there
	attempt int
	due     time.Time
	order   uint64
}

// deliveries is a heap, by when they are due.
type deliveries []*delivery

func (q deliveries) Len() int           { return len(q) }
func (q deliveries) Less(i, j int) bool { return q[i].before(q[j]) }
func (q deliveries) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *deliveries) Push(x any)        { *q = append(*q, x.(*delivery)) } //nolint:forcetypeassert // only deliveries
func (q *deliveries) Pop() any {
	last := len(*q) - 1
	d := (*q)[last]
	*q = (*q)[:last]
	return d
}

func (d *delivery) before(e *delivery) bool {
	if c := d.due.Compare(e.due); c != 0 {
		return c < 0
	}
	return d.order < e.order
}

// Inject stores data as a program does that knows nothing of CloudEvents. Errors: FailedPrecondition when no stream takes
// the topic, which is the address with the bus's prefix.
func (k *Broker) Inject(topic string, data []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.streamOf(topic)
	if s == nil {
		return noStream("inject", topic)
	}
	k.fire()
	k.append(s, &stored{subject: topic, raw: slices.Clone(data)})
	return nil
}

func noStream(op, subject string) error {
	return postrider.Errorf(postrider.FailedPrecondition,
		"membus: %s: no stream takes %s: declare one in bus.Config.Streams", op, subject)
}

// streamOf returns the stream that takes a subject, or nil. The lock is held, as for all that follows.
func (k *Broker) streamOf(subject string) *stream {
	for _, s := range k.streams {
		if slices.ContainsFunc(s.subjects, func(pattern string) bool { return overlap(pattern, subject) }) {
			return s
		}
	}
	return nil
}

// declare makes a stream exist and take the subjects.
func (k *Broker) declare(name string, subjects []string, window time.Duration) error {
	i := slices.IndexFunc(k.streams, func(s *stream) bool { return s.name == name })
	for _, want := range subjects {
		for j, other := range k.streams {
			for _, have := range other.subjects {
				if j != i && overlap(want, have) {
					return postrider.Errorf(postrider.FailedPrecondition,
						"membus: declare stream %s: %s overlaps with %s of stream %s", name, want, have, other.name)
				}
			}
		}
	}
	if i < 0 {
		k.streams = append(k.streams, &stream{name: name, seen: map[messageID]time.Time{}})
		i = len(k.streams) - 1
	}
	s := k.streams[i]
	s.window = window
	for _, want := range subjects {
		if !slices.Contains(s.subjects, want) {
			s.subjects = append(s.subjects, want)
		}
	}
	return nil
}

// overlap says if a subject can match both patterns. A subject is a pattern that matches itself only.
func overlap(a, b string) bool {
	at, bt := strings.Split(a, "."), strings.Split(b, ".")
	for i := 0; ; i++ {
		switch {
		case i == len(at) || i == len(bt):
			return len(at) == len(bt)
		case at[i] == ">" || bt[i] == ">":
			return true
		case at[i] != bt[i] && at[i] != "*" && bt[i] != "*":
			return false
		}
	}
}

// add stores a message.
func (s *stream) add(m *stored) {
	s.last++
	m.stream, m.sequence, m.at = s.name, s.last, time.Now()
	s.messages = append(s.messages, m)
}

// remove removes a message. It may be gone already.
func (s *stream) remove(sequence uint64) {
	s.messages = slices.DeleteFunc(s.messages, func(m *stored) bool { return m.sequence == sequence })
}

// append stores a message and queues it for every group.
func (k *Broker) append(s *stream, m *stored) {
	s.add(m)
	for _, g := range k.groups {
		if overlap(g.subject, m.subject) {
			k.queue(g, m)
		}
	}
}

// appendOnce does so unless the stream has seen the message before, within its duplicate window.
func (k *Broker) appendOnce(s *stream, m *stored, id messageID) bool {
	if at, ok := s.seen[id]; ok && time.Since(at) < s.window {
		return false
	}
	s.seen[id] = time.Now()
	k.append(s, m)
	return true
}

// queue has a group deliver a message that is new to it.
func (k *Broker) queue(g *group, m *stored) {
	k.order++
	d := &delivery{stored: m, due: m.at, order: k.order}
	if g.lanes != nil && m.key != "" {
		g.lanes[m.key] = append(g.lanes[m.key], d)
		if len(g.lanes[m.key]) > 1 {
			return
		}
	}
	heap.Push(&g.queue, d)
	k.announce()
}

// requeue has a group deliver again, after a delay, what was taken from it.
func (k *Broker) requeue(g *group, d *delivery, delay time.Duration) {
	k.order++
	heap.Push(&g.queue, &delivery{stored: d.stored, parked: d.parked, attempt: d.attempt, due: time.Now().Add(delay), order: k.order})
	k.announce()
}

// done lets the next message of a key follow one that is settled.
func (k *Broker) done(g *group, d *delivery) {
	if d.parked > 0 {
		g.parked.remove(d.parked)
		k.releaseNext(g, d.key)
		return
	}
	lane := g.lanes[d.key]
	switch {
	case len(lane) == 0: // no key, or no order
	case len(lane) == 1:
		delete(g.lanes, d.key)
	default:
		g.lanes[d.key] = lane[1:]
		heap.Push(&g.queue, lane[1])
	}
}

// announce wakes those that wait in take.
func (k *Broker) announce() {
	if k.changed != nil {
		close(k.changed)
		k.changed = nil
	}
}

// join makes a subscription a member of its group, which begins where the subscription says if it is new.
func (k *Broker) join(s *subscription) error {
	subject := s.bus.subject(s.handler.Topic())
	from := k.streamOf(subject)
	if from == nil {
		return noStream("subscribe "+s.handler.Name(), subject)
	}
	if !s.Broadcast {
		s.group = k.groupOf(s.Group, subject)
	}
	if s.group == nil {
		s.group = &group{name: s.Group, subject: subject, topic: s.handler.Topic(), broadcast: s.Broadcast}
		if s.Ordered {
			s.group.lanes = map[string][]*delivery{}
			s.group.parked, s.group.released = k.parkedOf(s.bus.cfg.Prefix), map[string]bool{}
		}
		k.groups = append(k.groups, s.group)
		for _, m := range from.messages {
			if overlap(subject, m.subject) && s.Begins(m.sequence, m.at) {
				k.queue(s.group, m)
			}
		}
	}
	if s.Ordered {
		k.fence++
		s.fence = k.fence
	}
	s.group.members = append(s.group.members, s)
	return nil
}

// groupOf returns the group that its instances share, or nil.
func (k *Broker) groupOf(name, subject string) *group {
	for _, g := range k.groups {
		if g.name == name && g.subject == subject && !g.broadcast {
			return g
		}
	}
	return nil
}

// leave is the opposite of join.
func (k *Broker) leave(s *subscription) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.part(s)
	k.announce()
}

// part takes a subscription out of its group; a broadcast's place is forgotten.
func (k *Broker) part(s *subscription) {
	s.group.members = slices.DeleteFunc(s.group.members, func(m *subscription) bool { return m == s })
	if s.Broadcast {
		k.groups = slices.DeleteFunc(k.groups, func(g *group) bool { return g == s.group })
	}
}

// take waits for a message that is due and gives it to the subscription to hold. It returns nil when ctx ends. The
// subscription may hold so many others, to handle them together.
func (k *Broker) take(ctx context.Context, s *subscription, holding int) *delivery {
	for ctx.Err() == nil {
		k.mu.Lock()
		k.fire()
		d, wait := k.next(s, holding)
		if until := k.untilNext(); d == nil && until > 0 && !s.bus.dead && (wait == 0 || until < wait) {
			wait = until
		}
		if k.changed == nil {
			k.changed = make(chan struct{})
		}
		changed := k.changed
		k.mu.Unlock()
		if d != nil {
			return d
		}
		var due <-chan time.Time // no timer without need: the clock of a bubble would jump to it
		if wait > 0 {
			due = time.After(wait)
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-due:
		}
	}
	return nil
}

// next returns what the subscription may handle now, or how long to wait for it; zero is until something changes.
func (k *Broker) next(s *subscription, holding int) (*delivery, time.Duration) {
	g := s.group
	switch {
	case s.bus.dead || len(g.queue) == 0:
		return nil, 0
	case k.Deterministic && (k.running > holding || k.first() != g && time.Until(g.paused) <= 0):
		return nil, 0
	case (k.Deterministic || s.Ordered) && g.members[0] != s: // one instance is active
		return nil, 0
	}
	d := g.queue[0]
	if wait := max(time.Until(d.due), time.Until(g.paused)); wait > 0 {
		return nil, wait
	}
	heap.Pop(&g.queue)
	if k.aside(s, d) {
		return k.next(s, holding)
	}
	d.attempt++
	k.running++
	s.held[d] = true
	return d, 0
}

// first returns the group that has the earliest message, of those that somebody serves.
func (k *Broker) first() *group {
	var first *group
	for _, g := range k.groups {
		if len(g.members) > 0 && len(g.queue) > 0 && time.Until(g.paused) <= 0 && (first == nil || g.queue[0].before(first.queue[0])) {
			first = g
		}
	}
	return first
}

// settled takes a delivery that was handled from its holder; again, if not negative, is when it comes back. It does
// nothing for a process that has died: another one has the message, or will.
func (k *Broker) settled(s *subscription, d *delivery, again time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !s.held[d] {
		return
	}
	delete(s.held, d)
	k.running--
	if again >= 0 {
		k.requeue(s.group, d, again)
	} else {
		k.done(s.group, d)
	}
	k.announce()
}
