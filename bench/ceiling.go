package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
)

// ceiling shows what the server allows: the bytes that plain sends, made beforehand but for ids and numbers, written to a bare
// connection in one go, and answers that are hardly read. There are no callers to be woken.
type ceiling struct {
	atomic bool // atomic batches, each of all that is on its way; else single messages and fast batches
	conn   net.Conn
	in     *bufio.Reader
	out    []byte
	inbox  string
	header []byte // of a message
	body   []byte
	ids    []int  // where in the header its id stands
	last   uint64 // number of a message, which is the end of its id
}

func openCeiling(ctx context.Context, s site) (session, error) { return dialCeiling(ctx, s, false) }
func openAtomicCeiling(ctx context.Context, s site) (session, error) {
	return dialCeiling(ctx, s, true)
}

func dialCeiling(ctx context.Context, s site, atomic bool) (session, error) {
	u, err := url.Parse(s.url)
	if err != nil {
		return nil, err
	}
	m, err := (&plain{site: s}).message(&value{Value: make([]byte, s.size)})
	if err != nil {
		return nil, err
	}
	var header bytes.Buffer
	header.WriteString("NATS/1.0\r\n")
	if err := http.Header(m.Header).Write(&header); err != nil {
		return nil, err
	}
	header.WriteString("\r\n")
	c := &ceiling{atomic: atomic, inbox: nats.NewInbox(), header: header.Bytes(), body: m.Data}
	for id, at := []byte(m.Header.Get("ce-id")), 0; ; {
		i := bytes.Index(c.header[at:], id)
		if i < 0 {
			break
		}
		at += i + len(id)
		c.ids = append(c.ids, at)
	}
	if c.conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", u.Host); err != nil {
		return nil, err
	}
	c.in = bufio.NewReaderSize(c.conn, 64<<10)
	c.out = append(c.out, `CONNECT {"verbose":false,"headers":true,"no_responders":true,"protocol":1}`+"\r\nSUB "+c.inbox+".> 1\r\n"...)
	return c, c.flush()
}

// add puts a message into the buffer, with a reply subject behind the inbox, if any, and further headers.
func (c *ceiling) add(reply, headers string) {
	c.last++
	out := c.out
	out = append(out, "HPUB "+subject+" "...)
	if reply != "" {
		out = append(append(append(append(out, c.inbox...), '.'), reply...), ' ')
	}
	size := len(c.header) + len(headers)
	out = append(strconv.AppendInt(out, int64(size), 10), ' ')
	out = append(strconv.AppendInt(out, int64(size+len(c.body)), 10), "\r\n"...)
	at := len(out)
	out = append(append(append(out, c.header[:len(c.header)-2]...), headers...), "\r\n"...)
	out = append(append(out, c.body...), "\r\n"...)
	for _, end := range c.ids {
		for i, n := at+end-1, c.last; i >= at+end-12; i-- {
			out[i] = "0123456789abcdef"[n&15]
			n >>= 4
		}
	}
	c.out = out
}

func (c *ceiling) flush() error {
	_, err := c.conn.Write(c.out)
	c.out = c.out[:0]
	return err
}

// receive reads one answer, and returns its data as long as nothing else is read.
func (c *ceiling) receive() ([]byte, error) {
	for {
		line, err := c.in.ReadSlice('\n')
		switch {
		case err != nil:
			return nil, err
		case bytes.HasPrefix(line, []byte("INFO")):
		case bytes.HasPrefix(line, []byte("PING")):
			if _, err := io.WriteString(c.conn, "PONG\r\n"); err != nil {
				return nil, err
			}
		case bytes.HasPrefix(line, []byte("MSG ")):
			size := 0
			for _, digit := range line[bytes.LastIndexByte(line, ' ')+1 : len(line)-2] {
				size = 10*size + int(digit-'0')
			}
			data, err := c.in.Peek(size + 2)
			if err != nil {
				return nil, err
			}
			if bytes.Contains(data, []byte(`"error"`)) || bytes.Contains(data, []byte(`"duplicate"`)) {
				return nil, fmt.Errorf("the server answers %s", data)
			}
			_, err = c.in.Discard(size + 2)
			return data, err
		default:
			return nil, fmt.Errorf("the server says %q", line)
		}
	}
}

// drive publishes until the time is up, n at a time, and returns how many were acknowledged.
func (c *ceiling) drive(k kind, n int, until time.Time) (published int64, err error) {
	step := func() (int, error) { return batchSize, c.fastBatch() }
	switch {
	case c.atomic && k == batching:
		n = batchSize
		fallthrough
	case c.atomic:
		step = func() (int, error) { return n, c.atomicBatch(n) }
	case k == publishing:
		return c.singly(n, until)
	}
	for time.Now().Before(until) {
		n, err := step()
		if err != nil {
			return published, err
		}
		published += int64(n)
	}
	return published, nil
}

// singly keeps n messages on their way: one more for each acknowledgement, in one write for all that came in one read.
func (c *ceiling) singly(n int, until time.Time) (published int64, err error) {
	for flying, ready := 0, n; ; {
		if ready > 0 && c.in.Buffered() == 0 && time.Now().Before(until) {
			for i := range ready {
				c.add(strconv.Itoa(i), "") // subjects that the server knows
			}
			flying, ready = flying+ready, 0
			if err := c.flush(); err != nil {
				return published, err
			}
		}
		if flying == 0 {
			return published, nil
		}
		if _, err := c.receive(); err != nil {
			return published, err
		}
		published, flying, ready = published+1, flying-1, ready+1
	}
}

func (c *ceiling) atomicBatch(n int) error {
	id := c.inbox[len(c.inbox)-22:] + strconv.FormatUint(c.last, 10)
	for i := 1; i < n; i++ {
		c.add("", "Nats-Batch-Id: "+id+"\r\nNats-Batch-Sequence: "+strconv.Itoa(i)+"\r\n")
	}
	c.add("0", "Nats-Batch-Id: "+id+"\r\nNats-Batch-Sequence: "+strconv.Itoa(n)+"\r\nNats-Batch-Commit: 1\r\n")
	if err := c.flush(); err != nil {
		return err
	}
	_, err := c.receive()
	return err
}

// fastBatch publishes a batch whose messages go out in pieces of 64 KiB.
func (c *ceiling) fastBatch() error {
	prefix := "b" + strconv.FormatUint(c.last, 10) + ".500.fail."
	for i := 1; i <= batchSize; i++ {
		op := ".1.$FI"
		switch i {
		case 1:
			op = ".0.$FI"
		case batchSize:
			op = ".2.$FI"
		}
		c.add(prefix+strconv.Itoa(i)+op, "")
		if len(c.out) < 64<<10 && i < batchSize {
			continue
		}
		if err := c.flush(); err != nil {
			return err
		}
	}
	for {
		if data, err := c.receive(); err != nil || bytes.HasPrefix(data, []byte(`{"stream"`)) { // the last one
			return err
		}
	}
}

func (c *ceiling) publish(context.Context, *value) error {
	c.add("0", "")
	if err := c.flush(); err != nil {
		return err
	}
	_, err := c.receive()
	return err
}

var errCeiling = errors.New("the ceiling publishes, and nothing else")

func (c *ceiling) publishAll(context.Context, []*value) error { return errCeiling }
func (c *ceiling) backlog(context.Context, []*value) error    { return errCeiling }
func (c *ceiling) handle(context.Context, int, func(*value) error) (func() error, error) {
	return nil, errCeiling
}
func (c *ceiling) close() { _ = c.conn.Close() }
