package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
)

// progress shows how far the orders are: a bar that is drawn over itself on a terminal, now and then a line elsewhere.
type progress struct {
	out      io.Writer
	terminal bool
	size     int64 // of the input in bytes, 0: unknown

	mu                     sync.Mutex
	bytes                  int64
	completed, compensated int
	shown                  time.Time
}

const barWidth = 30

func newProgress(out io.Writer, size int64) *progress {
	p := &progress{out: out, size: size, shown: time.Now()}
	if f, ok := out.(*os.File); ok {
		info, err := f.Stat()
		p.terminal = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	return p
}

// done counts the bytes of a line that needs no more work.
func (p *progress) done(bytes int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.bytes += bytes
	p.show()
}

// ended counts an order that has come to its end.
func (p *progress) ended(completed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if completed {
		p.completed++
	} else {
		p.compensated++
	}
}

// show draws, but not too often. The lock is held.
func (p *progress) show() {
	every := 2 * time.Second
	if p.terminal {
		every = 50 * time.Millisecond
	}
	if time.Since(p.shown) < every {
		return
	}
	p.shown = time.Now()
	p.draw()
}

func (p *progress) draw() {
	state := fmt.Sprintf("%d completed, %d compensated", p.completed, p.compensated)
	if p.size > 0 {
		state = fmt.Sprintf("%3d %%  %s", min(100, 100*p.bytes/p.size), state)
	}
	if !p.terminal {
		fmt.Fprintln(p.out, state)
		return
	}
	if p.size > 0 {
		full := int(min(barWidth, barWidth*p.bytes/p.size))
		state = strings.Repeat("█", full) + strings.Repeat("░", barWidth-full) + " " + state
	}
	fmt.Fprint(p.out, "\r"+state+"\x1b[K")
}

// say prints a line above the bar.
func (p *progress) say(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
	fmt.Fprintln(p.out, text)
}

// end takes the bar away.
func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
}

func (p *progress) clear() {
	if p.terminal {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
}
