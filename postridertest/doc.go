// Package postridertest helps to test services that stand on Postrider, with the real servers rather than with mocks.
//
// [NATS] and [Postgres] give a test a nats-server with JetStream and a PostgreSQL database of its own. Nothing needs to be
// installed for the first; for the second a PostgreSQL is found on the machine, taken from POSTRIDER_POSTGRES_URL, or downloaded
// once. Tests may run in parallel: they see nothing of each other. Everything ends with the test, and with the process if that is
// killed.
//
//	func TestMain(m *testing.M) { os.Exit(postridertest.Main(m)) }
//
//	func TestOrderIsConfirmed(t *testing.T) {
//		t.Parallel()
//		nc, db := postridertest.NATS(t), postridertest.Postgres(t)
//		startService(t, nc, db, postridertest.Logger(t))
//		placeOrder(t, nc, "o-1")
//		postridertest.Eventually(t, func() error { return confirmed(t.Context(), db, "o-1") })
//	}
//
// [NewNATS] and [NewPostgres] give servers that a test can stop and start, to see what a service makes of it. Where no PostgreSQL
// can be had, a test is skipped with the reason, and fails if the environment says CI=true.
//
// [Recorder] is a publisher in memory, for code that publishes and needs no server to be tested.
//
// It is not for load tests: PostgreSQL runs without fsync here, which flatters whatever commits.
package postridertest
