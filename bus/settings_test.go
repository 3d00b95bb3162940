package bus

import (
	"reflect"
	"testing"
)

// A bus of another kind must not ignore an option because it never hears of it.
func TestSettingsTellEveryOption(t *testing.T) {
	t.Parallel()
	told := map[string]bool{
		"group": true, "concurrency": true, "retry": true, "ackWait": true, "ordered": true, "broadcast": true,
		"parkFailures": true, "batch": true, "batchWait": true, "batchGiven": true, // refused where the handler takes no batches
		"filter": true,                                  // Settings.Wants
		"from":   true, "sequence": true, "since": true, // Settings.Begins
		"prefetch": true, "prefetchBytes": true,
		"breakerLimit": true, "breakerPause": true, "rate": true, // when, not what: the docs say that they are not told
	}
	for field := range reflect.TypeFor[subscribeConfig]().Fields() {
		if !told[field.Name] {
			t.Errorf("the option behind %s is not in Settings: add it, and have postridertest/membus serve or refuse it", field.Name)
		}
	}
}
