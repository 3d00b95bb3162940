package faultproxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"testing"

	"github.com/postrider/postrider/postridertest"
)

func TestMain(m *testing.M) { os.Exit(postridertest.Main(m)) }

// lines is a server that tells the lines it got and sends them back.
func lines(t *testing.T) (addr string, got chan string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	got = make(chan string, 10)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for s := bufio.NewScanner(c); s.Scan(); {
					fmt.Fprintln(c, s.Text())
					got <- s.Text()
				}
			}()
		}
	}()
	return l.Addr().String(), got
}

func TestProxy(t *testing.T) {
	t.Parallel()
	addr, got := lines(t)
	p, err := New(addr)
	if err != nil {
		t.Fatal(err)
	}
	dial := func() (net.Conn, *bufio.Reader) {
		c, err := net.Dial("tcp", p.Addr())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c, bufio.NewReader(c)
	}
	c, r := dial()
	fmt.Fprintln(c, "one")
	if s, err := r.ReadString('\n'); err != nil || s != "one\n" || <-got != "one" {
		t.Fatalf("read %q, %v", s, err)
	}
	p.Swallow()
	fmt.Fprintln(c, "two")
	if s := <-got; s != "two" { // it was done
		t.Fatalf("the server got %q", s)
	}
	p.Cut()
	if s, err := r.ReadString('\n'); err == nil { // and nobody heard of it
		t.Fatalf("read %q after the cut", s)
	}
	c, r = dial()
	fmt.Fprintln(c, "three")
	if s, err := r.ReadString('\n'); err != nil || s != "three\n" {
		t.Fatalf("a new connection read %q, %v", s, err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ReadString('\n'); err == nil {
		t.Fatal("the connection outlives the proxy")
	}
	if c, err := net.Dial("tcp", p.Addr()); err == nil {
		_, err := c.Read(make([]byte, 1))
		if err != io.EOF {
			t.Fatal("the proxy still takes connections")
		}
	}
}
