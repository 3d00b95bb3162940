// Package rpc makes calls over NATS: a [postrider.Method] is called on one side with [Call] and answered on the other by
// the handlers of a [Server].
//
// A call has exactly one outcome, at its deadline at the latest, and an error says whether the call may have run
// (postrider.Error.Unprocessed). The deadline travels with the request; a server refuses what it cannot finish in time
// and drops what has expired, so that it does no work for nobody.
//
//	var Reserve = postrider.NewMethod[Order, Hold]("stock.v1/Reserve")
//
//	srv, err := rpc.NewServer(nc, rpc.ServerConfig{})
//	err = srv.Register(Reserve.Handler(func(ctx context.Context, o *Order) (*Hold, error) {
//		return shelf.Take(ctx, o.SKU, o.Quantity)
//	}))
//	err = postrider.Run(ctx, srv)
//
//	client, err := rpc.NewClient(nc, rpc.ClientConfig{Source: "//shop/orders"})
//	defer client.Close()
//	hold, err := rpc.Call(ctx, client, Reserve, &Order{SKU: 11, Quantity: 2}, rpc.Timeout(time.Second))
//	if errors.Is(err, postrider.FailedPrecondition) { ... } // the handler said no
//
// Any NATS client can call without this package: nats req rpc.stock.v1.Reserve '{"sku":11,"quantity":2}'. Servers answer
// the discovery requests of the NATS micro protocol: nats service ls shows them. docs/wire.md has the forms of a message.
//
// It is not for work that must survive a crash of either side: send the same Method as a durable command with
// [postrider.Method.Send]. Requests and responses have the size of a NATS message at most (max_payload, 1 MiB by
// default), unless both sides have the middleware of package bus/claimcheck.
package rpc
