package saga

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/postrider/postrider"
)

// at is an event at a time after the start.
type at struct {
	after time.Duration
	event event
}

func TestCore(t *testing.T) {
	t.Parallel()
	const s = time.Second
	ok := func(step int, op Op) event { return event{kind: answeredOK, step: step, op: op} }
	no := func(step int, op Op) event { return event{kind: answeredNo, step: step, op: op, cause: "no"} }
	fail := func(step int, op Op, attempt int) event {
		return event{kind: failed, step: step, op: op, attempt: attempt, cause: "weather"}
	}
	timer := event{kind: woken}
	for _, c := range []struct {
		name     string
		plan     string // steps, pivot, thens; two attempts each of a minute, a second apart
		deadline time.Duration
		events   []at
		story    string // what happens after started and the first command
		status   Status
		wake     time.Duration // of the next timer, after the start; 0: none
		alarm    string
	}{
		{name: "nothing yet", plan: "s", status: Running, wake: 60 * s},
		{name: "timer before its time", plan: "s", events: []at{{59 * s, timer}}, status: Running, wake: 60 * s},
		{
			name: "time-out rests, then sends", plan: "s", events: []at{{60 * s, timer}, {61 * s, timer}},
			story: "failed n0/do 1, sent n0/do 2", status: Running, wake: 121 * s,
		},
		{
			name: "asked to wait", plan: "s", events: []at{{1 * s, event{kind: failed, op: OpDo, attempt: 1, after: time.Hour}}},
			story: "failed n0/do 1", status: Running, wake: time.Hour + s,
		},
		{
			name: "answer while it rests", plan: "ss", events: []at{{60 * s, timer}, {60 * s, ok(0, OpDo)}},
			story: "failed n0/do 1, ok n0/do 1, sent n1/do 1", status: Running, wake: 120 * s,
		},
		{
			name: "failure of an attempt that has timed out", plan: "s",
			events: []at{{60 * s, timer}, {60 * s, fail(0, OpDo, 1)}, {61 * s, timer}, {62 * s, fail(0, OpDo, 1)}},
			story:  "failed n0/do 1, late n0/do 1, sent n0/do 2, late n0/do 1", status: Running, wake: 121 * s,
		},
		{
			name: "given up and undone", plan: "ss",
			events: []at{{0, ok(0, OpDo)}, {0, fail(1, OpDo, 1)}, {s, timer}, {s, fail(1, OpDo, 2)}, {s, ok(1, OpUndo)}, {s, ok(0, OpUndo)}},
			story: "ok n0/do 1, sent n1/do 1, failed n1/do 1, sent n1/do 2, failed n1/do 2, gave_up n1/do 2, " +
				"sent n1/undo 1, ok n1/undo 1, sent n0/undo 1, ok n0/undo 1, compensated",
			status: Compensated,
		},
		{
			name: "refused", plan: "ss", events: []at{{0, ok(0, OpDo)}, {0, no(1, OpDo)}},
			story: "ok n0/do 1, sent n1/do 1, refused n1/do 1, sent n0/undo 1", status: Compensating, wake: 60 * s,
		},
		{
			name: "refused after an attempt of unknown outcome", plan: "s", events: []at{{0, fail(0, OpDo, 1)}, {s, timer}, {s, no(0, OpDo)}},
			story: "failed n0/do 1, sent n0/do 2, refused n0/do 2, sent n0/undo 1", status: Compensating, wake: 61 * s,
		},
		{
			name: "answers after the end", plan: "s", events: []at{{0, ok(0, OpDo)}, {0, ok(0, OpDo)}, {0, no(0, OpDo)}, {0, fail(0, OpDo, 1)}},
			story: "ok n0/do 1, completed, late n0/do 0, late n0/do 0, late n0/do 1", status: Completed,
		},
		{
			name: "ok while it is being undone", plan: "sp", events: []at{{0, ok(0, OpDo)}, {0, no(1, OpDo)}, {0, ok(0, OpDo)}},
			story: "ok n0/do 1, sent n1/do 1, refused n1/do 1, sent n0/undo 1, late n0/do 0", status: Compensating, wake: 60 * s,
		},
		{
			name: "pivot goes on with one alarm", plan: "p",
			events: []at{{60 * s, timer}, {61 * s, timer}, {61 * s, fail(0, OpDo, 2)}, {62 * s, timer}, {62 * s, fail(0, OpDo, 3)}},
			story:  "failed n0/do 1, sent n0/do 2, failed n0/do 2, alarm n0/do 2, sent n0/do 3, failed n0/do 3",
			status: Running, wake: 63 * s, alarm: "do of n0 failed 2 times and goes on: weather",
		},
		{
			name: "success ends the alarm", plan: "t", events: []at{{0, no(0, OpDo)}, {s, timer}, {s, ok(0, OpDo)}},
			story: "refused n0/do 1, alarm n0/do 1, sent n0/do 2, ok n0/do 2, completed", status: Completed,
		},
		{
			name: "undo refused", plan: "sp", events: []at{{0, ok(0, OpDo)}, {0, no(1, OpDo)}, {0, no(0, OpUndo)}},
			story:  "ok n0/do 1, sent n1/do 1, refused n1/do 1, sent n0/undo 1, refused n0/undo 1, alarm n0/undo 1",
			status: Compensating, wake: s, alarm: "undo of n0 was refused: no",
		},
		{
			name: "deadline", plan: "sp", deadline: 10 * s, events: []at{{10 * s, timer}},
			story: "deadline, sent n0/undo 1", status: Compensating, wake: 70 * s,
		},
		{
			name: "deadline while it rests", plan: "sp", deadline: 61 * s, events: []at{{60 * s, timer}, {61 * s, timer}},
			story: "failed n0/do 1, deadline, sent n0/undo 1", status: Compensating, wake: 121 * s,
		},
		{
			name: "reply before the deadline's timer", plan: "sp", deadline: 10 * s, events: []at{{11 * s, ok(0, OpDo)}},
			story: "ok n0/do 1, deadline, sent n0/undo 1", status: Compensating, wake: 71 * s,
		},
		{
			name: "deadline in the last step's reply", plan: "s", deadline: 10 * s, events: []at{{11 * s, ok(0, OpDo)}},
			story: "ok n0/do 1, completed", status: Completed,
		},
		{
			name: "deadline after the pivot began", plan: "spt", deadline: 10 * s,
			events: []at{{0, ok(0, OpDo)}, {10 * s, timer}, {12 * s, ok(1, OpDo)}},
			story:  "ok n0/do 1, sent n1/do 1, deadline, alarm, ok n1/do 1, sent n2/do 1", status: Running, wake: 72 * s,
		},
		{
			name: "deadline while it turns", plan: "sp", deadline: 10 * s, events: []at{{0, ok(0, OpDo)}, {0, no(1, OpDo)}, {11 * s, timer}},
			story: "ok n0/do 1, sent n1/do 1, refused n1/do 1, sent n0/undo 1", status: Compensating, wake: 60 * s,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := modelPlan(c.plan, c.deadline)
			for i := range m.nodes {
				m.nodes[i].do.timeout = time.Minute
				if m.nodes[i].undo != nil {
					m.nodes[i].undo = &m.nodes[i].do
				}
			}
			m.delay = func(postrider.RetryPolicy, int) time.Duration { return time.Second }
			got, entries := m.apply(state{}, event{kind: started}, epoch)
			for _, e := range c.events {
				before := fmt.Sprint(got)
				next, more := m.apply(got, e.event, epoch.Add(e.after))
				if fmt.Sprint(got) != before {
					t.Error("apply changed the state that it was given")
				}
				got, entries = next, append(entries, more...)
			}
			if want := strings.TrimSuffix("started, sent n0/do 1, "+c.story, ", "); tell(entries) != want {
				t.Errorf("the story is\n%s\nwant\n%s", tell(entries), want)
			}
			wake := time.Duration(0)
			if w := got.wakeAt(); !w.IsZero() {
				wake = w.Sub(epoch)
			}
			if got.Status != c.status || wake != c.wake || got.Alarm != c.alarm {
				t.Errorf("%s, wakes after %v, alarm %q; want %s, %v, %q", got.Status, wake, got.Alarm, c.status, c.wake, c.alarm)
			}
		})
	}
}

