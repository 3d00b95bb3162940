package bus

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// Parking. A handler of an ordered subscription that returns [postrider.Park] has its message's key parked: the message,
// and all of the key that come after it, go to a stream of their own in their order, and wait there to be released.
//
//	           +--handled                                                       +--handled, next
//	owner: lane of the key --Park--> parked.<group>.<topic>.<key>.messages --releaser--Park--> stays, and what is behind
//	           +--key is parked----------^                      ^--re-driven dead letters of ordered groups
//
// A key is parked while messages of it are in the stream. What the owner of the consumer knows of it, it reads from there:
// when it takes over, before it handles anything, and when the releaser asks. So it does not matter who parked, released or
// died when. The releaser is whoever owns the group's redelivery (redelivery.go), where the command to release a key comes
// as a message: it stays there until the key is empty, and no other instance gets it meanwhile. Owner and releaser each
// keep the key's turn in lanes of their own, so the owner frees the key between two messages: see [subscription.check].
const (
	parkedStreamName = "PARKED"
	parkLogPrefix    = "parklog."
	parkedPrefix     = "parked."
	parkedMessages   = ".messages" // of a key, in their order
	parkedCause      = ".cause"    // why the first is there, if it was parked again
	parkAsk          = "parkask."  // not in a stream: the releaser asks the owner to look at a key
)

// Headers of parked messages and of the command that releases their key.
const (
	headerParkedKey = headerOwn + "Key"
	headerRelease   = headerOwn + "Release"

	releaseKey  = "key"  // whatever it was parked for
	releaseRest = "rest" // unless what it was parked for is still there
)

// maxKeyToken bounds what stands for a key in a subject: the server takes 4 KiB with all that belongs to a message.
const maxKeyToken = 128

// keyToken is the token of a subject that stands for a partition key.
func keyToken(key string) string {
	t := token(key)
	if len(t) <= maxKeyToken {
		return t
	}
	return fmt.Sprintf("%s%%~%x", t[:maxKeyToken/2], sha256.Sum256([]byte(key))) // no token of a short key has %~
}

// parkedStream makes the stream of parked messages and of fencing tokens exist. Replicas that lag behind must not answer for it.
func (b *Bus) parkedStream(ctx context.Context) (jetstream.Stream, error) {
	s := Stream{Name: b.prefixed(parkedStreamName), Topics: []string{parkedPrefix + ">", parkLogPrefix + ">", fenceTopics + ".>"}}
	s.Replicas = b.cfg.DeadLetters.Replicas
	for _, other := range b.cfg.Streams {
		s.Replicas = max(s.Replicas, other.Replicas) // as safe as the safest
	}
	want := b.streamConfig(s)
	want.AllowDirect, want.AllowRollup = false, true
	err := b.declareConfig(ctx, want, func(want *jetstream.StreamConfig, have jetstream.StreamConfig) {
		want.Replicas = max(want.Replicas, have.Replicas)
	})
	if err != nil {
		return nil, err
	}
	return b.js.Stream(ctx, want.Name)
}

// parkedSubject is where the parked messages of a key are. The topic is that of the group's subscription.
func (b *Bus) parkedSubject(group, topic, keyToken string) string {
	return b.subject(parkedPrefix + group + "." + withoutWildcards(topic) + "." + keyToken + parkedMessages)
}

func (s *subscription) parkedSubject(keyToken string) string {
	return s.bus.parkedSubject(s.cfg.group, s.handler.Topic(), keyToken)
}

func causeSubject(messages string) string {
	return strings.TrimSuffix(messages, parkedMessages) + parkedCause
}

// parked is what the owner of an ordered subscription knows of its parked keys, by their tokens. The subscription's lock
// guards it.
type parked map[string]*parkedKey

type parkedKey struct { // never changed, only replaced
	known  bool   // the fields below are from the stream
	stream string // where the last one came from
	last   uint64 // its sequence there
}

// loadParked reads which keys are parked. A new owner does so before it handles anything.
func (s *subscription) loadParked(ctx context.Context) (parked, error) {
	keys := parked{}
	info, err := s.parkedStream.Info(ctx, jetstream.WithSubjectFilter(s.parkedSubject("*")))
	if err != nil {
		return nil, err
	}
	for subject := range info.State.Subjects {
		keys[tokenOf(subject)] = &parkedKey{}
	}
	return keys, nil
}

// tokenOf returns the key's token in the subject of its parked messages.
func tokenOf(subject string) string {
	subject = strings.TrimSuffix(subject, parkedMessages)
	return subject[strings.LastIndexByte(subject, '.')+1:]
}

