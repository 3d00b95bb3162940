package bus

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// DeadLetters reads the dead letters of a bus and acts on them. It is safe for concurrent use, and so are several
// operators at once: see [DeadLetters.Replay].
type DeadLetters struct {
	bus    *Bus
	what   string // for errors
	stream string
	prefix string // of the letters' addresses
	log    string // of the log's
}

// DeadLetters returns the dead letters in the stream [Config.DeadLetters]. It works whether or not the bus runs.
func (b *Bus) DeadLetters() *DeadLetters {
	return &DeadLetters{bus: b, what: "dead letters", stream: b.cfg.DeadLetters.Name, prefix: deadPrefix, log: deadLogPrefix}
}

// LetterFilter selects dead letters: those for which all that is set holds. The zero value selects all.
type LetterFilter struct {
	Group       string         // of this group
	Topic       string         // published to this address; wildcards as in NATS: "orders.>"
	Code        postrider.Code // failed with this code
	Cause       string         // with this text in their cause
	Fingerprint string         // with this fingerprint: see DeadLetters.Groups
	From, To    time.Time      // given up at From or later, and before To
}

// pattern is the subject that the server can select by.
func (f LetterFilter) pattern(prefix string) string {
	return prefix + cmp.Or(f.Group, "*") + "." + cmp.Or(f.Topic, ">")
}

// match tests what the subject does not say.
func (f LetterFilter) match(l *DeadLetter) bool {
	return (f.Code == postrider.OK || f.Code == l.Code) &&
		(f.Fingerprint == "" || f.Fingerprint == l.Fingerprint) &&
		strings.Contains(l.Cause, f.Cause) &&
		(f.From.IsZero() || !l.At.Before(f.From)) &&
		(f.To.IsZero() || l.At.Before(f.To))
}

// validate refuses what would select something else than it says.
func (f LetterFilter) validate() error {
	if f.Group != "" && !isToken(f.Group) {
		return postrider.Errorf(postrider.InvalidArgument, "bus: LetterFilter.Group is %q: want letters, digits, - and _", f.Group)
	}
	if strings.ContainsAny(f.Topic, " \t\r\n") {
		return postrider.Errorf(postrider.InvalidArgument, "bus: LetterFilter.Topic is %q: want an address without spaces", f.Topic)
	}
	return nil
}

// List returns up to limit dead letters, oldest first, with sequences above after, and where the next page begins: pass
// next as after; it is 0 when there are no more. Limit is 1 to 1000, 0 means 100. There are none when the stream was never
// declared. A letter too large for the server with its headers has no Data here: [DeadLetters.Get] has it.
func (d *DeadLetters) List(ctx context.Context, f LetterFilter, after uint64, limit int) (letters []DeadLetter, next uint64, err error) {
	return page(limit, func(fn func(uint64, DeadLetter) bool) error {
		return d.scan(ctx, f, after, func(l *DeadLetter) bool { return fn(l.Sequence, *l) })
	})
}

// LogEntry says what was done with a dead letter.
type LogEntry struct {
	Sequence uint64     // of the entry
	Letter   DeadLetter // with Data only if it was edited
	Done     string     // "replay", "discard" or "edit"; of parked keys "release" or "discard"
	By, Why  string
	At       time.Time
	Copy     uint64 // the edited copy
}

// Log returns up to limit entries, oldest first, about letters that the filter selects. Pages are those of
// [DeadLetters.List].
func (d *DeadLetters) Log(ctx context.Context, f LetterFilter, after uint64, limit int) (entries []LogEntry, next uint64, err error) {
	if err := f.validate(); err != nil {
		return nil, 0, err
	}
	return page(limit, func(fn func(uint64, LogEntry) bool) error {
		return d.read(ctx, f.pattern(deadLogPrefix), after, func(sequence uint64, msg *nats.Msg) bool {
			e := parseLogEntry(sequence, msg)
			return !f.match(&e.Letter) || fn(sequence, e)
		})
	})
}

