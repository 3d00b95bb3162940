package saga_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/saga"
)

func TestNewPlanRefuses(t *testing.T) {
	t.Parallel()
	key := func(o *Order) string { return o.ID }
	act := saga.Send(ReserveStock, func(*Order) *ReserveReq { return &ReserveReq{} })
	undo := saga.Undo(saga.Send(ReleaseStock, func(*Order) *UndoReq { return &UndoReq{} }))
	type parts = []saga.Part[Order]
	for _, c := range []struct {
		name    string
		version int
		key     func(*Order) string
		parts   parts
		text    string
	}{
		{"", 1, key, parts{saga.Pivot("a", act)}, "the name is bad"},
		{"a b", 1, key, parts{saga.Pivot("a", act)}, "the name is bad"},
		{"a", 0, key, parts{saga.Pivot("a", act)}, "version must be positive"},
		{"a", 1, nil, parts{saga.Pivot("a", act)}, "key function is nil"},
		{"a", 1, key, nil, "has no steps"},
		{"a", 1, key, parts{saga.Step("a/b", act, undo)}, `step "a/b" has a bad name`},
		{"a", 1, key, parts{saga.Step("a", act, undo), saga.Step("a", act, undo)}, `step "a" is there twice`},
		{"a", 1, key, parts{saga.Step("a", act)}, `step "a" has no Undo`},
		{"a", 1, key, parts{saga.Step("a", act, on.NoUndo(""))}, "NoUndo without a reason"},
		{"a", 1, key, parts{saga.Step("a", act, undo, on.NoUndo("why"))}, "both Undo and NoUndo"},
		{"a", 1, key, parts{saga.Step("a", act, undo, undo)}, "more than one Undo"},
		{"a", 1, key, parts{saga.Step("a", act, saga.Undo(act, undo))}, "more than one Undo"},
		{"a", 1, key, parts{saga.Step("a", act, saga.Undo(act, on.Timeout(-1)))}, "Timeout is -1ns"},
		{"a", 1, key, parts{saga.Step("a", saga.Action[Order]{}, undo)}, "has no action"},
		{"a", 1, key, parts{saga.Step("a", act, saga.Undo(saga.Action[Order]{}))}, "has no action"},
		{"a", 1, key, parts{saga.Pivot("a", act, undo)}, `pivot "a" has an undo`},
		{"a", 1, key, parts{saga.Then("a", act, undo)}, `then "a" has an undo`},
		{"a", 1, key, parts{saga.Pivot("a", act), saga.Pivot("b", act)}, `pivot "b" comes after "a"`},
		{"a", 1, key, parts{saga.Then("a", act), saga.Pivot("b", act)}, `pivot "b" comes after "a"`},
		{"a", 1, key, parts{saga.Pivot("a", act), saga.Step("b", act, undo)}, `step "b" comes after "a"`},
		{"a", 1, key, parts{saga.Then("a", act), saga.Step("b", act, undo)}, `step "b" comes after "a"`},
		{"a", 1, key, parts{on.Deadline(0), saga.Pivot("a", act)}, "Deadline is 0s"},
		{"a", 1, key, parts{saga.Pivot("a", act, on.Policy(postrider.RetryPolicy{Multiplier: 0.5}))}, "RetryPolicy.Multiplier"},
	} {
		p, err := saga.NewPlan(c.name, c.version, c.key, c.parts...)
		if p != nil || !errors.Is(err, postrider.InvalidArgument) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("want %q: %v", c.text, err)
		}
	}
	defer func() {
		if r := recover(); r == nil || !strings.Contains(r.(string), "has no steps") {
			t.Errorf("Define panicked with %v", r)
		}
	}()
	saga.Define("a", 1, key)
}
