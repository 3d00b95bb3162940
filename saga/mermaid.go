package saga

import (
	"fmt"
	"strings"
)

// Mermaid draws the plan as a Mermaid flowchart (https://mermaid.js.org): the way forward in full lines, the way back,
// from a step's refusal through the undos before it, in dotted ones.
func (p *Plan[D]) Mermaid() string {
	var b strings.Builder
	fmt.Fprintf(&b, "flowchart TD\n  start([%s v%d])\n", p.def.name, p.def.version)
	from, back := "start", "compensated"
	for i, n := range p.def.nodes {
		do, undo := p.def.actions[i][0], p.def.actions[i][1]
		step, undoing := fmt.Sprint("s", i+1), fmt.Sprint("u", i+1) // a step's own name may mean something to Mermaid
		open, shut := "[", "]"
		if n.kind == pivot {
			open, shut = "{{", "}}"
		}
		fmt.Fprintf(&b, "  %s%s\"%s: %s %s\"%s\n  %s --> %s\n", step, open, n.name, do.verb, do.contract, shut, from, step)
		from = step
		if n.kind == retriable {
			continue
		}
		fmt.Fprintf(&b, "  %s -. refused .-> %s\n", step, back)
		if n.undo != nil {
			fmt.Fprintf(&b, "  %s[\"undo %s: %s %s\"]\n  %s -.-> %s\n  %s -. given up .-> %s\n",
				undoing, n.name, undo.verb, undo.contract, undoing, back, step, undoing)
			back = undoing
		}
	}
	fmt.Fprintf(&b, "  %s --> completed([completed])\n  compensated([compensated])\n", from)
	return b.String()
}
