// Package idempotency makes the effect of a message happen once, however often the message arrives.
//
// A broker delivers at least once: after a crash, a time-out or a replay a message comes again. [Handler] writes a row
// about the message in the same PostgreSQL transaction as the handler's effect, so that row and effect commit or vanish
// together; [BatchHandler] does so for many messages in one. [Action] and [Compensation] do the same for the participants of
// a saga and for calls with an idempotency key; they also keep the answer, so that a repetition gets the same one.
//
// The guarantee: what the handler writes through its transaction is committed exactly once per message and consumer,
// whatever is redelivered, re-driven or replayed.
//
//	func run(ctx context.Context, pool *pgxpool.Pool, b *bus.Bus) error {
//		if err := idempotency.Migrate(ctx, pool, ""); err != nil {
//			return err
//		}
//		store, err := idempotency.New(pool, idempotency.Config{})
//		if err != nil {
//			return err
//		}
//		err = b.Subscribe(idempotency.Handler(store, "billing", OrderPlaced,
//			func(ctx context.Context, tx pgx.Tx, e postrider.Event[Order]) error {
//				_, err := tx.Exec(ctx, `update account set due = due + $1 where id = $2`, e.Value.Cents, e.Value.Account)
//				return err
//			}))
//		if err != nil {
//			return err
//		}
//		return postrider.Run(ctx, b, store)
//	}
//
// # The handler's transaction
//
// BEGIN, the time-out for locks and the row go to the server in one flight, so that the guarantee costs no round trip.
// The handler gets the transaction and must not end it: Commit and Rollback of its pgx.Tx return an error, and the text
// "commit" sent through Exec breaks the guarantee. It returns nil to commit and an error to roll everything back, the
// row included, so that a redelivery runs again. Begin gives a savepoint as usual. The isolation level is READ
// COMMITTED; a second copy of a message waits for the first one's transaction, for [Config.LockTimeout] at most, and is
// then delayed. When the connection breaks during COMMIT nobody knows the outcome: the error is retryable and the row
// tells the next delivery.
//
// What it costs, in messages per second of eight handlers at once that update one row each, as a ratio to the same with no
// inbox, two cores for all (BenchmarkRatio): [Handler] 0.88 on a server that syncs its commits and 0.97 on one that does not;
// [BatchHandler] with 100 at a time and one statement for all of them 9 and 3.5, with a statement for each in one flight 6.4
// and 1.9.
//
// # The inbox
//
// The key of a row is 16 bytes: 48 bits of the message's own time, then a hash of consumer, source and id. Every copy of
// a message has the same key and falls into the same partition, one a UTC day, whenever it arrives. Rows are inserted in
// about the order of time, there is one index, and expiry is the drop of a whole partition. A copy older than
// [Config.Window] is refused, with an OutOfRange error that ends it in the dead letters: that it was handled is no
// longer known, so that it is neither lost silently nor handled twice. A consumer that reads an old stream from its
// beginning needs a window as long as the stream. Messages without a time share a bucket of their own; they are remembered
// for the window after their handling, and a copy that comes still later is handled again.
//
// Retention differs by consumer where each has a [Store] of its own, with a schema and a window: in one table a day's rows
// would all be kept as long as the most patient consumer needs.
//
// # The barrier
//
//	(no row) --do----> done ------undo--> undone
//	    |     `------> refused              |
//	    |                 `--undo--> ok     `--do----> cancelled
//	    `---undo--> nulled --do----> cancelled
//
// An action and its compensation share a row, whose key is the idempotencykey of the command without the trailing "/do"
// or "/undo". A repeated action gets the stored answer or refusal. A compensation of an action that never ran answers
// success and bars it (null compensation; the action comes late and is cancelled). The barrier is that of dtm
// (github.com/dtm-labs/client, barrier.go) with the reply stored in it: the compensation learns what it has to undo,
// even if the orchestrator never did.
//
// # Effects outside the database
//
// [Do] runs a function once per key that a caller chose and records what it returned: a repetition gets the same response or
// refusal, and another request under the same key is refused. While it runs the key is leased; whoever comes meanwhile waits, and
// takes over when the owner has died. An owner whose claim was written down, and the answer lost, has the key at once when it asks again.
// A payment at a provider or a mail cannot commit with the record, so it happens
// at least once: give the provider the key, or the fence ([FenceFromContext]). [DoTx] is the same for effects in the database, exactly once.
// [HTTP] does it for the Idempotency-Key header of net/http handlers, [Dedup] for any handler of messages. The outcomes are kept
// in a [Records]: the [Store], or a NATS bucket (package kvstore).
//
// # What it is not for
//
// Effects in another database need a store there. PostgreSQL 14 or newer is needed. Behind PgBouncer in transaction mode set pgx's
// DefaultQueryExecMode to QueryExecModeCacheDescribe or QueryExecModeExec.
package idempotency
