// Package faultproxy stands between a client and a server and breaks their connections, for tests of what a client believes
// when an answer does not come.
package faultproxy

import (
	"errors"
	"io"
	"net"
	"sync"
)

// Proxy forwards TCP connections to one server. Its methods are safe for concurrent use.
type Proxy struct {
	listener net.Listener
	target   string
	done     sync.WaitGroup

	mu        sync.Mutex
	closed    bool
	swallowed bool
	links     map[*link]struct{}
}

// link is one connection and its other half.
type link struct{ client, server net.Conn }

func (l *link) close() { _, _ = l.client.Close(), l.server.Close() }

// New returns a proxy on a free port of 127.0.0.1, in front of the server at target ("host:port").
func New(target string) (*Proxy, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &Proxy{listener: listener, target: target, links: map[*link]struct{}{}}
	p.done.Go(p.accept)
	return p, nil
}

// Addr returns where clients connect, "127.0.0.1:port".
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Cut closes all connections at once. New ones are taken. It ends a Swallow.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		l.close()
	}
	clear(p.links)
	p.swallowed = false
}

// Swallow keeps from the clients all that the server sends, until Cut: what they ask for is done, and they do not hear of it.
func (p *Proxy) Swallow() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.swallowed = true
}

// Close closes all connections, takes no more and waits for the goroutines.
func (p *Proxy) Close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	err := p.listener.Close()
	p.Cut()
	p.done.Wait()
	return err
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.done.Go(func() { p.serve(client) })
	}
}

func (p *Proxy) serve(client net.Conn) {
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		_ = client.Close()
		return
	}
	l := &link{client, server}
	p.mu.Lock()
	if p.closed {
		l.close()
	} else {
		p.links[l] = struct{}{}
	}
	p.mu.Unlock()
	p.done.Go(func() {
		_, _ = io.Copy(server, client)
		l.close()
	})
	_, _ = io.Copy(answers{client, p}, server)
	l.close()
	p.mu.Lock()
	delete(p.links, l)
	p.mu.Unlock()
}

// answers is the way back to a client.
type answers struct {
	net.Conn

	p *Proxy
}

func (a answers) Write(b []byte) (int, error) {
	a.p.mu.Lock()
	swallowed := a.p.swallowed
	a.p.mu.Unlock()
	if swallowed {
		return len(b), nil
	}
	return a.Conn.Write(b)
}

// ReadFrom keeps io.Copy from going around Write.
func (a answers) ReadFrom(r io.Reader) (n int64, err error) {
	buf := make([]byte, 32<<10)
	for {
		k, err := r.Read(buf)
		if k > 0 {
			if _, err := a.Write(buf[:k]); err != nil {
				return n, err
			}
			n += int64(k)
		}
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}
