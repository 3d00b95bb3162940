// Package storetest is the conformance suite for implementations of idempotency.Records, the stores behind idempotency.Do and
// idempotency.HTTP.
//
//	func TestConformance(t *testing.T) {
//		storetest.Run(t, func(t testing.TB) (idempotency.Records, func()) {
//			server := startMyServer(t)
//			return mystore.New(server.URL), server.CutConnections
//		})
//	}
//
// Each promise is a subtest with a store of its own. The last one lets callers run against each other while connections break
// and checks with porcupine (github.com/anishathalye/porcupine; Horn and Kroening, "Faster linearizability checking via
// P-compositionality", 2015) that what they saw can be put into one order.
package storetest
