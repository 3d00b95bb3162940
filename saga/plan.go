package saga

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/codec"
	"github.com/postrider/postrider/internal/backoff"
)

// Plan is what a saga does, over data of type D: named steps in order, each with its action, its undo, its time-outs and
// retries. It is immutable and safe for concurrent use. Engines run it, [Plan.Start] begins one.
//
// A plan's name and step names stand in the database and in idempotency keys: they stay when Go names change. A change
// of steps needs a new version, and the old plan stays registered until its last saga has ended.
type Plan[D any] struct{ def definition }

// Name returns the plan's name, for [Engine.Find].
func (p *Plan[D]) Name() string { return p.def.name }

// AnyPlan is a [Plan] of whatever data.
type AnyPlan interface{ definition() *definition }

func (p *Plan[D]) definition() *definition {
	if p == nil {
		return nil
	}
	return &p.def
}

// definition is a plan without its type.
type definition struct {
	machine
	name    string
	version int
	hash    string
	actions [][2]action // of each step: do and undo
	newData func() any
	key     func(data any) string
}

// Part is a step of a plan, or an option of the whole: [Step], [Pivot], [Then], [On.Deadline].
type Part[D any] func(*builder)

// StepOption sets up one step: [Undo], [On.NoUndo], [On.Timeout], [On.Retry], [On.Policy]. Timeout, Retry and Policy fit an
// Undo too.
type StepOption[D any] func(*stepBuilder)

// builder collects a plan; the first thing that makes no sense is its err.
type builder struct {
	definition
	err error
}

type stepBuilder struct {
	node
	do, undo action
	noUndo   string
	errs     []string
}

// Define makes a plan. The name is tokens joined by dots ("order.place"), the version a positive number, key gives the
// business key of a saga ("o-17"): there is one saga of a plan's name and key. Define panics when the plan makes no
// sense, since plans are package variables; [NewPlan] returns the error.
func Define[D any](name string, version int, key func(*D) string, parts ...Part[D]) *Plan[D] {
	p, err := NewPlan(name, version, key, parts...)
	if err != nil {
		panic(err.Error())
	}
	return p
}

// NewPlan is [Define] for plans that are made while the program runs.
func NewPlan[D any](name string, version int, key func(*D) string, parts ...Part[D]) (*Plan[D], error) {
	b := &builder{}
	b.name, b.version, b.delay = name, version, backoff.Delay
	b.newData = func() any { return new(D) }
	if key != nil {
		b.key = func(data any) string { return key(data.(*D)) }
	}
	for i, part := range parts {
		if part == nil {
			b.fail("part %d is nil", i+1)
			continue
		}
		part(b)
	}
	if err := b.check(); err != nil {
		return nil, postrider.Errorf(postrider.InvalidArgument, "saga: plan %s version %d: %w", name, version, err)
	}
	b.hash = b.fingerprint()
	return &Plan[D]{b.definition}, nil
}

// Step is a step that can be taken back: it has an [Undo], or a reason why it needs none ([On.NoUndo]).
func Step[D any](name string, a Action[D], opts ...StepOption[D]) Part[D] {
	return newStep(name, compensatable, a, opts)
}

// Pivot is the point of no return, at most one in a plan. Refused, it turns the saga round; done, the saga completes.
// While nobody knows if it was done it is tried again without end, with an alarm after the policy's attempts.
func Pivot[D any](name string, a Action[D], opts ...StepOption[D]) Part[D] {
	return newStep(name, pivot, a, opts)
}

// Then is a step after the point of no return: it is never undone but tried again without end, with an alarm after the
// policy's attempts or when it is refused.
func Then[D any](name string, a Action[D], opts ...StepOption[D]) Part[D] {
	return newStep(name, retriable, a, opts)
}

func newStep[D any](name string, kind stepKind, a Action[D], opts []StepOption[D]) Part[D] {
	return func(b *builder) {
		s := newStepBuilder(a)
		s.name, s.kind = name, kind
		setUp(s, opts)
		b.add(s)
	}
}

// setUp applies options to a step or an undo.
func setUp[D any](s *stepBuilder, opts []StepOption[D]) {
	for i, opt := range opts {
		if opt == nil {
			s.errs = append(s.errs, fmt.Sprintf("has a nil option, number %d", i+1))
			continue
		}
		opt(s)
	}
}

func newStepBuilder[D any](a Action[D]) *stepBuilder {
	return &stepBuilder{node: node{do: pace{timeout: 30 * time.Second}}, do: a.action}
}

// Undo takes the step back when the saga turns round, in reverse order. It is tried again without end, with an alarm
// after the policy's attempts or when it is refused. It runs too when nobody knows if the step was done, so that its
// participant must take an undo of what it never did; idempotency.Compensation does.
func Undo[D any](a Action[D], opts ...StepOption[D]) StepOption[D] {
	return func(s *stepBuilder) {
		u := newStepBuilder(a)
		setUp(u, opts)
		s.errs = append(s.errs, u.errs...)
		if s.node.undo != nil || u.node.undo != nil || u.noUndo != "" {
			s.errs = append(s.errs, "has more than one Undo")
		}
		s.undo, s.node.undo = u.do, &u.node.do
	}
}

// On is where the options of a plan over D come from that do not mention D themselves. Declare one beside the plan:
//
//	var on saga.On[Order]
type On[D any] struct{}

