package saga

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/postrider/postrider"
)

// The explorer walks every interleaving of a saga on the real core with model participants: commands and replies that
// arrive in any order, twice or never, timers that fire early, refusals, errors, a deadline. It goes breadth first, so
// that the first violation it finds has a shortest path.

// rules are the guards of the model's participants and of the core's surroundings, so that a test can switch one off.
type rules struct {
	forgetsAnswer  bool // a repeated action has its effect again
	undoesNothing  bool // an undo of what never was has an effect: no null compensation
	admitsLate     bool // an action whose undo came first has its effect: no bar
	forgetsRefusal bool // what was refused may be done when it comes again
	trustsGivenUp  bool // a step that is given up is not undone
	matchesNothing bool // a reply is taken for whatever is in hand
}

// budget bounds what goes wrong.
type budget struct{ dups, losses, early, errs int8 }

const maxSteps, maxNet = 4, 12

// world is a state of everything, comparable so that it can be looked up.
type world struct {
	status   Status
	deadline bool
	steps    [maxSteps]compactStep
	parts    [maxSteps]participant
	net      [maxNet]packet // sorted
	n        int
	left     budget
}

type compactStep struct {
	phase   int8 // index in phases
	attempt int8
	resting bool
}

var phases = []Phase{"", Doing, Done, Refused, Unknown, Undoing, Undone}

func (s compactStep) inHand() bool { return phases[s.phase] == Doing || phases[s.phase] == Undoing }

type participant struct {
	state   barrier
	did, un int8
}

type barrier int8

const (
	fresh barrier = iota
	done
	refused
	barred // its undo came first
	undone
)

// packet is a message under way.
type packet struct {
	reply, undo   bool
	step, attempt int8
	kind          eventKind // of a reply
}

func (p packet) op() Op {
	if p.undo {
		return OpUndo
	}
	return OpDo
}

func (p packet) String() string {
	what := "command"
	if p.reply {
		what = [...]string{answeredOK: "ok", answeredNo: "refusal", failed: "error"}[p.kind]
	}
	return fmt.Sprintf("%s n%d/%s/%d", what, p.step, p.op(), p.attempt)
}

func comparePackets(a, b packet) int {
	rank := func(p packet) int {
		n := (int(p.step)*16+int(p.attempt))*16 + int(p.kind)
		if p.reply {
			n += 1 << 14
		}
		if p.undo {
			n += 1 << 15
		}
		return n
	}
	return rank(a) - rank(b)
}

// exploration is one walk.
type exploration struct {
	m     machine
	rules rules
	seen  map[world]origin
	queue []world
}

type origin struct {
	from world
	how  string
}

// Times that a world does not hold: it only knows that something is due.
var (
	epoch  = time.Unix(1_000_000, 0).UTC()
	atStep = epoch.Add(time.Hour)
	atEnd  = epoch.Add(2 * time.Hour)
)

// explore returns the number of worlds, and the shortest path to a violation if there is one.
func explore(m machine, b budget, r rules) (worlds int, violation string) {
	m.delay = func(postrider.RetryPolicy, int) time.Duration { return time.Hour }
	x := &exploration{m: m, rules: r, seen: make(map[world]origin)}
	first := world{left: b}
	x.apply(&first, event{kind: started}, epoch)
	x.visit(first, world{}, "start")
	for i := 0; i < len(x.queue); i++ { //nolint:intrange // the queue grows while it is walked
		w := x.queue[i]
		if text := x.check(w); text != "" {
			return len(x.seen), x.path(w) + text
		}
		x.expand(w)
	}
	return len(x.seen), ""
}

func (x *exploration) visit(w, from world, how string) {
	if _, known := x.seen[w]; !known {
		x.seen[w] = origin{from, how}
		x.queue = append(x.queue, w)
	}
}

func (x *exploration) path(w world) string {
	var steps []string
	for {
		o := x.seen[w]
		steps = append(steps, o.how)
		if o.how == "start" {
			slices.Reverse(steps)
			return strings.Join(steps, "\n") + "\n=> "
		}
		w = o.from
	}
}

