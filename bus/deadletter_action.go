package bus

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// Action says who does something to dead letters and why. Both are kept: see [DeadLetters.Log].
type Action struct {
	By  string // who does it. Required
	Why string // Required

	// Rate is how many letters a second are taken. Default 100. Negative: as many as can be.
	Rate int
}

// Names of the actions in the header Postrider-Action.
const (
	actionReplay  = "replay"
	actionDiscard = "discard"
	actionEdit    = "edit"
	actionRelease = "release"
)

func (a Action) pacer() *pacer {
	return &pacer{interval: time.Second / time.Duration(cmp.Or(a.Rate, 100))}
}

func (a Action) validate(op string) error {
	for _, f := range [...]struct{ name, text string }{{"By", a.By}, {"Why", a.Why}} {
		if f.text == "" || len(f.text) > maxCause {
			return postrider.Errorf(postrider.InvalidArgument,
				"%s: Action.%s has %d bytes: want 1 to %d", op, f.name, len(f.text), maxCause)
		}
	}
	return nil
}

// Replay re-drives dead letters: each goes to the group that failed, and to no other, as it was first published, with its
// id and source, and attempts that start again at 1. When it fails again it comes back as a new letter with a higher
// Redrives. The result is how many were re-driven. A group that is [Ordered] gets it in the turn of its key, never beside
// another message of the key, but after those that were handled meanwhile; if the key is parked, behind what waits.
//
// A letter is removed once a stream has the message for the group. A crash in between leaves it, and a repeat within the
// duplicate window of two minutes is dropped, two operators at once included; a later one is delivered twice, as any
// message may be.
//
// Letters that cannot be re-driven stay where they are, the others are taken; the error joins the reasons: NotFound (no
// such letter any more), FailedPrecondition (the group does not subscribe to the topic), ResourceExhausted (too large with
// its headers), DataLoss (see [DeadLetters.Get]). An error that passes, and the end of ctx, end it at once.
func (d *DeadLetters) Replay(ctx context.Context, sequences []uint64, a Action) (int, error) {
	return d.act(ctx, actionReplay, sequences, false, a, d.replay)
}

// ReplayAll re-drives the letters that a filter selects now; what comes back meanwhile is not taken again. See
// [DeadLetters.Replay].
func (d *DeadLetters) ReplayAll(ctx context.Context, f LetterFilter, a Action) (int, error) {
	return d.actAll(ctx, actionReplay, f, a, d.replay)
}

// Discard removes dead letters for good. The log keeps their headers, not their data. The result is how many were removed,
// the error as for [DeadLetters.Replay].
func (d *DeadLetters) Discard(ctx context.Context, sequences []uint64, a Action) (int, error) {
	return d.act(ctx, actionDiscard, sequences, false, a, d.discard)
}

// DiscardAll removes the letters that a filter selects now. See [DeadLetters.Discard].
func (d *DeadLetters) DiscardAll(ctx context.Context, f LetterFilter, a Action) (int, error) {
	return d.actAll(ctx, actionDiscard, f, a, d.discard)
}

func (d *DeadLetters) actAll(ctx context.Context, name string, f LetterFilter, a Action, do deed) (int, error) {
	if err := a.validate("bus: " + name + " dead letters"); err != nil {
		return 0, err
	}
	var sequences []uint64
	err := d.scan(ctx, f, 0, func(l *DeadLetter) bool { sequences = append(sequences, l.Sequence); return true })
	if err != nil {
		return 0, err
	}
	return d.act(ctx, name, sequences, true, a, do)
}

// deed is what an action does to one letter.
type deed func(ctx context.Context, l *DeadLetter, a Action) error

// act does one action to letters, one after the other, and reads each anew before: somebody else may have been faster,
// which is no error for those that a filter selected.
func (d *DeadLetters) act(ctx context.Context, name string, sequences []uint64, selected bool, a Action, do deed) (int, error) {
	op := "bus: " + name + " " + d.what
	if err := a.validate(op); err != nil {
		return 0, err
	}
	turn, done := a.pacer(), 0
	var failed []error
	for _, sequence := range sequences {
		if !turn.wait(ctx.Done()) || ctx.Err() != nil {
			return done, errors.Join(append(failed, fromNATS(op, ctx.Err()))...)
		}
		l, err := d.Get(ctx, sequence)
		if selected && errors.Is(err, postrider.NotFound) {
			continue
		}
		if err == nil {
			err = do(ctx, &l, a)
		}
		switch {
		case err == nil:
			done++
		case postrider.Retryable(err):
			return done, errors.Join(append(failed, err)...)
		case !slices.ContainsFunc(failed, func(e error) bool { return e.Error() == err.Error() }):
			failed = append(failed, err) // one reason often holds for many
		}
	}
	return done, errors.Join(failed...)
}