// Deadline bounds the time of the whole saga. When it passes before the pivot the saga turns round; after that it is an
// alarm. Without it a saga has no deadline.
func (On[D]) Deadline(d time.Duration) Part[D] {
	return func(b *builder) {
		if d <= 0 {
			b.fail("Deadline is %v: want a positive duration", d)
		}
		b.deadline = d
	}
}

// Timeout is how long one attempt waits for its reply. Default 30 s.
func (On[D]) Timeout(d time.Duration) StepOption[D] {
	return func(s *stepBuilder) {
		if d <= 0 {
			s.errs = append(s.errs, fmt.Sprintf("Timeout is %v: want a positive duration", d))
		}
		s.node.do.timeout = d
	}
}

// Retry is the number of attempts, the first included; negative: without end. Default 5. What cannot be given up, a
// pivot, what follows it, an undo, raises an alarm then and goes on.
func (On[D]) Retry(attempts int) StepOption[D] {
	return func(s *stepBuilder) { s.node.do.retry.Attempts = attempts }
}

// Policy sets the number of attempts and their delays; see [On.Retry].
func (On[D]) Policy(p postrider.RetryPolicy) StepOption[D] {
	return func(s *stepBuilder) {
		if err := p.Validate(); err != nil {
			s.errs = append(s.errs, err.Error())
		}
		s.node.do.retry = p
	}
}

// NoUndo says why a [Step] needs no undo, for those who read the plan.
func (On[D]) NoUndo(why string) StepOption[D] {
	return func(s *stepBuilder) {
		if why == "" {
			s.errs = append(s.errs, "has NoUndo without a reason")
		}
		s.noUndo = why
	}
}

func (b *builder) fail(format string, args ...any) {
	if b.err == nil {
		b.err = fmt.Errorf(format, args...)
	}
}

// add checks a step against those before it.
func (b *builder) add(s *stepBuilder) {
	bad := func(format string, args ...any) {
		b.fail("%s %q %s", s.kind, s.name, fmt.Sprintf(format, args...))
	}
	for _, text := range s.errs {
		bad("%s", text)
	}
	switch {
	case !validName(s.name, "-_"):
		bad("has a bad name: want letters, digits, - and _")
	case b.index(s.name) >= 0:
		bad("is there twice: names stand in idempotency keys")
	case s.do.message == nil || s.node.undo != nil && s.undo.message == nil:
		bad("has no action: use Call, Send or Publish, with a contract and functions that are not nil")
	}
	past := "" // the step that cannot be taken back
	for _, n := range b.nodes {
		if n.kind != compensatable && past == "" {
			past = n.name
		}
	}
	switch {
	case s.kind != compensatable && (s.node.undo != nil || s.noUndo != ""):
		bad("has an undo: only a Step can be taken back")
	case s.kind == compensatable && past != "":
		bad("comes after %q, which cannot be taken back: make it a Then", past)
	case s.kind == pivot && past != "":
		bad("comes after %q: there is one point of no return", past)
	case s.kind == compensatable && s.node.undo == nil && s.noUndo == "":
		bad("has no Undo: give it one, or say with NoUndo why it needs none")
	case s.node.undo != nil && s.noUndo != "":
		bad("has both Undo and NoUndo")
	}
	b.nodes = append(b.nodes, s.node)
	b.actions = append(b.actions, [2]action{s.do, s.undo})
}

func (b *builder) check() error {
	switch {
	case !validName(b.name, "-_."):
		b.fail("the name is bad: want letters, digits, -, _ and dots")
	case b.version < 1:
		b.fail("the version must be positive")
	case b.key == nil:
		b.fail("the key function is nil")
	case len(b.nodes) == 0:
		b.fail("it has no steps")
	}
	return b.err
}

func validName(name, extra string) bool {
	return name != "" && len(name) <= 100 && strings.IndexFunc(name, func(r rune) bool {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		return !letter && !strings.ContainsRune(extra, r)
	}) < 0
}

// fingerprint is a hash of what a saga that is under way relies on: the steps, their order and kinds, and the contracts
// they speak. Time-outs and retries may change under a running saga.
func (d *definition) fingerprint() string {
	h := sha256.New()
	fmt.Fprintf(h, "%s %d\n", d.name, d.version)
	for i, n := range d.nodes {
		do, undo := d.actions[i][0], d.actions[i][1]
		fmt.Fprintf(h, "%s %s %s %s, %s %s\n", n.kind, n.name, do.verb, do.contract, undo.verb, undo.contract)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// encode and decode turn a saga's data into what is stored.
func encode(data any, limit int) (json.RawMessage, error) {
	b, err := codec.JSON.Append(nil, data)
	if err != nil {
		return nil, postrider.Errorf(postrider.InvalidArgument, "encode the saga's data: %w", err)
	}
	if limit >= 0 && len(b) > limit {
		return nil, postrider.Errorf(postrider.ResourceExhausted,
			"the saga's data are %d bytes, Config.MaxData allows %d: keep large things elsewhere and their id in the saga", len(b), limit)
	}
	return b, nil
}

func (d *definition) decode(raw json.RawMessage) (any, error) {
	data := d.newData()
	if err := codec.JSON.Unmarshal(raw, data); err != nil {
		return nil, postrider.Errorf(postrider.DataLoss, "decode the data of a saga of plan %s: %w", d.name, err)
	}
	return data, nil
}
