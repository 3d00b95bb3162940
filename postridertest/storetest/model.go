package storetest

import (
	"fmt"

	"github.com/anishathalye/porcupine"
)

// verb is one of the four methods.
type verb string

const (
	claims    verb = "claim"
	renews    verb = "renew"
	completes verb = "complete"
	releases  verb = "release"
)

// call is what was asked. Data is the outcome that an owner writes down, another one for each owner.
type call struct {
	verb  verb
	key   string
	fence int64
	data  string
}

// answer is what was heard. All zero is "ok", and to a claim that somebody else is the owner.
type answer struct {
	unknown bool // no answer
	lost    bool
	fence   int64
	done    bool
	data    string
}

// register is the state of one key in the model.
type register struct {
	owner  int64 // fence of the present owner, 0 if there is none, or hidden
	top    int64 // the highest fence that was heard of
	doneBy int64 // the owner that completed, 0 if none
	data   string
}

// hidden is the fence of an owner who has not heard that he is.
const hidden = -1

// step returns the states that a call may have led to if this was its answer: none if it cannot be. Leases end by time, which the
// model does not have: that they do not end too early is checked apart.
func (r register) step(c call, a answer) []register {
	switch {
	case a.unknown:
		return append(r.effect(c), r)
	case a.lost:
		if c.verb == completes && r.doneBy == c.fence {
			return nil
		}
		if r.owner == c.fence { // its lease has ended, and the store has forgotten it
			r.owner = 0
		}
		return []register{r}
	case c.verb == completes && r.doneBy == c.fence && r.data == c.data:
		return []register{r}
	case c.verb != claims:
		return r.effect(c)
	case a.done:
		if r.doneBy != 0 && r.data == a.data {
			return []register{r}
		}
	case a.fence != 0:
		if r.doneBy == 0 && a.fence > r.top {
			r.owner, r.top = a.fence, a.fence
			return []register{r}
		}
	case r.doneBy == 0 && r.owner != 0:
		return []register{r}
	}
	return nil
}

// effect returns the state after a call that took effect, none if it cannot have.
func (r register) effect(c call) []register {
	switch {
	case r.doneBy != 0:
		return nil
	case c.verb == claims:
		r.owner = hidden
	case r.owner != c.fence:
		return nil
	case c.verb == completes:
		r.owner, r.doneBy, r.data = 0, c.fence, c.data
	case c.verb == releases:
		r.owner = 0
	}
	return []register{r}
}

// model is that of one key.
func model() porcupine.Model {
	m := porcupine.NondeterministicModel{
		Init: func() []any { return []any{register{}} },
		Step: func(state, input, output any) []any {
			r, c, a := state.(register), input.(call), output.(answer) //nolint:forcetypeassert // it is only given these
			var next []any
			for _, r := range r.step(c, a) {
				next = append(next, r)
			}
			return next
		},
		Equal:             func(a, b any) bool { return a == b },
		DescribeOperation: func(input, output any) string { return fmt.Sprintf("%+v: %+v", input, output) },
	}
	return m.ToModel()
}