// replay hands a letter to its group, and only then removes it.
func (d *DeadLetters) replay(ctx context.Context, l *DeadLetter, a Action) error {
	const op = "bus: replay dead letters"
	ordered, err := d.reachable(ctx, op, l)
	if err != nil {
		return err
	}
	header := l.original()
	header[headerRedrives] = []string{strconv.Itoa(l.Redrives + 1)}
	header[headerLetter] = []string{strconv.FormatUint(l.Sequence, 10)}
	// Under its own id the message may still be in the duplicate window, which would swallow it.
	msg := d.message("", "redrive."+d.epoch(l), header, l.Data)
	if ordered && l.Key != "" {
		err = d.bus.redriveInOrder(ctx, msg, l)
	} else {
		err = d.bus.sendToGroup(ctx, l.Group, l.Subscription, msg, time.Time{})
	}
	if err != nil {
		return d.failed(op, err)
	}
	return d.settle(ctx, op, l, a.header(actionReplay), nil)
}

// redriveInOrder has a letter handled in its key's turn: as the last of the key's parked messages, which are released if
// none of them is what the key was parked for.
func (b *Bus) redriveInOrder(ctx context.Context, msg *nats.Msg, l *DeadLetter) error {
	id := msg.Header.Get(headerMsgID)
	msg.Subject = b.parkedSubject(l.Group, l.Subscription, keyToken(l.Key))
	for k, v := range map[string]string{
		headerGroup: l.Group, headerSubscribed: l.Subscription, headerParkedKey: strconv.QuoteToASCII(l.Key), headerTime: formatTime(time.Now()),
	} {
		msg.Header[k] = []string{v}
	}
	if _, err := b.publishOnly(ctx, msg); err != nil {
		return err
	}
	return b.sendRelease(ctx, l.Group, l.Subscription, l.Key, releaseRest, id)
}

// reachable makes sure that somebody will get the re-drive before the letter is given up for it. It says if the group is
// ordered.
func (d *DeadLetters) reachable(ctx context.Context, op string, l *DeadLetter) (ordered bool, _ error) {
	consumer, err := d.bus.js.Consumer(ctx, d.bus.ownStreamName(), durableName(l.Group, l.Subscription))
	switch {
	case err == nil && l.Subscription != "":
		return consumer.CachedInfo().Config.PriorityPolicy == jetstream.PriorityPolicyPinned, nil
	case err == nil, errors.Is(err, jetstream.ErrConsumerNotFound), errors.Is(err, jetstream.ErrStreamNotFound):
		return false, &postrider.Error{
			Code: postrider.FailedPrecondition, Op: op,
			Msg: fmt.Sprintf("group %s does not subscribe to %q: have it subscribe and run first", l.Group, l.Subscription),
		}
	default:
		return false, fromNATS(op, err)
	}
}

func (d *DeadLetters) discard(ctx context.Context, l *DeadLetter, a Action) error {
	return d.settle(ctx, "bus: discard "+d.what, l, a.header(actionDiscard), nil)
}

// Edit replaces a dead letter by a copy that change has changed: data, attributes, the id too if it shall count as
// another event. The topic must stay. A message that cannot be read comes to change as its Topic and Data; give it an
// ID, a Source and a Type to make an event of it. The result is the copy's sequence: it waits to be replayed like any
// letter. The original goes to the log whole, marked with its copy. Errors: InvalidArgument when the changed message is
// not valid, change's own, and those of [DeadLetters.Get].
func (d *DeadLetters) Edit(ctx context.Context, sequence uint64, change func(m *postrider.Message) error, a Action) (uint64, error) {
	op := "bus: edit dead letter " + strconv.FormatUint(sequence, 10)
	if err := a.validate(op); err != nil {
		return 0, err
	}
	l, err := d.Get(ctx, sequence)
	if err != nil {
		return 0, err
	}
	m := l.Message.Clone()
	m.Data = bytes.Clone(m.Data)
	if err := change(m); err != nil {
		return 0, fmt.Errorf("%s: %w", op, err)
	}
	header, data, err := d.edited(&l, m)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", op, err)
	}
	// A repeat after a crash is dropped as a duplicate; another change of the same letter must not be.
	id := "edit." + d.epoch(&l) + "." + contentHash(header, data)
	maps.Copy(header, l.notes)
	delete(header, headerPayload)
	header[headerCopyOf] = []string{strconv.FormatUint(sequence, 10)}
	copied, err := d.store(ctx, op, d.message(deadPrefix+l.Group+"."+l.Topic, id, header, data))
	if err != nil {
		return 0, err
	}
	done := a.header(actionEdit)
	done[headerCopy] = []string{strconv.FormatUint(copied, 10)}
	return copied, d.settle(ctx, op, &l, done, l.Data)
}

