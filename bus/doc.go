// Package bus publishes events to NATS JetStream and hands them to handlers, every message a CloudEvent in the binary
// mode of the CloudEvents NATS binding.
//
// The guarantee: when Publish returns nil the stream has the message; every message of a topic is handled at least once
// by each group, until its handler succeeds or it stands in the dead letters with its cause.
//
//	b, err := bus.New(nc, bus.Config{
//		Source:  "//shop/orders",
//		Streams: []bus.Stream{{Name: "ORDERS", Topics: []string{"orders.>"}}},
//	})
//	err = b.Subscribe(OrderPlaced.Handler(confirm), bus.Group("mailer"))
//	go postrider.Run(ctx, b)
//	err = OrderPlaced.Publish(ctx, b, &order)
//
// # Publishing
//
// A nats-server that syncs every message (sync_interval: always, the only setting under which an acknowledged message
// outlives a power cut) spends one disk sync on each publish, whatever the concurrency. An atomic batch is synced once.
// So where syncs make messages dear, by the times measured so far, Publish commits in groups: what is waiting for a stream goes
// out together while the group before it is on its way, as one atomic batch of up to 1000 messages. There is no timer, and
// few messages go singly at once. A batch that the server refuses is sent again one by one, so that each caller has its own
// result. This is the group commit of databases (DeWitt et al., "Implementation Techniques for Main Memory Database
// Systems", 1984) with the client as the log's writer. Where messages are cheap every caller sends for itself, and several
// messages of one call go out in a row that the server acknowledges now and then (docs/adr/0002 and 0004).
//
// [Bus.Async] publishes without waiting, and tells what became of each message.
//
// What goes out is in binary mode, or as [Config.Mode] says in structured mode, in the protobuf format, which is smaller
// and cheaper, or in JSON; readers take these and every other form of docs/wire.md, several events in one message too.
//
// [Bus.Durability] tells whether the servers are known to sync before they acknowledge. Run logs it, and
// [Config.RequireDurable] insists on it.
//
// # Handling
//
// A subscription pulls from a durable consumer as many messages as it has room for, and keeps those it holds alive by
// signs of progress, so that a short AckWait brings the messages of a crashed process back within seconds while a slow
// handler may take its time. A failed attempt is given back to the server with the delay of the retry policy and blocks
// nobody. After the last attempt, or at once when [postrider.Retryable] says that no attempt will help, the message is
// stored in the dead letters, and only then given up. A wait of five seconds or more is left to the server's scheduler, from
// which the message comes back to its group alone. Handlers may see a message twice: wrap them with package
// idempotency where that matters.
//
// A handler of batches ([postrider.Topic.BatchHandler], [Batch]) gets many events at a time and tells the fate of each. One
// that fails is retried by itself. [Filter] leaves out what a group does not want; [Prefetch] bounds what a process holds.
//
// # Dead letters
//
// [Bus.DeadLetters] lists them, groups them by cause, and replays, edits or discards them. What is replayed reaches the
// group that failed and no other.
//
// # Order
//
// A subscription that is [Ordered] handles the messages of one partition key one at a time, in the order of the stream,
// and other keys beside them; a key whose message fails waits, and only that key. In a stream with Partitions ([Stream]) the
// instances of the group share the keys, and take over those of one that stops or dies; otherwise one of them is active.
// Delivery.Fence is a fencing token, by which what a handler writes to can refuse an instance that was replaced
// (docs/adr/0005).
//
// A message in the dead letters no longer holds up its key. Where the next must not be handled without it, the handler returns
// [postrider.Park]: the message and all of its key that follow are kept aside in their order, other keys go on, and
// [Bus.Parked] shows, releases and discards them. [ParkFailures] does so for all that fails.
//
// # Later
//
// [postrider.Delay] and [postrider.At] put a message off, through an outbox too; [Bus.Cancel] takes it back. [Bus.Schedule]
// publishes a message again and again. The server keeps the time, to about a quarter of a second; a bus that runs,
// whichever, brings what is due to its stream. [postrider.Expires] bounds how late a message may be handled.
//
// Not for: messages that may be lost (use NATS itself), answers that a caller waits for (package rpc), publishing that
// must agree with a database transaction (package outbox).
package bus
