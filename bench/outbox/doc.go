// Command outbox measures Postrider's outbox and its idempotent handlers beside other ways to publish in a database
// transaction, all on the same PostgreSQL and the same nats-server.
//
//	go run ./outbox -rounds 3 -sync always
//
// It starts a PostgreSQL and a nats-server, both on disk and durable, as a process of its own and one worker process for
// each peer, has each of them do the same work in turn, and prints tables in Markdown. Every cell has a new database and a
// new stream. Rounds are interleaved and a ratio is that of one round; where a cell compares work with the same work without
// something, the two take turns every quarter of a second. The README one folder up says what each peer does.
package main
