// Package kvstore keeps what became of requests with a key in a NATS key-value bucket, for services without a database.
//
//	func run(ctx context.Context, nc *nats.Conn) error {
//		store, err := kvstore.Open(ctx, nc, kvstore.Config{})
//		if err != nil {
//			return err
//		}
//		receipt, err := idempotency.Do(ctx, store, Charge, "order-17", &ChargeRequest{Cents: 1999}, pay)
//		...
//	}
//
// A [Store] is an idempotency.Records: Do, HTTP and Dedup take it. An owner's lease is the time-to-live of its entry, which the server
// counts in whole seconds, and its fence is the number that the stream gave to its claim. Every change names the number of the entry
// that it replaces, so that of two only one succeeds. With several replicas entries are read from the leader ($JS.API.STREAM.MSG.GET), never
// from a replica that may be behind: one server of three that was restarted under load told one owner in fifteen that it had lost its key.
// A leader that was elected a moment ago may be behind too, so an owner whose claim is not there is told so only after a second.
//
// The promise is weaker than that of the store in PostgreSQL:
//   - The effect of a request happens at least once, never in one transaction with the record: there is no Action, no
//     Handler and no DoTx. A process that dies between the two leaves the next caller to run it again.
//   - When an owner has died, its entry is gone with its lease, and the next caller may come with another request.
//   - While the servers elect a leader, some seconds after one has died, requests fail as Unavailable or wait.
//   - With several replicas, while one server after the other is restarted, an owner was told now and then that it had lost its key a moment
//     after it had renewed a lease of a second. Why is not known; the effect may happen twice then.
//   - A NATS server that does not sync each message to disk (sync_interval: always) can forget outcomes in a power cut.
//
// An outcome must fit into a message: the server's max_payload, 1 MiB unless it is configured, less a third for the encoding.
// nats-server 2.11 or newer is needed.
package kvstore
