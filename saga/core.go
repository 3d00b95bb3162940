package saga

import (
	"fmt"
	"slices"
	"time"

	"github.com/postrider/postrider"
)

// machine is the core of the engine: a pure function from a saga's state and an event to its next state and the history
// that led there. It knows no clock, no chance, no database and no types; the explorer in the tests walks it.
type machine struct {
	nodes    []node
	deadline time.Duration // of the whole saga; zero: none

	// delay draws the wait after a failed attempt, counted from 1.
	delay func(p postrider.RetryPolicy, attempt int) time.Duration
}

// node is what the core knows of a step.
type node struct {
	name string
	kind stepKind
	do   pace
	undo *pace // nil: nothing to undo
}

type stepKind string

const (
	compensatable stepKind = "step"
	pivot         stepKind = "pivot"
	retriable     stepKind = "then"
)

// pace says how long an attempt may take and how attempts follow each other.
type pace struct {
	timeout time.Duration
	retry   postrider.RetryPolicy
}

// state is what a saga is, apart from its data.
type state struct {
	Status   Status      `json:"status"`
	Steps    []stepState `json:"steps"` // as the plan's
	Deadline time.Time   `json:"deadline,omitzero"`
	Cause    string      `json:"cause,omitempty"` // why it turned round
	Alarm    string      `json:"alarm,omitempty"` // what waits for an operator
}

type stepState struct {
	Phase   Phase     `json:"phase,omitempty"`
	Attempt int       `json:"attempt,omitempty"` // of the phase in hand, from 1
	Resting bool      `json:"resting,omitempty"` // the attempt failed: WakeAt is the time of the next one
	WakeAt  time.Time `json:"wake_at,omitzero"`  // when the attempt times out, or the next one is due
}

// event is what happens to a saga.
type event struct {
	kind    eventKind
	step    int // of a reply or failure
	op      Op
	attempt int // that a failure belongs to; an answer is good whatever attempt it belongs to
	cause   string
	after   time.Duration // the wait that a failure asks for
}

type eventKind uint8

const (
	started    eventKind = iota
	answeredOK           // the participant did it
	answeredNo           // the participant refused: it did not and will not do it under this key
	failed               // an attempt's outcome is unknown
	woken                // WakeAt or the deadline has come
)

// apply returns the state after e at the time now, and what happened. Entries of kind [EntrySent] are to be carried out.
// An event that the state does not wait for changes nothing but the history.
func (m *machine) apply(s state, e event, now time.Time) (state, []Entry) {
	t := transition{machine: m, state: s, now: now}
	t.Steps = slices.Clone(s.Steps)
	switch e.kind {
	case started:
		t.Status, t.Steps = Running, make([]stepState, len(m.nodes))
		if m.deadline > 0 {
			t.Deadline = now.Add(m.deadline)
		}
		t.entries = append(t.entries, Entry{Kind: EntryStarted})
		t.next()
	case woken:
		t.wake()
	case answeredOK, answeredNo, failed:
		t.reply(e)
	}
	return t.state, t.entries
}

// wakeAt returns the earliest time at which something is due, zero for never.
func (s *state) wakeAt() time.Time {
	at := s.Deadline
	for i := range s.Steps {
		if w := s.Steps[i].WakeAt; !w.IsZero() && (at.IsZero() || w.Before(at)) {
			at = w
		}
	}
	return at
}

// transition is one call of apply.
type transition struct {
	*machine
	state
	now     time.Time
	entries []Entry
}

func (t *transition) record(kind EntryKind, step int, op Op, cause string) {
	t.entries = append(t.entries, Entry{
		Kind: kind, Step: t.nodes[step].name, Op: op, Attempt: t.Steps[step].Attempt, Cause: cause,
	})
}

// reply takes what became of an attempt, if the saga still waits for it.
func (t *transition) reply(e event) {
	step := &t.Steps[e.step]
	late := step.Phase != inHand(e.op)
	if e.kind == failed { // a failure tells about its own attempt only, and only while that is out
		late = late || step.Resting || step.Attempt != e.attempt
	}
	switch {
	case late:
		t.entries = append(t.entries, Entry{
			Kind: EntryLate, Step: t.nodes[e.step].name, Op: e.op, Attempt: e.attempt, Cause: e.cause,
		})
	case e.kind == failed:
		t.fail(e.step, e.op, e.cause, e.after)
	case e.kind == answeredOK:
		t.record(EntryOK, e.step, e.op, "")
		*step, t.Alarm = stepState{Phase: ended(e.op)}, ""
		t.next()
	default:
		t.refuse(e.step, e.op, e.cause, e.after)
	}
}

// refuse takes a participant's no. Before and at the pivot it turns the saga round. After the pivot, and in an undo,
// there is no way but on: it is an alarm and another attempt.
func (t *transition) refuse(i int, op Op, cause string, after time.Duration) {
	t.record(EntryRefused, i, op, cause)
	if op == OpUndo || t.nodes[i].kind == retriable {
		t.rest(i, op, after)
		t.alarm(i, op, "was refused: "+cause)
		return
	}
	// Of an earlier attempt nobody knows what it did or will do: then the step is undone too, which bars it.
	phase := Refused
	if t.Steps[i].Attempt > 1 {
		phase = Unknown
	}
	t.turn(i, phase, fmt.Sprintf("%s was refused: %s", t.nodes[i].name, cause))
}

