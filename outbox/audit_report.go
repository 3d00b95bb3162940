package outbox

import (
	"fmt"
	"strings"
	"time"

	"github.com/postrider/postrider"
)

// AuditReport is what [Audit] found. Of Messages, each is Delivered, InFlight, Dead or Lost; what is delivered may be Doubled,
// OutOfOrder and Unhandled besides.
type AuditReport struct {
	// Messages counts the messages of the outbox, rows with the same source and id as one.
	Messages int

	// Delivered counts those that a stream has.
	Delivered int

	// InFlight are those that the relay has not sent yet, and delayed ones that are not due.
	InFlight AuditFinding

	// Dead are those that the streams refused for good, and that were not published again.
	Dead AuditFinding

	// Lost are those that the relay took for sent and no stream has. Nothing may be lost.
	Lost AuditFinding

	// Doubled counts the further copies of messages in the streams. What a relay repeats after a crash the server drops
	// within its duplicate window; beyond that it is for the consumer to tell, with package idempotency.
	Doubled AuditFinding

	// OutOfOrder are those that stand in a stream behind a later message of their key. A delayed message, and one that was
	// published several times, has no place in the order.
	OutOfOrder AuditFinding

	// Unhandled are those in the streams that the Consumer has not handled, if an Inbox was given; they may be on their way to
	// it.
	Unhandled AuditFinding

	// Others counts the messages in the streams that are not of this outbox or this time.
	Others int
}

// AuditFinding counts messages and names the first of them.
type AuditFinding struct {
	Count    int
	Examples []AuditMessage // in the order of their numbers
}

// AuditMessage is one message of an outbox.
type AuditMessage struct {
	Number  int64              // that orders the outbox
	At      time.Time          // when it was published
	Message *postrider.Message // without its data
}

// OK says that nothing is lost, doubled or out of order.
func (r *AuditReport) OK() bool { return r.Lost.Count+r.Doubled.Count+r.OutOfOrder.Count == 0 }

func (r *AuditReport) findings() []*AuditFinding {
	return []*AuditFinding{&r.Lost, &r.Doubled, &r.OutOfOrder, &r.InFlight, &r.Dead, &r.Unhandled}
}

// String returns the counts on one line, and a line for each example.
func (r *AuditReport) String() string {
	var text strings.Builder
	fmt.Fprintf(&text, "%d messages: %d delivered, %d in flight, %d dead, %d lost; %d doubled, %d out of order, %d unhandled; %d others",
		r.Messages, r.Delivered, r.InFlight.Count, r.Dead.Count, r.Lost.Count,
		r.Doubled.Count, r.OutOfOrder.Count, r.Unhandled.Count, r.Others)
	for i, kind := range []string{"lost", "doubled", "out of order", "in flight", "dead", "unhandled"} {
		for _, m := range r.findings()[i].Examples {
			fmt.Fprintf(&text, "\n%s: %v", kind, m)
		}
	}
	return text.String()
}

// String names the message.
func (m AuditMessage) String() string {
	text := fmt.Sprintf("number %d, %s", m.Number, m.At.UTC().Format(time.RFC3339Nano))
	if m.Message == nil {
		return text
	}
	text += fmt.Sprintf(", %s, %s %s", m.Message.Topic, m.Message.Source, m.Message.ID)
	if key := m.Message.Key(); key != "" {
		text += ", key " + key
	}
	return text
}