// parks says if an error parks the key of a message, rather than send it to the dead letters.
func (s *subscription) parks(d *delivered, err error) bool {
	return err != nil && d.lane != nil && !s.own && s.keeps(d.lane.key) && s.stops(d.message, err)
}

// stops says if nothing else of a key may be handled after an error.
func (s *subscription) stops(m *postrider.Message, err error) bool {
	return postrider.Parks(err) || s.cfg.parkFailures && !s.refuses(m, err) && !errors.Is(err, errUnwanted)
}

// keeps says if the messages of a key have their turns here. In a stream with partitions that is not so for those that a
// publisher who does not divide its messages sent with a key.
func (s *subscription) keeps(key string) bool {
	return s.partition == "" || s.partition == strconv.Itoa(partitionOf(key, s.shares))
}

// parkedOf returns what is known of a message's key, nil if that is not parked. It is asked in the key's turn, and only in the
// key's turn it changes. The lock is held.
func (s *subscription) parkedOf(d *delivered) *parkedKey {
	if len(s.parked) == 0 || d.lane == nil || !s.keeps(d.lane.key) {
		return nil
	}
	return s.parked[keyToken(d.lane.key)]
}

// park parks the key of a message, for a cause.
func (s *subscription) park(d *delivered, cause error) error {
	if err := s.parkLast(d, d.message.Delivery, cause); err != nil {
		return errors.Join(cause, err)
	}
	s.log.Warn("key parked: its messages wait until they are released with Bus.Parked", "key", d.lane.key,
		"id", d.message.ID, "type", d.message.Type, "attempts", d.message.Delivery.Attempt,
		"code", postrider.CodeOf(cause), "cause", cause.Error())
	return nil
}

// parkBehind puts a message behind those of its key that are parked. It returns false if it stays here, to be tried again.
func (s *subscription) parkBehind(d *delivered, delivery postrider.Delivery) bool {
	k, err := s.lastParked(d)
	// The acknowledgement of one that was stored may have been lost, however long ago.
	if err == nil && (k.stream != delivery.Stream || k.last < delivery.Sequence) {
		err = s.parkLast(d, delivery, nil)
	}
	if err != nil {
		s.log.Warn("not parked behind its key, it is tried again", "key", d.lane.key, "error", err)
		s.again(d)
		return false
	}
	s.answer(d.Msg, nil)
	return true
}

// again has a message taken up again in a second, which is no attempt.
func (s *subscription) again(d *delivered) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.later(d, time.Second)
}

// parkLast stores a message as the last of its key, which is parked from then on, and returns when the server has it. It
// happens in the key's turn, so the next of the key finds it parked. An owner that lost the consumer meanwhile does nothing.
// Should it lose it between this look and the store, the server refuses the message: the successor stores its own token before
// it reads which keys are parked.
func (s *subscription) parkLast(d *delivered, at postrider.Delivery, cause error) error {
	s.parking.Lock() // a server with replicas takes one message at a time under one condition
	defer s.parking.Unlock()
	s.mu.Lock()
	ours, pin, term := !s.expired() && d.isHeld(), s.pin, s.term
	s.mu.Unlock()
	if !ours {
		return errors.New("bus: park: another instance has the message") // which it tries: nobody here does
	}
	token := keyToken(d.lane.key)
	header := ownHeaders(d.Header, 14)
	maps.DeleteFunc(header, func(k string, _ []string) bool { return strings.HasPrefix(k, headerOwn) }) // of a letter published anew
	for _, h := range [...][2]string{
		{headerGroup, s.cfg.group},
		{headerTopic, s.bus.topic(d.Subject)},
		{headerSubscribed, s.handler.Topic()},
		{headerParkedKey, strconv.QuoteToASCII(d.lane.key)},
		{headerStream, at.Stream},
		{headerSequence, strconv.FormatUint(at.Sequence, 10)},
		{headerTime, formatTime(time.Now())},
		{headerMsgID, fmt.Sprintf("parked.%s.%s.%d", s.durable, at.Stream, at.Sequence)},
		{jetstream.ExpectedLastSubjSeqHeader, strconv.FormatUint(term, 10)},
		{jetstream.ExpectedLastSubjSeqSubjHeader, s.fenceSubject()},
	} {
		header[h[0]] = []string{h[1]}
	}
	if cause != nil {
		setCause(header, cause, at.Attempt)
	}
	msg := &nats.Msg{Subject: s.parkedSubject(token), Header: header, Data: d.Data}
	s.bus.fit(msg)
	ctx, cancel := context.WithTimeout(context.Background(), s.bus.cfg.PublishTimeout)
	defer cancel()
	if _, err := s.bus.pub.lane(ctx, s.fenceSubject()); err != nil { // it may not be durable any more
		return fmt.Errorf("bus: park: %w", err)
	}
	if _, err := s.bus.publishOnly(ctx, msg); err != nil {
		if api, ok := errors.AsType[*jetstream.APIError](err); ok && api.ErrorCode == errWrongSequence {
			err = errors.Join(err, s.replaced(ctx, pin))
		}
		return fmt.Errorf("bus: park: %w", err)
	}
	s.bus.stats.parked.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if d.isHeld() {
		s.parked[token] = &parkedKey{known: true, stream: at.Stream, last: at.Sequence}
	}
	return nil
}

