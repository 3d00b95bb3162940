// Package postrider is the kernel of Postrider, a library for services that talk by messages: events and calls over
// NATS, every message a CloudEvent, a Postgres transactional outbox so that an event leaves if and only if its
// transaction commits, an idempotency store so that its effect happens once, and sagas that carry a business
// transaction over several services to an end.
//
// The kernel holds the words that all other packages speak. A contract ([Topic], [Method]) is written once and shared by
// both sides. A [Handler] is made from a contract and a function; the same handler serves a bus, an rpc server and a
// saga. A [Publisher] takes a [Message]: the bus, an outbox in a transaction, a recorder in a test. An [Error] has a
// [Code], wherever it comes from. [Run] runs the parts of a service and drains them.
//
//	var OrderPlaced = postrider.NewTopic[Order]("orders.placed.v1",
//		postrider.KeyBy(func(o *Order) string { return o.Customer }))
//
//	err := OrderPlaced.Publish(ctx, b, &order)
//
//	err = b.Subscribe(OrderPlaced.Handler(func(ctx context.Context, e postrider.Event[Order]) error {
//		return mail.Confirm(ctx, e.Value.Email)
//	}), bus.Group("mailer"))
//
//	err = postrider.Run(ctx, b)
//
// This package does no I/O and imports nothing but the standard library and codec. The transports are in bus, rpc and
// outbox.
package postrider