// edited returns the headers and the payload of a changed message.
func (d *DeadLetters) edited(l *DeadLetter, m *postrider.Message) (nats.Header, []byte, error) {
	if m.Topic != l.Topic {
		return nil, nil, postrider.Errorf(postrider.InvalidArgument, "the topic was changed from %q to %q: only group %s may get it again",
			l.Topic, m.Topic, l.Group)
	}
	if m.ID == "" && m.Source == "" && m.Type == "" {
		return maps.Clone(l.Header), m.Data, nil // still no event, for a handler of raw messages
	}
	if err := m.Validate(); err != nil {
		return nil, nil, err
	}
	msg := d.bus.encode(m, "")
	delete(msg.Header, headerMsgID)
	for k, v := range l.Header {
		if !strings.HasPrefix(strings.ToLower(k), headerPrefix) && !strings.EqualFold(k, headerContentType) {
			msg.Header[k] = v
		}
	}
	return msg.Header, msg.Data, nil
}

func contentHash(header nats.Header, data []byte) string {
	h := fnv.New64a()
	for _, k := range slices.Sorted(maps.Keys(header)) {
		fmt.Fprintf(h, "%q%q", k, header[k])
	}
	_, _ = h.Write(data)
	return strconv.FormatUint(h.Sum64(), 16)
}

// epoch names a letter for good: its sequence alone would come again in a stream that was deleted and made anew.
func (d *DeadLetters) epoch(l *DeadLetter) string {
	return fmt.Sprintf("%s.%d.%d", d.stream, l.Sequence, l.At.UnixNano())
}

// header returns what the log says about an action.
func (a Action) header(name string) nats.Header {
	return nats.Header{
		headerAction: {name}, headerBy: {strconv.Quote(a.By)}, headerWhy: {strconv.Quote(a.Why)},
		headerActionTime: {formatTime(time.Now())},
	}
}

// settle writes what was done with a letter to the log, and then removes it.
func (d *DeadLetters) settle(ctx context.Context, op string, l *DeadLetter, done nats.Header, data []byte) error {
	header := nats.Header(maps.Clone(l.Header))
	maps.Copy(header, l.notes)
	maps.Copy(header, done)
	header[headerLetter] = []string{strconv.FormatUint(l.Sequence, 10)}
	entry := d.message(d.log+l.Group+"."+l.Topic, d.log+done.Get(headerAction)+"."+d.epoch(l), header, data)
	d.bus.fit(entry)
	if _, err := d.store(ctx, op, entry); err != nil {
		return err
	}
	stream, err := d.bus.js.Stream(ctx, d.stream)
	if err != nil {
		return fromNATS(op, err)
	}
	if err := stream.DeleteMsg(ctx, l.Sequence); err != nil {
		if _, gone := stream.GetMsg(ctx, l.Sequence); errors.Is(gone, jetstream.ErrMsgNotFound) {
			return nil // another operator was faster
		}
		return fromNATS(op+": remove "+strconv.FormatUint(l.Sequence, 10), err)
	}
	return nil
}

func (d *DeadLetters) message(topic, id string, header nats.Header, data []byte) *nats.Msg {
	header[headerMsgID] = []string{id}
	return &nats.Msg{Subject: d.bus.subject(topic), Header: header, Data: data}
}

// store publishes a message and returns its sequence once the stream has it.
func (d *DeadLetters) store(ctx context.Context, op string, msg *nats.Msg) (uint64, error) {
	ack, err := d.bus.js.PublishMsg(ctx, msg)
	if err != nil {
		return 0, d.failed(op, err)
	}
	return ack.Sequence, nil
}

// failed says what to do about a message that could not be stored.
func (d *DeadLetters) failed(op string, err error) error {
	if errors.Is(err, nats.ErrMaxPayload) {
		return postrider.Permanent(&postrider.Error{
			Code: postrider.ResourceExhausted, Op: op, Err: err,
			Msg: fmt.Sprintf("with its headers the message is larger than the server takes (max_payload, %d bytes)", d.bus.nc.MaxPayload()),
		})
	}
	return fromNATS(op, err)
}