// replaced finds out why the server has another token than ours. If no successor has the consumer, or the stream was made
// anew, this ownership begins again, with a new token.
func (s *subscription) replaced(ctx context.Context, pin string) error {
	ours, err := s.hasPin(ctx, pin)
	if ours {
		s.reset()
		s.signal()
	}
	return err
}

// lastParked finds out which message was the last of its key that was parked.
func (s *subscription) lastParked(d *delivered) (parkedKey, error) {
	if d.behind.known {
		return *d.behind, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), ackTimeout)
	defer cancel()
	last, err := s.parkedStream.GetLastMsgForSubject(ctx, s.parkedSubject(keyToken(d.lane.key)))
	if err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
		return parkedKey{}, fromNATS("bus: park", err)
	}
	if err != nil || last.Header.Get(headerLetter) != "" { // a re-driven letter has the number of long ago
		return parkedKey{}, nil
	}
	l := parseDeadLetter(last.Sequence, last.Header, nil)
	return parkedKey{stream: l.Stream, last: l.Origin}, nil
}

// listen has the owner of an ordered subscription hear the questions of the releaser, and the releaser the answers.
func (s *subscription) listen() (stop func()) {
	if s.lanes == nil {
		return func() {}
	}
	subject, take := s.askSubject(), s.hear
	if s.own {
		s.answers = s.bus.nc.NewInbox() + "."
		subject, take = s.answers+"*", s.answered
	}
	sub, err := s.bus.nc.Subscribe(subject, take)
	if err != nil {
		s.log.Error("keys will not be released by this instance", "error", err)
		return func() {}
	}
	return func() { _ = sub.Unsubscribe() }
}

// hear takes the releaser's question whether a key is parked. It waits for its turn in the lane of the key. Those who do
// not own the consumer say nothing.
func (s *subscription) hear(question *nats.Msg) {
	key := unquote(string(question.Data))
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.keeps(key) || s.parked == nil || s.draining || len(s.held) >= cap(s.queue) {
		return // it is asked again
	}
	if lane := s.lanes.byKey[key]; lane != nil {
		for _, d := range lane.waiting {
			if d.question != "" { // the releaser has given up waiting for the answer to that
				d.question = question.Reply
				return
			}
		}
	}
	d := newDelivered(&nats.Msg{})
	d.question, d.since = question.Reply, time.Now().UnixNano()
	s.hold(d)
	s.lanes.add(d, key)
}

// check looks in the stream whether a key is parked, in the key's turn: none of it is being handled, and none is stored
// behind. From here on the owner acts on what it answers.
func (s *subscription) check(d *delivered) {
	ctx, cancel := context.WithTimeout(context.Background(), ackTimeout)
	defer cancel()
	token := keyToken(d.lane.key)
	_, err := s.parkedStream.GetLastMsgForSubject(ctx, s.parkedSubject(token))
	free := errors.Is(err, jetstream.ErrMsgNotFound)
	if err != nil && !free {
		s.log.Warn("not known if a key is parked, the releaser asks again", "key", d.lane.key, "error", err)
		return
	}
	if free { // what comes now must have a larger token than what was released
		if token, err := s.takeFence(ctx, s.fenceSubject()+fenceAgain); err != nil || token == 0 {
			s.log.Debug("the next owner is asked about a parked key", "key", d.lane.key, "error", err)
			return
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.expired() || !d.isHeld() {
		return
	}
	answer := answerParked
	if free {
		answer = answerFree
		delete(s.parked, token)
	} else if s.parked[token] == nil {
		s.parked[token] = &parkedKey{}
	}
	_ = s.bus.nc.Publish(d.question, []byte(answer)) // if it is lost there is another question
}

// The owner's answers.
const (
	answerParked = "parked"
	answerFree   = "free"
)