// check holds a world to what was promised.
func (x *exploration) check(w world) string {
	inEffect := 0
	for i, p := range w.parts {
		if p.did > 1 {
			return fmt.Sprintf("action %d was applied %d times", i, p.did)
		}
		if p.un > p.did {
			return fmt.Sprintf("action %d was undone without having been done", i)
		}
		inEffect += int(p.did - p.un)
	}
	switch {
	case w.n > 0: // what is under way may still change something
	case w.status == Completed && inEffect != len(x.m.nodes):
		return fmt.Sprintf("completed, but %d of %d steps are in effect", inEffect, len(x.m.nodes))
	case w.status == Compensated && inEffect != 0:
		return fmt.Sprintf("compensated, but %d steps are in effect", inEffect)
	}
	// From here on all goes well: the saga must come to its end.
	for range 40 {
		switch {
		case w.status.Ended():
			return ""
		case w.n > 0:
			w = x.deliver(w, 0, true)[0].w
		default:
			x.apply(&w, event{kind: woken}, atStep)
		}
	}
	return "a saga to which nothing more happens does not end"
}

// expand visits all that can happen next.
func (x *exploration) expand(w world) {
	for i := range w.n {
		if i > 0 && w.net[i] == w.net[i-1] {
			continue
		}
		name := w.net[i].String()
		for _, o := range x.deliver(w, i, true) {
			x.visit(o.w, w, "deliver "+name+o.how)
		}
		if w.left.dups > 0 {
			for _, o := range x.deliver(w, i, false) {
				o.w.left.dups--
				x.visit(o.w, w, "deliver a copy of "+name+o.how)
			}
		}
		if w.left.losses > 0 {
			l := w
			l.remove(i)
			l.left.losses--
			x.visit(l, w, "lose "+name)
		}
	}
	if !w.status.Ended() && (w.left.early > 0 || w.n == 0) {
		l := w
		if w.n > 0 {
			l.left.early--
		}
		x.apply(&l, event{kind: woken}, atStep)
		x.visit(l, w, "timer")
	}
	if w.deadline {
		l := w
		x.apply(&l, event{kind: woken}, atEnd)
		x.visit(l, w, "deadline")
	}
}

type outcome struct {
	w   world
	how string
}

// deliver hands packet i over; the first outcome is the one in which all goes well.
func (x *exploration) deliver(w world, i int, remove bool) []outcome {
	p := w.net[i]
	if remove {
		w.remove(i)
	}
	if p.reply {
		x.apply(&w, event{kind: p.kind, step: int(p.step), op: p.op(), attempt: int(p.attempt)}, epoch)
		return []outcome{{w, ""}}
	}
	if p.undo {
		return []outcome{{x.undo(w, p), ""}}
	}
	return x.do(w, p)
}

func (x *exploration) do(w world, p packet) []outcome {
	part := &w.parts[p.step]
	before := w
	answer := func(kind eventKind) []outcome {
		w.reply(p, kind)
		return []outcome{{w, ""}}
	}
	admitted := part.state == fresh ||
		part.state == done && x.rules.forgetsAnswer ||
		part.state == refused && x.rules.forgetsRefusal ||
		part.state == barred && x.rules.admitsLate
	switch {
	case !admitted && part.state == done:
		return answer(answeredOK)
	case !admitted:
		return answer(answeredNo)
	}
	part.state = done
	part.did++
	all := answer(answeredOK)
	if x.m.nodes[p.step].kind != retriable {
		w = before
		part.state = refused
		for _, o := range answer(answeredNo) {
			all = append(all, outcome{o.w, ", refused"})
		}
	}
	if before.left.errs > 0 {
		w = before
		w.left.errs--
		for _, o := range answer(failed) {
			all = append(all, outcome{o.w, ", an error"})
		}
	}
	return all
}

func (x *exploration) undo(w world, p packet) world {
	part := &w.parts[p.step]
	switch part.state {
	case done:
		part.state = undone
		part.un++
	case fresh, refused:
		part.state = barred
		if x.rules.undoesNothing {
			part.un++
		}
	}
	w.reply(p, answeredOK)
	return w
}

func (w *world) reply(p packet, kind eventKind) {
	p.reply, p.kind = true, kind
	w.add(p)
}

func (w *world) add(p packet) {
	if w.n == maxNet {
		panic("more messages under way than the model holds")
	}
	w.net[w.n] = p
	w.n++
	slices.SortFunc(w.net[:w.n], comparePackets)
}

