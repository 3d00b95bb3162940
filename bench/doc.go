// Command bench measures Postrider's bus beside other ways to publish and handle events on NATS JetStream.
//
//	go run . -rounds 3 -sync always
//
// It starts a nats-server as a process of its own and one worker process for each peer, has each of them do the same
// work in turn, and prints tables in Markdown: rates, allocations and CPU time a message, what was lost and what came
// twice. Rounds are interleaved: within a round every cell visits all peers one after the other, so that a slow moment
// of the machine meets them all. A ratio is that of one round; the table shows the median over the rounds.
//
// The README says what each peer does. This is a module of its own, so that nobody who uses Postrider downloads its
// peers.
package main
