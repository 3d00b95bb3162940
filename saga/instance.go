package saga

import (
	"encoding/json"
	"time"
)

// Status says where a saga is.
type Status string

// The states of a saga. Completed and Compensated are the ends. A Parked saga waits for an engine that knows its plan.
const (
	Running      Status = "running"
	Compensating Status = "compensating"
	Completed    Status = "completed"
	Compensated  Status = "compensated"
	Parked       Status = "parked"
)

// Ended reports whether nothing more happens.
func (s Status) Ended() bool { return s == Completed || s == Compensated }

// Phase says where a step is. The empty phase is a step that has not begun.
type Phase string

// The phases of a step. Unknown is a step that was given up and may have had an effect: it is undone like one that is Done.
const (
	Doing   Phase = "doing"
	Done    Phase = "done"
	Refused Phase = "refused"
	Unknown Phase = "unknown"
	Undoing Phase = "undoing"
	Undone  Phase = "undone"
)

// Op is one of the two things that are done with a step.
type Op string

// The operations on a step, as they stand in idempotency keys.
const (
	OpDo   Op = "do"
	OpUndo Op = "undo"
)

// Instance is one saga as it was when it was read.
type Instance struct {
	ID      string
	Plan    string // name of the plan
	Version int    // and its version
	Key     string // business key
	Status  Status
	Steps   []StepStatus
	Cause   string // why it turned round; for a parked one, why it is parked
	Alarm   string // what waits for an operator, empty when nothing does
	Data    json.RawMessage
	Started time.Time
	Updated time.Time
	Ended   time.Time // zero while it runs
	WakeAt  time.Time // when the next timer is due, zero for none
}

// StepStatus is one step of an [Instance].
type StepStatus struct {
	Name    string
	Phase   Phase
	Attempt int // of what is under way, from 1
}

// Entry is one line of a saga's history.
type Entry struct {
	Seq     int       // from 1
	At      time.Time // by the database's clock
	Kind    EntryKind
	Step    string // empty: the saga as a whole
	Op      Op
	Attempt int
	Cause   string // of a failure or refusal, the error's text
}

// EntryKind says what happened.
type EntryKind string

// What can happen to a saga.
const (
	EntryStarted     EntryKind = "started"
	EntrySent        EntryKind = "sent"        // a command or event was committed to the outbox
	EntryOK          EntryKind = "ok"          // the participant did it
	EntryRefused     EntryKind = "refused"     // the participant said no
	EntryFailed      EntryKind = "failed"      // an attempt whose outcome is unknown
	EntryGaveUp      EntryKind = "gave_up"     // no more attempts: the saga turns round
	EntryLate        EntryKind = "late"        // a reply that nobody waits for any more; it changes nothing
	EntryDeadline    EntryKind = "deadline"    // the saga's deadline passed
	EntryAlarm       EntryKind = "alarm"       // an operator should look
	EntryParked      EntryKind = "parked"      // no engine knows the plan
	EntryCompleted   EntryKind = "completed"   // the end
	EntryCompensated EntryKind = "compensated" // the other end
)
