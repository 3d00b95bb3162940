// Package saga carries a business transaction over several services to an end: completed, or compensated.
//
// A [Plan] is typed data, not code that is replayed: steps in order, each a durable command to a service and the command
// that takes it back. An [Engine] runs it. Everything that one transition does, the new state, its history, the next
// commands and the next timer, is one PostgreSQL transaction; the commands leave through the outbox and the replies come
// over the bus. The guarantee: every saga that was started in a committed transaction ends with all its steps in effect,
// or with none, or waits for an operator with an alarm, whatever crashes on the way; provided that the participants are
// idempotent in the way described below.
//
//	type Order struct{ ID, SKU, Hold, Tracking string }
//
//	var on saga.On[Order]
//
//	var PlaceOrder = saga.Define("order.place", 1, func(o *Order) string { return o.ID }, // the business key
//		on.Deadline(15*time.Minute),
//		saga.Step("reserve", saga.Call(ReserveStock,
//			func(o *Order) *Reserve { return &Reserve{o.SKU} },
//			func(o *Order, h *Hold) { o.Hold = h.ID }),
//			saga.Undo(saga.Send(ReleaseStock, func(o *Order) *Release { return &Release{} })),
//			on.Timeout(10*time.Second), on.Retry(5)),
//		saga.Pivot("ship", saga.Call(BookShipment,
//			func(o *Order) *Ship { return &Ship{o.ID} },
//			func(o *Order, s *Shipment) { o.Tracking = s.Tracking })),
//		saga.Then("announce", saga.Publish(OrderShipped, func(o *Order) *Shipped { return &Shipped{o.ID} })))
//
//	engine, err := saga.NewEngine(pool, ob, saga.Config{Name: "orders"}, PlaceOrder)
//	err = b.Subscribe(engine.Handler(), bus.Group("orders"), bus.From(bus.DeliverAll))
//	err = postrider.Run(ctx, b, engine, relay)
//
//	id, err := PlaceOrder.Start(ctx, engine.In(tx), &order) // in the transaction that writes the order
//	instance, err := engine.Wait(ctx, id)
//
// # The way of a saga
//
//	Start ──> running ──────────────────────────────────────────> completed
//	            │  all steps are done
//	            │
//	            │  a Step or the Pivot is refused,
//	            │  a Step is given up, or the deadline passes before the Pivot
//	            v
//	        compensating ───────────────────────────────────────> compensated
//	               the undos of all steps that were or may have been done, the last first
//
//	running, compensating <──> parked      no engine knows the saga's plan
//
// An attempt of a step has one of three outcomes. Done: the reply is a response. Refused: the reply is an error that
// postrider.Retryable says is an answer; the step had no effect and needs no undo. Unknown: no reply in time, or an error
// that is weather; the same command is sent again under the same idempotency key, and when the attempts are used up the
// step is undone like one that was done. What must not be given up, a pivot, what follows it and every undo, is
// repeated without end; after the policy's attempts, or a refusal, it raises an alarm: a line in the log at Warn, and
// [Instance].Alarm until something goes right.
//
// # What participants must do
//
// Commands carry the idempotency key "<saga>/<step>/do" or "<saga>/<step>/undo", the same over all attempts, and arrive
// once, more than once, or after their undo. A participant must answer a repeated key as it did the first time, its
// refusals included; take an undo of what it never did as success; and refuse an action whose undo came first.
// idempotency.Action and idempotency.Compensation do that. The tests walk all interleavings of a saga with such
// participants, and show for each of these guards how a saga fails without it.
//
// # Time, crashes, versions
//
// Engines of one name share a database and have no leader: any instance takes any reply and any due timer, by the
// database's clock. When an instance dies its timers are fired by another one, at most [Config].PollInterval late. A
// message that is lost costs the attempt's time-out. The idea is that of Garcia-Molina and Salem, "Sagas" (1987), with
// the pivot of Richardson, "Microservices Patterns" (2018).
//
// A saga holds the hash of its plan and never runs on another. An engine leaves sagas of unknown plans to others; one that
// nobody takes is parked, with an alarm, and goes on as soon as an engine has its plan. To change a plan, give it a new
// version and register both.
//
// # What it is not for
//
// A saga has no isolation: others see its steps one by one. It is not for work inside one database, where a transaction
// does better, and not for long-running code: an action is a message.
package saga
