package bus

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// Parked reads and releases the parked keys of [Ordered] subscriptions: a key whose handler returned [postrider.Park] waits
// with all of its messages, in their order, until somebody has seen to it. It is safe for concurrent use, and so are several
// operators at once.
type Parked struct{ letters *DeadLetters }

// Parked returns the parked keys of all groups. It works whether or not the bus runs, and from any process.
func (b *Bus) Parked() *Parked {
	return &Parked{&DeadLetters{
		bus: b, what: "parked messages", stream: b.prefixed(parkedStreamName), prefix: parkedPrefix, log: parkLogPrefix,
	}}
}

// ParkedFilter selects parked keys: those for which all that is set holds. The zero value selects all.
type ParkedFilter struct {
	Group string // of this group
	Topic string // of the group's subscription to this topic, with its wildcards if it has some
	Key   string // this partition key
}

// ParkedKey is a key of a group's subscription that is parked.
type ParkedKey struct {
	Group, Topic, Key string

	Messages int            // that wait
	Code     postrider.Code // class of the error that it was parked for; OK if that message was discarded
	Cause    string         // its text
	Attempts int            // how often that message was handled
	Since    time.Time      // when the first message that waits was parked
}

// subjects returns what the server can select by.
func (f ParkedFilter) subjects(b *Bus) string {
	topic := ">"
	if f.Topic != "" {
		topic = withoutWildcards(f.Topic) + "." + cmp.Or(keyToken(f.Key), "*") + parkedMessages
	}
	return b.subject(parkedPrefix + cmp.Or(f.Group, "*") + "." + topic)
}

func (f ParkedFilter) match(l *DeadLetter) bool {
	return (f.Group == "" || f.Group == l.Group) && (f.Topic == "" || f.Topic == l.Subscription) && (f.Key == "" || f.Key == l.Key)
}

func (f ParkedFilter) validate() error {
	if f.Group != "" && !isToken(f.Group) {
		return postrider.Errorf(postrider.InvalidArgument, "bus: ParkedFilter.Group is %q: want letters, digits, - and _", f.Group)
	}
	if f.Topic != "" && !isAddress(withoutWildcards(f.Topic)) {
		return postrider.Errorf(postrider.InvalidArgument, "bus: ParkedFilter.Topic is %q: want the topic of a subscription", f.Topic)
	}
	return nil
}

// Keys returns up to limit parked keys, by group, topic and key, and where the next page begins: pass next as after; it is
// "" when there are no more. Limit is 1 to 1000, 0 means 100.
func (p *Parked) Keys(ctx context.Context, f ParkedFilter, after string, limit int) (keys []ParkedKey, next string, err error) {
	if limit = cmp.Or(limit, 100); limit < 0 || limit > 1000 {
		return nil, "", postrider.Errorf(postrider.InvalidArgument, "bus: read parked keys: limit is %d: want 1 to 1000", limit)
	}
	stream, subjects, err := p.subjects(ctx, f)
	if err != nil {
		return nil, "", err
	}
	last := ""
	for _, s := range subjects {
		if s.subject <= after {
			continue
		}
		if len(keys) == limit {
			return keys, last, nil
		}
		first, err := p.next(ctx, stream, s.subject, 1)
		if err != nil {
			return nil, "", err
		}
		if first == nil || !f.match(first) {
			continue // released meanwhile
		}
		k := ParkedKey{
			Group: first.Group, Topic: first.Subscription, Key: first.Key, Messages: int(min(s.messages, 1<<31-1)),
			Code: first.Code, Cause: first.Cause, Attempts: first.Attempts, Since: first.At,
		}
		again, err := stream.GetLastMsgForSubject(ctx, causeSubject(s.subject))
		if err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
			return nil, "", fromNATS("bus: read parked keys", err)
		}
		if err == nil && again.Header.Get(headerLetter) == strconv.FormatUint(first.Sequence, 10) {
			l := parseDeadLetter(0, again.Header, nil)
			k.Code, k.Cause, k.Attempts = l.Code, l.Cause, l.Attempts
		}
		keys, last = append(keys, k), s.subject
	}
	return keys, "", nil
}

type parkedSubject struct {
	subject  string
	messages uint64
}

