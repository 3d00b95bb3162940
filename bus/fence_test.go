package bus

import (
	"context"
	"testing"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

// TestFenceOfTheReplaced has an owner that lost its pin, and does not know, take a token. The token is larger than that of
// its successor may be, so nothing may be handled with it.
func TestFenceOfTheReplaced(t *testing.T) {
	t.Parallel()
	b, err := New(postridertest.NATS(t), Config{
		Source: "//test", Group: "tester", Streams: []Stream{{Name: "NOTES", Topics: []string{"notes.>"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	h := postrider.RawHandler("notes.a", func(context.Context, *postrider.Message) error { return nil })
	if err := b.Subscribe(h, Ordered()); err != nil {
		t.Fatal(err)
	}
	if err := b.bind(t.Context(), b.subs); err != nil {
		t.Fatal(err)
	}
	s := b.subs[0]
	s.lanes = newLanes(nil)
	s.pin, s.takeOver, s.wasReset = "a pin of the past", true, true
	if err := s.claim(t.Context(), s.pin); err != nil {
		t.Fatal(err)
	}
	if s.fence != 0 || s.pin != "" {
		t.Errorf("fence %d and pin %q are kept, want neither", s.fence, s.pin)
	}
}