// fail takes an attempt of unknown outcome: it is made again, or given up where that is allowed.
func (t *transition) fail(i int, op Op, cause string, after time.Duration) {
	t.record(EntryFailed, i, op, cause)
	attempt := t.Steps[i].Attempt
	exhausted := t.pace(i, op).retry.Exhausted(attempt)
	if exhausted && op == OpDo && t.nodes[i].kind == compensatable {
		t.record(EntryGaveUp, i, op, cause)
		t.turn(i, Unknown, fmt.Sprintf("%s was given up after %d attempts: %s", t.nodes[i].name, attempt, cause))
		return
	}
	t.rest(i, op, after)
	if exhausted {
		t.alarm(i, op, fmt.Sprintf("failed %d times and goes on: %s", attempt, cause))
	}
}

// rest waits before the next attempt.
func (t *transition) rest(i int, op Op, after time.Duration) {
	if after <= 0 {
		after = t.delay(t.pace(i, op).retry, t.Steps[i].Attempt)
	}
	t.Steps[i].Resting, t.Steps[i].WakeAt = true, t.now.Add(after)
}

// alarm calls for an operator, once until something goes right.
func (t *transition) alarm(i int, op Op, text string) {
	if t.Alarm == "" {
		t.Alarm = fmt.Sprintf("%s of %s %s", op, t.nodes[i].name, text)
		t.record(EntryAlarm, i, op, t.Alarm)
	}
}

func (t *transition) due(at time.Time) bool { return !at.IsZero() && !at.After(t.now) }

// wake does what is due: the deadline, attempts that timed out, attempts that have rested.
func (t *transition) wake() {
	if t.due(t.Deadline) {
		t.expire()
	}
	for i := range t.Steps {
		if !t.due(t.Steps[i].WakeAt) {
			continue
		}
		op := OpDo
		if t.Steps[i].Phase == Undoing {
			op = OpUndo
		}
		if t.Steps[i].Resting {
			t.send(i, op, t.Steps[i].Attempt+1)
		} else {
			t.fail(i, op, fmt.Sprintf("no reply within %v", t.pace(i, op).timeout), 0)
		}
	}
}

// expire takes the saga's deadline: it turns round while it can, else it only calls for an operator.
func (t *transition) expire() {
	t.Deadline = time.Time{}
	text := fmt.Sprintf("the deadline of %v has passed", t.deadline)
	t.entries = append(t.entries, Entry{Kind: EntryDeadline, Cause: text})
	current := -1
	for i := range t.Steps {
		switch {
		case t.Steps[i].Phase != "" && t.nodes[i].kind != compensatable:
			if t.Alarm == "" {
				t.Alarm = text
				t.entries = append(t.entries, Entry{Kind: EntryAlarm, Cause: text})
			}
			return
		case t.Steps[i].Phase == Doing:
			current = i
		}
	}
	t.turn(current, Unknown, text)
}

// turn begins the compensation. The step in hand, if there is one, ends in the given phase.
func (t *transition) turn(current int, phase Phase, cause string) {
	if current >= 0 {
		t.Steps[current] = stepState{Phase: phase}
	}
	t.Status, t.Cause, t.Deadline = Compensating, cause, time.Time{}
	t.next()
}

// next goes on to the next step, or back to the last one that may have had an effect.
func (t *transition) next() {
	if t.Status == Running {
		i := slices.IndexFunc(t.Steps, func(s stepState) bool { return s.Phase == "" })
		if i >= 0 && t.due(t.Deadline) { // its timer may come after the reply that leads here
			t.expire()
		}
		switch {
		case t.Status != Running:
		case i >= 0:
			t.send(i, OpDo, 1)
		default:
			t.finish(Completed, EntryCompleted)
		}
		return
	}
	for i, step := range slices.Backward(t.Steps) {
		if p := step.Phase; t.nodes[i].undo != nil && (p == Done || p == Unknown) {
			t.send(i, OpUndo, 1)
			return
		}
	}
	t.finish(Compensated, EntryCompensated)
}

func (t *transition) finish(status Status, kind EntryKind) {
	t.Status, t.Deadline = status, time.Time{}
	t.entries = append(t.entries, Entry{Kind: kind, Cause: t.Cause})
}

func (t *transition) send(i int, op Op, attempt int) {
	t.Steps[i] = stepState{Phase: inHand(op), Attempt: attempt, WakeAt: t.now.Add(t.pace(i, op).timeout)}
	t.record(EntrySent, i, op, "")
}

func (m *machine) pace(i int, op Op) pace {
	if op == OpUndo {
		return *m.nodes[i].undo
	}
	return m.nodes[i].do
}

// index returns the step of that name, -1 for none.
func (m *machine) index(name string) int {
	return slices.IndexFunc(m.nodes, func(n node) bool { return n.name == name })
}

// inHand is the phase of a step whose op is under way, ended that of one whose op is done.
func inHand(op Op) Phase {
	if op == OpUndo {
		return Undoing
	}
	return Doing
}

func ended(op Op) Phase {
	if op == OpUndo {
		return Undone
	}
	return Done
}
