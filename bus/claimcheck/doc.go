// Package claimcheck keeps large payloads in a NATS object store and sends a reference in their place, so that a message may be
// larger than the server's max_payload (Hohpe and Woolf, "Claim Check").
//
//	claims, err := claimcheck.New(nc, claimcheck.Config{MaxAge: 7 * 24 * time.Hour})
//	b, err := bus.New(nc, bus.Config{Source: "//shop/media", Middleware: []postrider.Middleware{claims.Middleware}})
//
//	err = ReportMade.Publish(ctx, claims.Publisher(b), &report)         // over the bus
//	err = ReportMade.Publish(ctx, claims.Publisher(ob.In(tx)), &report) // or in a transaction
//
// Contracts and handlers stay as they are. Publisher stores the payload first and then publishes, so that a reference never
// arrives before its payload is stored; Middleware fetches it, checks its SHA-256 digest and hands the handler the whole
// message. It also stores the large reply of a durable command. A handler without the middleware does not see an empty
// payload: decoding fails and says why.
//
// A payload is kept for [Config.MaxAge] and then removed by the server: also one whose transaction was rolled back, or
// whose message never left. Nothing removes it earlier, since nobody knows who still reads. MaxAge must therefore be at least
// that of the streams which carry the references, plus the time that messages wait in an outbox, and as long as dead letters
// shall be replayed.
//
// What is wrong ends as follows. The store is away: Unavailable, tried again. The payload is not there: Unavailable too, since
// a replica may lag, and in the dead letters once the attempts are used up. It is not what was stored: DataLoss, in the dead
// letters at once. It is larger than [Config.MaxBytes]: ResourceExhausted, the same.
//
// In a transaction the upload happens while it is open, and fails it while NATS is away. The wrappers codec/compress and
// codec/encrypt come first: what is stored is compressed and encrypted when the contract says so.
//
// # Calls
//
// Requests and responses of package rpc may be large too. Their payloads are of no use after the call, so that a bucket of their
// own with a short MaxAge serves them best:
//
//	calls, err := claimcheck.New(nc, claimcheck.Config{Bucket: "CALLS", MaxAge: time.Minute})
//	client, err := rpc.NewClient(nc, rpc.ClientConfig{Middleware: []postrider.Middleware{calls.CallMiddleware}})
//	srv, err := rpc.NewServer(nc, rpc.ServerConfig{Middleware: []postrider.Middleware{calls.Middleware}})
package claimcheck
