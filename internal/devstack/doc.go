// Package devstack gives a program the two servers that Postrider stands on, a nats-server and a PostgreSQL, without
// anything to install or to configure first. The demo, the command and every test start with it.
//
// The nats-server is embedded: JetStream, every acknowledged message synced to disk. The PostgreSQL is the one at
// POSTRIDER_POSTGRES_URL if that is set; else a private cluster made with the binaries found on the machine; else the same
// with binaries downloaded once. Where none of that works the error names the three ways out.
//
// Both end with the process that started them, however it ends: a guard process, a few lines of shell that wait for the end
// of a pipe held by us, stops what is left and removes the folders also after a kill -9.
//
//	stack, err := devstack.Start(ctx, devstack.Config{})
//	if err != nil {
//		return err
//	}
//	defer stack.Close()
//	nc, err := nats.Connect(stack.NATSURL)
//	pool, err := pgxpool.New(ctx, stack.PostgresURL)
//
// It is not for production: one node each, made to be thrown away.
package devstack
