package storetest

import (
	"testing"
	"time"
)

// TestModel tells histories that can be from those that cannot.
func TestModel(t *testing.T) {
	t.Parallel()
	claim := call{verb: claims}
	done := func(fence int64) call { return call{verb: completes, fence: fence, data: string(rune('a' + fence))} }
	free := func(fence int64) call { return call{verb: releases, fence: fence} }
	var ok, busy answer
	type step struct {
		call
		answer
	}
	for name, tt := range map[string]struct {
		steps []step
		legal bool
	}{
		"once":                     {[]step{{claim, answer{fence: 1}}, {claim, busy}, {done(1), ok}, {claim, answer{done: true, data: "b"}}}, true},
		"busy without an owner":    {[]step{{claim, busy}}, false},
		"another outcome":          {[]step{{claim, answer{fence: 1}}, {done(1), ok}, {claim, answer{done: true, data: "x"}}}, false},
		"owner after completion":   {[]step{{claim, answer{fence: 1}}, {done(1), ok}, {claim, answer{fence: 2}}}, false},
		"taken over":               {[]step{{claim, answer{fence: 1}}, {claim, answer{fence: 2}}, {done(1), answer{lost: true}}, {done(2), ok}}, true},
		"zombie completes":         {[]step{{claim, answer{fence: 1}}, {claim, answer{fence: 2}}, {done(1), ok}}, false},
		"zombie renews":            {[]step{{claim, answer{fence: 1}}, {claim, answer{fence: 2}}, {call{verb: renews, fence: 1}, ok}}, false},
		"fence comes again":        {[]step{{claim, answer{fence: 1}}, {free(1), ok}, {claim, answer{fence: 1}}}, false},
		"completion after release": {[]step{{claim, answer{fence: 1}}, {free(1), ok}, {done(1), ok}}, false},
		"repeated completion":      {[]step{{claim, answer{fence: 1}}, {done(1), answer{unknown: true}}, {done(1), ok}}, true},
		"completion forgotten":     {[]step{{claim, answer{fence: 1}}, {done(1), ok}, {done(1), answer{lost: true}}}, false},
		"unheard claim":            {[]step{{claim, answer{unknown: true}}, {claim, busy}, {claim, answer{fence: 2}}}, true},
		"unheard completion":       {[]step{{claim, answer{fence: 1}}, {done(1), answer{unknown: true}}, {claim, answer{done: true, data: "b"}}}, true},
		"unheard completion, not":  {[]step{{claim, answer{fence: 1}}, {done(1), answer{unknown: true}}, {claim, answer{fence: 2}}}, true},
	} {
		m := model()
		states := []register{{}}
		for _, s := range tt.steps {
			var next []register
			for _, r := range states {
				next = append(next, r.step(s.call, s.answer)...)
			}
			states = next
		}
		if legal := len(states) > 0; legal != tt.legal {
			t.Errorf("%s: legal %v, states %+v", name, legal, states)
		}
		state, legal := m.Init(), true
		for _, s := range tt.steps {
			if legal, state = m.Step(state, s.call, s.answer); !legal {
				break
			}
		}
		if legal != tt.legal {
			t.Errorf("%s: legal %v for porcupine", name, legal)
		}
	}
}

func TestTooEarly(t *testing.T) {
	t.Parallel()
	claim := func(fence int64, at time.Duration) event {
		return event{call: call{verb: claims}, answer: answer{fence: fence}, asked: at, heard: at + 1}
	}
	own := func(v verb, fence int64, at time.Duration, a answer) event {
		return event{call: call{verb: v, fence: fence}, answer: a, asked: at, heard: at + 1}
	}
	for name, tt := range map[string]struct {
		events []event
		early  bool
	}{
		"in time":        {[]event{claim(1, 0), claim(2, short)}, false},
		"too early":      {[]event{claim(2, short-2), claim(1, 0)}, true},
		"renewed":        {[]event{claim(1, 0), own(renews, 1, short/2, answer{}), claim(2, short)}, true},
		"perhaps":        {[]event{claim(1, 0), own(renews, 1, short/2, answer{unknown: true}), claim(2, short)}, false},
		"released":       {[]event{claim(1, 0), own(releases, 1, 1, answer{}), claim(2, 2)}, false},
		"perhaps freed":  {[]event{claim(1, 0), own(releases, 1, 1, answer{unknown: true}), claim(2, 2)}, false},
		"release denied": {[]event{claim(1, 0), own(releases, 1, 1, answer{lost: true}), claim(2, 2)}, true},
	} {
		if text := tooEarly(tt.events); (text != "") != tt.early {
			t.Errorf("%s: %q", name, text)
		}
	}
}
