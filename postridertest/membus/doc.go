// Package membus is a bus in memory, for tests of services that publish and handle events: no server, no network, and no
// clock of its own, so that retries and deadlines pass at once in a bubble of [testing/synctest].
//
// The guarantee: a [Bus] does what the suite of package bustest asks, which bus.Bus passes as well: groups, retries by
// the policy, delayed and recurring messages, pauses, dead letters with their cause and their re-drive, parked keys and
// their release, publishing without waiting, replies to commands, drain. Its methods have the names and the parameters of
// bus.Bus, so that what a service asks for fits both:
//
//	type Bus interface { // what a service needs: bus.Bus has it, and this one too
//		postrider.Publisher
//		Subscribe(h postrider.Handler, opts ...bus.SubscribeOption) error
//		Cancel(ctx context.Context, id string) (bool, error)
//	}
//
//	func TestOrderIsConfirmed(t *testing.T) {
//		synctest.Test(t, func(t *testing.T) {
//			b, err := new(membus.Broker).New(bus.Config{
//				Source: "//shop/orders", Group: "mailer",
//				Streams: []bus.Stream{{Name: "ORDERS", Topics: []string{"orders.>"}}},
//			})
//			...
//			err = mailer.Register(b) // the code under test
//			go b.Run(t.Context())
//			<-b.Started()
//			err = OrderPlaced.Publish(t.Context(), b, &order)
//			synctest.Wait() // everything is handled
//		})
//	}
//
// It takes the Config and the options of package bus, so that a program is wired for a test as for production. Streams
// keep everything until the [Broker] is garbage; of a bus.Stream only name, topics and duplicate window mean something
// here, a bus.CircuitBreaker never opens and a bus.RateLimit does not slow a test down. Messages are encoded when they are
// published and decoded for each attempt, as on a server. What only a server has is not here: Durability, Reconnects, and what an
// outbox's relay asks of a bus to find out what a broker has lost (Tail, Lost, PublishOnce) or to wake others (Poker).
//
// It is not for finding out what a server does under load, or when it is away: run the same test on
// [github.com/postrider/postrider/postridertest.NATS] for that.
package membus