func parseLogEntry(sequence uint64, msg *nats.Msg) LogEntry {
	h := msg.Header
	letter, _ := strconv.ParseUint(h.Get(headerLetter), 10, 64)
	e := LogEntry{
		Sequence: sequence, Letter: parseDeadLetter(letter, h, msg.Data), Done: h.Get(headerAction),
		By: unquote(h.Get(headerBy)), Why: unquote(h.Get(headerWhy)),
	}
	e.At, _ = time.Parse(time.RFC3339Nano, h.Get(headerActionTime))
	e.Copy, _ = strconv.ParseUint(h.Get(headerCopy), 10, 64)
	return e
}

// page collects what read finds until there are limit items and one more.
func page[T any](limit int, read func(fn func(sequence uint64, item T) bool) error) (items []T, next uint64, err error) {
	if limit = cmp.Or(limit, 100); limit < 0 || limit > 1000 {
		return nil, 0, postrider.Errorf(postrider.InvalidArgument, "bus: read dead letters: limit is %d: want 1 to 1000", limit)
	}
	last := uint64(0)
	err = read(func(sequence uint64, item T) bool {
		if len(items) == limit {
			next = last
			return false
		}
		items, last = append(items, item), sequence
		return true
	})
	return items, next, err
}

// CauseGroup is what dead letters of one fingerprint have in common.
type CauseGroup struct {
	Fingerprint string
	Code        postrider.Code
	Cause       string    // of the latest
	Count       int       // letters
	First, Last time.Time // when the first and the last were given up
	Groups      []string  // that failed, sorted
	Topics      []string  // that they were published to, sorted
}

// Groups groups the dead letters by the fingerprints of their causes, the largest group first. It reads all that the
// filter selects, but holds one of each group only.
func (d *DeadLetters) Groups(ctx context.Context, f LetterFilter) ([]CauseGroup, error) {
	byPrint := map[string]*CauseGroup{}
	insert := func(sorted *[]string, s string) {
		if i, found := slices.BinarySearch(*sorted, s); !found {
			*sorted = slices.Insert(*sorted, i, s)
		}
	}
	err := d.scan(ctx, f, 0, func(l *DeadLetter) bool {
		g := byPrint[l.Fingerprint]
		if g == nil {
			g = &CauseGroup{Fingerprint: l.Fingerprint, Code: l.Code, First: l.At, Last: l.At}
			byPrint[l.Fingerprint] = g
		}
		g.Count++
		g.Cause = l.Cause
		if l.At.Before(g.First) {
			g.First = l.At
		}
		if l.At.After(g.Last) {
			g.Last = l.At
		}
		insert(&g.Groups, l.Group)
		insert(&g.Topics, l.Topic)
		return true
	})
	groups := make([]CauseGroup, 0, len(byPrint))
	for _, g := range byPrint {
		groups = append(groups, *g)
	}
	slices.SortFunc(groups, func(a, b CauseGroup) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Fingerprint, b.Fingerprint))
	})
	return groups, err
}

// Get returns one dead letter whole. The error is NotFound when there is none of this sequence (any more), and DataLoss
// when its payload was too large to be kept here and is no longer where it came from.
func (d *DeadLetters) Get(ctx context.Context, sequence uint64) (DeadLetter, error) {
	op := "bus: get one of the " + d.what + ": " + strconv.FormatUint(sequence, 10)
	stream, err := d.bus.js.Stream(ctx, d.stream)
	if err != nil {
		return DeadLetter{}, fromNATS(op, err)
	}
	raw, err := stream.GetMsg(ctx, sequence)
	if errors.Is(err, jetstream.ErrMsgNotFound) || err == nil && !strings.HasPrefix(raw.Subject, d.bus.subject(d.prefix)) {
		return DeadLetter{}, &postrider.Error{Code: postrider.NotFound, Op: op, Msg: "there is none: it may have been replayed or discarded"}
	} else if err != nil {
		return DeadLetter{}, fromNATS(op, err)
	}
	if err := d.bus.payload(ctx, raw); err != nil {
		return DeadLetter{}, fmt.Errorf("%s: %w", op, err)
	}
	return parseDeadLetter(sequence, raw.Header, raw.Data), nil
}

