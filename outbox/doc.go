// Package outbox publishes messages in database transactions. A message leaves if, and only if, the transaction in which
// it was published commits; and messages with the same key leave in the order in which their transactions committed.
//
//	ob, err := outbox.New(outbox.Config{Source: "//shop/orders"})
//	relay, err := outbox.NewRelay(pool, b, outbox.RelayConfig{Outbox: ob})
//
//	err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
//		if _, err := tx.Exec(ctx, `insert into orders values ($1, $2)`, o.ID, o.Customer); err != nil {
//			return err
//		}
//		return OrderPlaced.Publish(ctx, ob.In(tx), &o)
//	})
//
//	err = postrider.Run(ctx, b, relay)
//
// Begin the transaction by ob.On(pool) in the place of pool, and its BEGIN goes with the first statement, the messages with the
// COMMIT: [DB.Begin]. [DB.Publish] is for messages that go with nothing else.
//
// # Guarantee
//
// Every committed message is accepted by the relay's publisher at least once, or moved with its cause to the table
// postrider_outbox_dead if the publisher refuses it for good. A message of a transaction that rolled back never is. After a
// crash up to a second or two of messages are sent a second time, with the same ids: NATS drops them within its duplicate window and
// package idempotency for as long as it remembers.
//
// # How it works
//
// Publish inserts a row, which has the transaction's xid and a number from a sequence. The relay's cursor is not a number but a
// snapshot (pg_snapshot): a batch is what is visible now and was not visible in the cursor's snapshot, in the order of the
// numbers. That is the batch of PgQ, the queue of Skype (M. Kreen and others, function pgq.batch_event_sql), without its
// ticker. Other than "number > last" it loses nothing when a lower number commits later, and other than "xid below the oldest
// one open" it does not stop for a transaction left open somewhere. No row is locked, updated or deleted.
//
// The order of a key: Publish takes an advisory lock on the key before it draws the number, and keeps it to the end of the
// transaction. So of two transactions with one key, the earlier is visible before the later has a number, which therefore is
// in the same batch with a higher one, or in a later batch.
//
// Sent rows stay for a while ([RelayConfig.Retain]) in a ring of three tables, which are truncated in turn once the written
// cursor covers them. One relay leads by a lease with a fencing token; others wait. An idle relay reads one sequence and one
// row two or three times a second. What wakes it is told below.
//
// # Wake-up
//
// What was committed by a [DB] of the pool of the relay, in its process, goes to the relay directly, unless something that was committed
// before is still to be sent, or messages come faster than a thousand times a second, when looks at the tables cost less.
//
// Any other Publish wakes the relay of its process, and with [Config.Poker] those of other processes: a message of core NATS without
// content, at most every 2 ms. [RelayConfig.Listen] has SQL writers wake it. All of them may get lost, and each may be left out: the
// relay looks 2 ms after it had something to do, then after 4, up to RelayConfig.PollInterval. Where a Publish comes before the
// commit, as through [Outbox.In] in a transaction of the caller's, the looks that follow it find the message at most as long after
// the commit as the commit came after the Publish.
//
// # A broker that loses
//
// A broker may lose what it has accepted: nats-server syncs its files every two minutes unless sync_interval says otherwise, and a
// stream may be deleted and created again. With bus.Bus as its publisher the relay writes down once a second where the
// streams end, compares whenever the broker was away and every few seconds, and sends again, in its order, all that the tables
// retain from where the broker is known to be whole: see [Tailer]. Hence Retain should be longer than the broker's sync
// interval. Streams that are whole get again only what they got in the last second or two, as duplicates within their duplicate window.
// A message that was put off (postrider.Delay) is sent again while it waits, and not when it was lost after its time had come.
//
// # Logical replication
//
// With [RelayConfig.Logical] the server pushes what is committed to the relay, where wal_level and rights allow it, and the relay reads the
// tables where they do not. What is promised is the same, and no replication slot outlives its relay; see [LogicalConfig].
//
// # Operations
//
// [Outbox.Status] tells from the database what waits, for how long, who sends it and what went wrong last; [Outbox.Pause] and
// [Outbox.Resume] stop and start the sending, whoever runs the relay. [RelayConfig.Metrics] and [Relay.Stats] are for the
// metrics of the relay's own process. [Outbox.DeadLetters] lists what was refused for good, publishes it again or discards
// it; [Outbox.Resend] publishes again what was sent and is retained. Both take what a [Filter] selects. Who did what, and why, is in the table
// postrider_outbox_log.
//
// # Many schemas
//
// An outbox is a schema, in as many of which as a database has tenants. [Relays] serves all of them with a few connections.
// Names of schemas are lower-case letters, digits and "_", so that they mean the same quoted and not.
//
// # Other readers
//
// The view postrider_outbox_events has what the outbox retains with the columns of Debezium's outbox event router: id,
// aggregatetype (the topic), aggregateid (the key, or the id), type and payload. It is for what polls tables, as a JDBC source
// does: Debezium itself reads tables only, whose rows here have the attributes encoded.
//
// # SQL writers
//
// Whatever may INSERT may publish; topic and data are enough:
//
//	insert into postrider.postrider_outbox (topic, data) values ('orders.placed.v1', '{"id":"o-1"}');
//
// After the commit, in a statement of its own, tell a relay that listens (the payload is the schema). Never do it in the business
// transaction: a commit with a notification holds a lock of the whole cluster over its sync, measured at a third of the rate with 8 writers.
//
//	notify postrider_outbox, 'postrider';
//
// To keep the order of a key among Go and SQL writers, take the same lock first, with the schema before the key:
//
//	select pg_advisory_xact_lock(pg_catalog.hashtextextended('postrider_outbox.' || 'postrider' || '.' || 'Ada', 0));
//
// # Poolers
//
// Nothing here depends on a session, but for RelayConfig.Listen: no session lock, no SET. PgBouncer in transaction mode works with a pool whose
// DefaultQueryExecMode is pgx.QueryExecModeCacheDescribe or QueryExecModeExec, which it needs in any case.
//
// # Audit
//
// [Audit] compares the rows with the streams that they went to, and tells what is lost, doubled or out of order, and, asked for a
// consumer, what it has not handled:
//
//	report, err := outbox.Audit(ctx, pool, ob, outbox.AuditConfig{
//		Streams: []iter.Seq2[*postrider.Message, error]{b.Read(ctx, "ORDERS", time.Now().Add(-time.Hour))},
//	})
//
// # What it is not for
//
// It is no queue: nobody else reads the tables, and a message that is to be handled in the same database needs no broker. Do
// not put large data in it; above some 64 KiB store it elsewhere and send a reference.
package outbox