// subjects returns the subjects of the keys that a filter may select, sorted. There are none before the first bus with an
// ordered subscription ran.
func (p *Parked) subjects(ctx context.Context, f ParkedFilter) (jetstream.Stream, []parkedSubject, error) {
	if err := f.validate(); err != nil {
		return nil, nil, err
	}
	const op = "bus: read parked keys"
	stream, err := p.letters.bus.js.Stream(ctx, p.letters.stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, nil, nil
	} else if err != nil {
		return nil, nil, fromNATS(op, err)
	}
	info, err := stream.Info(ctx, jetstream.WithSubjectFilter(f.subjects(p.letters.bus)))
	if err != nil {
		return nil, nil, fromNATS(op, err)
	}
	var subjects []parkedSubject
	for s, n := range info.State.Subjects {
		if strings.HasSuffix(s, parkedMessages) && (f.Key == "" || tokenOf(s) == keyToken(f.Key)) {
			subjects = append(subjects, parkedSubject{s, n})
		}
	}
	slices.SortFunc(subjects, func(a, b parkedSubject) int { return cmp.Compare(a.subject, b.subject) })
	return stream, subjects, nil
}

// next returns the first message from a sequence on whose subject matches, nil if there is none.
func (p *Parked) next(ctx context.Context, stream jetstream.Stream, subject string, from uint64) (*DeadLetter, error) {
	raw, err := stream.GetMsg(ctx, from, jetstream.WithGetMsgSubject(subject))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, nil
	} else if err != nil {
		return nil, fromNATS("bus: read parked messages", err)
	}
	l := parseDeadLetter(raw.Sequence, raw.Header, raw.Data)
	return &l, nil
}

// Messages returns up to limit messages of the keys that a filter selects, oldest first, which is the order of each key.
// They have the form of dead letters; Code and Cause are those of the error that the key was parked for, OK and "" in the
// messages behind. Pages are those of [DeadLetters.List].
func (p *Parked) Messages(ctx context.Context, f ParkedFilter, after uint64, limit int) (messages []DeadLetter, next uint64, err error) {
	return page(limit, func(fn func(uint64, DeadLetter) bool) error {
		stream, subjects, err := p.subjects(ctx, f)
		if err != nil || len(subjects) == 0 {
			return err
		}
		selected := map[string]bool{}
		for _, s := range subjects {
			selected[s.subject] = true
		}
		all := f.subjects(p.letters.bus)
		if len(subjects) == 1 {
			all = subjects[0].subject
		}
		for {
			raw, err := stream.GetMsg(ctx, after+1, jetstream.WithGetMsgSubject(all))
			if errors.Is(err, jetstream.ErrMsgNotFound) {
				return nil
			} else if err != nil {
				return fromNATS("bus: read parked messages", err)
			}
			after = raw.Sequence
			if !selected[raw.Subject] {
				continue
			}
			if l := parseDeadLetter(raw.Sequence, raw.Header, raw.Data); f.match(&l) && !fn(l.Sequence, l) {
				return nil
			}
		}
	})
}

// Release has the messages of the keys that a filter selects handled: those of each key one after the other, in their order,
// with attempts that start at 1, and then what came meanwhile, until the key is as any other. If one parks again, the key
// is parked again from there on; what ends in the dead letters does not hold up the rest. The result is how many keys
// were told to go on, Action.Rate of them a second; they are released by the instances of the group, when they run.
//
// While a key is released, [postrider.Delivery].Sequence and Fence grow as always; a crash in the middle repeats the message
// that was being handled, and no other. Errors: InvalidArgument, and those of the server.
func (p *Parked) Release(ctx context.Context, f ParkedFilter, a Action) (int, error) {
	const op = "bus: release parked keys"
	if err := a.validate(op); err != nil {
		return 0, err
	}
	stream, subjects, err := p.subjects(ctx, f)
	if err != nil {
		return 0, err
	}
	turn, done := a.pacer(), 0
	for _, s := range subjects {
		if !turn.wait(ctx.Done()) {
			return done, fromNATS(op, ctx.Err())
		}
		first, err := p.next(ctx, stream, s.subject, 1)
		if err != nil {
			return done, err
		}
		if first == nil || !f.match(first) {
			continue
		}
		id := actionRelease + "." + postrider.NewID()
		entry := a.header(actionRelease)
		maps.Copy(entry, first.notes)
		entry[headerLetter] = []string{strconv.FormatUint(first.Sequence, 10)}
		log := parkLogPrefix + first.Group + "." + withoutWildcards(first.Subscription)
		if _, err := p.letters.store(ctx, op, p.letters.message(log, id, entry, nil)); err != nil {
			return done, err
		}
		if err := p.letters.bus.sendRelease(ctx, first.Group, first.Subscription, first.Key, releaseKey, id); err != nil {
			return done, err
		}
		done++
	}
	return done, nil
}