func tell(entries []Entry) string {
	var lines []string
	for _, e := range entries {
		line := string(e.Kind)
		if e.Step != "" {
			line += fmt.Sprintf(" %s/%s %d", e.Step, e.Op, e.Attempt)
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, ", ")
}

// What a released version has stored must be read by every later one.
func TestStored(t *testing.T) {
	t.Parallel()
	const stored = `{"status":"compensating","steps":[{"phase":"undoing","attempt":2,"resting":true,"wake_at":"1970-01-12T14:46:40Z"},` +
		`{"phase":"refused"},{}],"deadline":"1970-01-12T13:46:40Z","cause":"no","alarm":"look"}`
	want := state{
		Status: Compensating, Deadline: epoch, Cause: "no", Alarm: "look",
		Steps: []stepState{{Phase: Undoing, Attempt: 2, Resting: true, WakeAt: atStep}, {Phase: Refused}, {}},
	}
	var got state
	if err := json.Unmarshal([]byte(stored), &got); err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("read %v, %v; want %v", got, err, want)
	}
	if again, err := json.Marshal(want); err != nil || string(again) != stored {
		t.Errorf("written %s, %v", again, err)
	}
	release := postrider.NewMethod[struct{}, struct{}]("stock.v1/Release")
	none := func(*string) *struct{} { return nil }
	plan := Define("order.place", 1, func(s *string) string { return *s },
		Step("reserve", Send(release, none), Undo(Send(release, none))), Pivot("ship", Send(release, none)))
	if plan.def.hash != "5098ded7afa8a353" {
		t.Errorf("the plan's hash is %s: sagas that are under way would be parked", plan.def.hash)
	}
}

func FuzzAddressOf(f *testing.F) {
	id := "01a20509-be0a-7f8c-af00-0befdcb222b8"
	f.Add(id+"/reserve/do", id+"/reserve/do/17")
	f.Add(id+"/reserve/undo", "m-1")
	f.Add("//", "")
	f.Fuzz(func(t *testing.T, key, cause string) {
		m := &postrider.Message{Extensions: postrider.Extensions{
			{Name: postrider.ExtCausationID, Value: cause}, {Name: postrider.ExtIdempotencyKey, Value: key},
		}}
		a, err := addressOf(m)
		if err == nil && a.saga+"/"+a.step+"/"+string(a.op) != key {
			t.Errorf("key %q was read as %+v", key, a)
		}
		if err != nil && postrider.Retryable(err) {
			t.Errorf("key %q: a key that cannot be read will not be better later: %v", key, err)
		}
	})
}
