// Package bustest tests whatever publishes and handles messages as bus.Bus does: bus.Bus itself, the bus in memory of package
// membus, or one of your own.
//
// The guarantee: an implementation that passes loses nothing and doubles nothing in the cases that other libraries get wrong:
// a close in mid-batch, a slow or a poisoned neighbour, a redelivery that looks like a duplicate, two messages that look like
// one, a crash, a panic, bytes that cannot be decoded. Each subtest of [Suite.Run] is one promise.
//
//	func TestConformance(t *testing.T) {
//		bustest.Suite{Start: func(t testing.TB) bustest.Broker {
//			broker := new(membus.Broker)
//			return bustest.Broker{Open: func(cfg bus.Config) (bustest.Bus, error) { return broker.New(cfg) }}
//		}, Bubble: true}.Run(t)
//	}
//
// Which promise answers to which failure stands in bus/promises_test.go, with the tests that only a server can pass.
//
// It is not for speed, and not for what only a server can show: disk syncs, replication, permissions.
package bustest