// Discard removes parked messages for good, by their sequences. The log keeps their headers, not their data. Once the message
// that a key was parked for is gone, the rest of the key is released. The result is how many were removed. Those that cannot
// be removed stay, the others are taken; the error joins the reasons: NotFound (no such message any more), DataLoss (see
// [DeadLetters.Get]). An error that passes, and the end of ctx, end it at once.
func (p *Parked) Discard(ctx context.Context, sequences []uint64, a Action) (int, error) {
	return p.letters.act(ctx, actionDiscard, sequences, false, a, p.discard)
}

// DiscardAll removes all messages of the keys that a filter selects now. See [Parked.Discard].
func (p *Parked) DiscardAll(ctx context.Context, f ParkedFilter, a Action) (int, error) {
	if err := a.validate("bus: discard parked messages"); err != nil {
		return 0, err
	}
	var sequences []uint64
	for after := uint64(0); ; {
		messages, next, err := p.Messages(ctx, f, after, 1000)
		if err != nil {
			return 0, err
		}
		for _, m := range messages {
			sequences = append(sequences, m.Sequence)
		}
		if after = next; after == 0 {
			break
		}
	}
	slices.Reverse(sequences) // so that nothing is released because what was before it is gone
	return p.letters.act(ctx, actionDiscard, sequences, true, a, p.discard)
}

func (p *Parked) discard(ctx context.Context, l *DeadLetter, a Action) error {
	b := p.letters.bus
	if l.Group == "" { // what was noted about one
		return postrider.Errorf(postrider.NotFound, "bus: discard parked messages: %d is none", l.Sequence)
	}
	stream, err := b.js.Stream(ctx, p.letters.stream)
	if err != nil {
		return fromNATS("bus: discard parked messages", err)
	}
	first, err := p.next(ctx, stream, b.parkedSubject(l.Group, l.Subscription, keyToken(l.Key)), 1)
	if err != nil {
		return err
	}
	if err := p.letters.discard(ctx, l, a); err != nil || first == nil || first.Sequence != l.Sequence {
		return err
	}
	id := "rest." + p.letters.epoch(l)
	return b.sendRelease(ctx, l.Group, l.Subscription, l.Key, releaseRest, id)
}

// Log returns up to limit entries, oldest first, about what was released and discarded of the keys that a filter selects.
// The Letter of a release has the headers of the message that was the first of its key. Pages are those of
// [DeadLetters.List].
func (p *Parked) Log(ctx context.Context, f ParkedFilter, after uint64, limit int) (entries []LogEntry, next uint64, err error) {
	if err := f.validate(); err != nil {
		return nil, 0, err
	}
	stream, err := p.letters.bus.js.Stream(ctx, p.letters.stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, 0, nil
	} else if err != nil {
		return nil, 0, fromNATS("bus: read the log of parked keys", err)
	}
	subject := p.letters.bus.subject(parkLogPrefix + cmp.Or(f.Group, "*") + ".>")
	return page(limit, func(fn func(uint64, LogEntry) bool) error {
		for {
			raw, err := stream.GetMsg(ctx, after+1, jetstream.WithGetMsgSubject(subject))
			if errors.Is(err, jetstream.ErrMsgNotFound) {
				return nil
			} else if err != nil {
				return fromNATS("bus: read the log of parked keys", err)
			}
			after = raw.Sequence
			if e := parseLogEntry(after, &nats.Msg{Header: raw.Header, Data: raw.Data}); f.match(&e.Letter) && !fn(after, e) {
				return nil
			}
		}
	})
}