func (w *world) remove(i int) {
	copy(w.net[i:], w.net[i+1:w.n])
	w.n--
	w.net[w.n] = packet{}
}

// apply runs the real core on a world.
func (x *exploration) apply(w *world, e event, now time.Time) {
	s := state{Status: w.status, Steps: make([]stepState, len(x.m.nodes))}
	if w.deadline {
		s.Deadline = atEnd
	}
	for i := range s.Steps {
		c := w.steps[i]
		s.Steps[i] = stepState{Phase: phases[c.phase], Attempt: int(c.attempt), Resting: c.resting}
		if c.inHand() {
			s.Steps[i].WakeAt = atStep
			if x.rules.matchesNothing && e.kind != started && e.kind != woken {
				e.step, e.attempt, e.op = i, int(c.attempt), OpDo
				if phases[c.phase] == Undoing {
					e.op = OpUndo
				}
			}
		}
	}
	s, entries := x.m.apply(s, e, now)
	w.status, w.deadline = s.Status, !s.Deadline.IsZero()
	for i, c := range s.Steps {
		w.steps[i] = compactStep{int8(slices.Index(phases, c.Phase)), int8(c.Attempt), c.Resting}
	}
	for _, h := range entries {
		switch {
		case h.Kind != EntrySent:
		case x.rules.trustsGivenUp && h.Op == OpUndo && slices.ContainsFunc(entries, func(g Entry) bool {
			return g.Kind == EntryGaveUp && g.Step == h.Step
		}):
			x.apply(w, event{kind: answeredOK, step: x.m.index(h.Step), op: OpUndo}, now)
		default:
			w.add(packet{step: int8(x.m.index(h.Step)), undo: h.Op == OpUndo, attempt: int8(h.Attempt)})
		}
	}
}

// modelPlan makes a plan of s(teps), a p(ivot) and t(hens), with two attempts each.
func modelPlan(kinds string, deadline time.Duration) machine {
	m := machine{deadline: deadline}
	p := pace{timeout: time.Hour, retry: postrider.RetryPolicy{Attempts: 2}}
	for i, c := range kinds {
		n := node{name: fmt.Sprint("n", i), do: p}
		switch c {
		case 's':
			n.kind, n.undo = compensatable, &p
		case 'p':
			n.kind = pivot
		case 't':
			n.kind = retriable
		}
		m.nodes = append(m.nodes, n)
	}
	return m
}

func TestExplore(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, plan string
		deadline   time.Duration
		budget     budget
		rules      rules
		violation  string // what is found, empty: nothing
	}{
		{"all guards", "sspt", 0, budget{dups: 1, losses: 1, early: 2, errs: 1}, rules{}, ""},
		{"all guards, steps", "ss", 0, budget{dups: 2, losses: 1, early: 2, errs: 1}, rules{}, ""},
		{"all guards, deadline", "spt", 2 * time.Hour, budget{dups: 1, losses: 1, early: 2, errs: 1}, rules{}, ""},
		{"forgotten refusals, nothing twice", "ss", 0, budget{losses: 1, early: 2, errs: 1}, rules{forgetsRefusal: true}, ""},

		{"forgotten refusals", "ss", 0, budget{dups: 1}, rules{forgetsRefusal: true}, "compensated, but 1 steps are in effect"},
		{"forgotten answers", "ss", 0, budget{dups: 1}, rules{forgetsAnswer: true}, "was applied 2 times"},
		{"no null compensation", "ss", 0, budget{losses: 2}, rules{undoesNothing: true}, "undone without having been done"},
		{"no bar", "ss", 0, budget{early: 4}, rules{admitsLate: true}, "steps are in effect"},
		{"given up, not undone", "ss", 0, budget{early: 4}, rules{trustsGivenUp: true}, "steps are in effect"},
		{"unmatched replies", "ss", 0, budget{dups: 1, early: 1}, rules{matchesNothing: true}, "steps are in effect"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			worlds, violation := explore(modelPlan(c.plan, c.deadline), c.budget, c.rules)
			t.Logf("%d worlds; %s", worlds, violation)
			if (violation == "") != (c.violation == "") || !strings.Contains(violation, c.violation) {
				t.Errorf("found %q, want %q", violation, c.violation)
			}
		})
	}
}