// payload gets the payload of a stored message that was too large with our headers.
func (b *Bus) payload(ctx context.Context, raw *jetstream.RawStreamMsg) error {
	if raw.Header.Get(headerPayload) != payloadAtOrigin {
		return nil
	}
	l := parseDeadLetter(raw.Sequence, raw.Header, nil)
	op := fmt.Sprintf("bus: get message %d of stream %s", l.Origin, l.Stream)
	origin, err := b.js.Stream(ctx, l.Stream)
	if err != nil {
		return fromNATS(op, err)
	}
	first, err := origin.GetMsg(ctx, l.Origin)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return &postrider.Error{
			Code: postrider.DataLoss, Op: op, Msg: "the payload was too large to be kept with the cause, and the message is gone",
		}
	} else if err != nil {
		return fromNATS(op, err)
	}
	raw.Data = first.Data
	return nil
}

// scan calls fn with the letters that a filter selects, with sequences above after, until fn returns false.
func (d *DeadLetters) scan(ctx context.Context, f LetterFilter, after uint64, fn func(*DeadLetter) bool) error {
	if err := f.validate(); err != nil {
		return err
	}
	return d.read(ctx, f.pattern(deadPrefix), after, func(sequence uint64, msg *nats.Msg) bool {
		l := parseDeadLetter(sequence, msg.Header, msg.Data)
		return !f.match(&l) || fn(&l)
	})
}

// How much one request for stored messages asks for.
const (
	readBatch = 256
	readBytes = 4 << 20
)

// read calls fn with the messages of the dead letter stream that match a topic, with sequences above after, until fn
// returns false.
func (d *DeadLetters) read(ctx context.Context, topic string, after uint64, fn func(sequence uint64, msg *nats.Msg) bool) error {
	const op = "bus: read dead letters"
	if _, err := d.bus.js.Stream(ctx, d.stream); errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil
	} else if err != nil {
		return fromNATS(op, err)
	}
	for more := true; more; {
		var batch []*nats.Msg
		var err error
		if batch, more, err = d.fetch(ctx, topic, after+1); err != nil {
			return fromNATS(op, err)
		}
		for _, msg := range batch {
			if after, err = strconv.ParseUint(msg.Header.Get("Nats-Sequence"), 10, 64); err != nil {
				return fromNATS(op, err)
			}
			if !fn(after, msg) {
				return nil
			}
		}
	}
	return nil
}

// fetch asks for a batch of stored messages from a sequence on, and says if there are more (nats-architecture-and-design:
// ADR-31, batched direct get). The server takes no note of it, so nothing is left behind.
func (d *DeadLetters) fetch(ctx context.Context, topic string, from uint64) (batch []*nats.Msg, more bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, ackTimeout)
	defer cancel()
	request, err := json.Marshal(struct {
		Seq   uint64 `json:"seq"`
		Batch int    `json:"batch"`
		Bytes int    `json:"max_bytes"`
		Next  string `json:"next_by_subj"`
	}{from, readBatch, readBytes, d.bus.subject(topic)})
	if err != nil {
		return nil, false, err
	}
	sub, err := d.bus.nc.SubscribeSync(d.bus.nc.NewInbox())
	if err != nil {
		return nil, false, err
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := d.bus.nc.PublishRequest("$JS.API.DIRECT.GET."+d.stream, sub.Subject, request); err != nil {
		return nil, false, err
	}
	for {
		msg, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			return nil, false, err
		}
		if msg.Header.Get("Nats-Sequence") != "" {
			batch = append(batch, msg)
			continue
		}
		switch status := msg.Header.Get("Status"); status {
		case "204": // the end of the batch
			return batch, msg.Header.Get("Nats-Num-Pending") != "0" && len(batch) > 0, nil
		case "404":
			return batch, false, nil
		case "503":
			return nil, false, nats.ErrNoResponders
		default:
			return nil, false, fmt.Errorf("the server answers %s %s", status, msg.Header.Get("Description"))
		}
	}
}
