package devstack

import (
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
)

// portTries is how often a server is started on another port when somebody else was faster.
const portTries = 10

// freePort returns a port of 127.0.0.1 that nobody listens on now. It picks below the ranges from which systems take ports
// for outgoing connections (32768 and up on Linux, 49152 and up elsewhere), so that the port of a stopped server is still free
// when it starts again. Somebody may take it between this call and the server's: callers try again.
func freePort() (int, error) {
	const low, high = 20000, 32768
	var last error
	for range 100 {
		port := low + rand.IntN(high-low)
		l, err := net.Listen("tcp", loopback(port))
		if err != nil {
			last = err
			continue
		}
		return port, l.Close()
	}
	return 0, fmt.Errorf("devstack: find a free port on 127.0.0.1: %w", last)
}

func loopback(port int) string {
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
}
