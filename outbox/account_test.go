package outbox

import (
	"testing"

	"github.com/postrider/postrider"
)

// A row that has the number of one that went directly, but is another, is sent: the server behind the relay may be another one by then.
func TestDirectIsKnownByItsID(t *testing.T) {
	t.Parallel()
	m := func(id string) *postrider.Message { return &postrider.Message{ID: id, Source: "s", Topic: "t"} }
	term := &term{early: map[int64]*postrider.Message{1: m("a"), 2: m("b")}}
	p := page{rows: []row{{id: 1, msg: m("a")}, {id: 2, msg: m("other")}, {id: 3, msg: m("c")}}}
	term.passOver(&p)
	if len(p.rows) != 2 || p.rows[0].id != 2 || p.direct != 1 || len(term.early) != 0 {
		t.Errorf("left are %v, passed over %d", p.rows, p.direct)
	}
}

func TestAccount(t *testing.T) {
	t.Parallel()
	var a account
	a.settle(10)
	a.add(12)
	a.add(14)
	if a.dense != 10 {
		t.Errorf("dense is %d without 11", a.dense)
	}
	a.add(11)
	if a.dense != 12 {
		t.Errorf("dense is %d without 13", a.dense)
	}
	a.settle(13)
	a.add(9)
	if a.dense != 14 || len(a.beyond) != 0 {
		t.Errorf("dense is %d, want 14; beyond %v", a.dense, a.beyond)
	}
	for id := int64(20); len(a.beyond) < 8*directMax || a.forgot == 0; id += 2 {
		a.add(id)
	}
	if a.forgot < 20 || a.dense != 14 {
		t.Errorf("forgot up to %d, dense %d", a.forgot, a.dense)
	}
}
