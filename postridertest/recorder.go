package postridertest

import (
	"bytes"
	"context"
	"slices"
	"sync"

	"github.com/postrider/postrider"
)

// Recorder is a [postrider.Publisher] that keeps what is published, in memory, so that a test needs no server to see what
// its code sends. It does what every publisher does: it gives a message without a Source its own, refuses one that
// [postrider.Message.Validate] refuses, and says with a *[postrider.BatchError] which of several it did not take. The zero
// value is ready to use. Safe for concurrent use.
type Recorder struct {
	// Source is what a message without one gets. Default "//postridertest".
	Source string

	// Fail, if set, is asked about every valid message; an error refuses it. Set it before the first Publish. Calls do not
	// overlap.
	Fail func(m *postrider.Message) error

	mu   sync.Mutex
	msgs []*postrider.Message
}

var _ postrider.Publisher = (*Recorder)(nil)

// Publish records the messages in their order, those excepted that are refused. It fails when ctx has ended.
func (r *Recorder) Publish(ctx context.Context, msgs ...*postrider.Message) error {
	if err := ctx.Err(); err != nil {
		return &postrider.Error{Code: postrider.CodeOf(err), Op: "record messages", Unprocessed: true, Err: err}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	errs := make([]error, len(msgs))
	failed := false
	for i, m := range msgs {
		if errs[i] = r.record(m); errs[i] != nil {
			failed = true
		}
	}
	switch {
	case !failed:
		return nil
	case len(msgs) == 1:
		return errs[0]
	default:
		return &postrider.BatchError{Errs: errs}
	}
}

func (r *Recorder) record(m *postrider.Message) error {
	if m != nil && m.Source == "" {
		if m.Source = r.Source; m.Source == "" {
			m.Source = "//postridertest"
		}
	}
	if err := m.Validate(); err != nil {
		return err
	}
	if r.Fail != nil {
		if err := r.Fail(m); err != nil {
			return err
		}
	}
	c := m.Clone() // a publisher keeps nothing that the caller may change
	c.Data = bytes.Clone(m.Data)
	r.msgs = append(r.msgs, c)
	return nil
}

// Messages returns what was published so far, oldest first.
func (r *Recorder) Messages() []*postrider.Message {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.msgs)
}

// Reset forgets what was published so far.
func (r *Recorder) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.msgs = nil
}

// Events returns the recorded events of one topic, decoded, oldest first.
func Events[T any](r *Recorder, topic *postrider.Topic[T]) ([]postrider.Event[T], error) {
	var events []postrider.Event[T]
	for _, m := range r.Messages() {
		if m.Type != topic.Name() {
			continue
		}
		e, err := topic.Decode(m)
		if err != nil {
			return events, err
		}
		events = append(events, e)
	}
	return events, nil
}
