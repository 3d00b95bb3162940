package harness

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"
)

const endTimeout = 10 * time.Second

// process is a child of this program: the program itself, in a role that its first argument names. They talk in JSON
// lines, and the child ends when its standard input does, so that nothing outlives the program that a person started,
// however that ends.
type process struct {
	role  string
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan json.RawMessage // closed when the child's output ends
}

// start starts a child. The caller ends it.
func start(ctx context.Context, role string, args ...string) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("start the %s: %w", role, err)
	}
	// Not ended by ctx: a server that is killed leaves its folder behind.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), self, append([]string{role}, args...)...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start the %s: %w", role, err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start the %s: %w", role, err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the %s: %w", role, err)
	}
	p := &process{role: role, cmd: cmd, in: in, lines: make(chan json.RawMessage)}
	go func() {
		defer close(p.lines)
		for d := json.NewDecoder(out); ; {
			var line json.RawMessage
			if d.Decode(&line) != nil {
				return
			}
			p.lines <- line
		}
	}()
	return p, nil
}

// receive waits for the child's next answer.
func (p *process) receive(v any, timeout time.Duration) error {
	select {
	case line, ok := <-p.lines:
		if !ok {
			return fmt.Errorf("the %s ended without an answer", p.role)
		}
		return json.Unmarshal(line, v)
	case <-time.After(timeout):
		return fmt.Errorf("the %s did not answer within %v", p.role, timeout)
	}
}

// ask sends the child a question and waits for the answer.
func (p *process) ask(question, answer any, timeout time.Duration) error {
	if err := json.NewEncoder(p.in).Encode(question); err != nil {
		return fmt.Errorf("ask the %s: %w", p.role, err)
	}
	return p.receive(answer, timeout)
}

// end closes the child's input and waits until it is gone; one that does not go is killed.
func (p *process) end() error {
	_ = p.in.Close() // it may have ended by itself
	go func() {
		for range p.lines { // nobody waits for what it still says
		}
	}()
	timer := time.AfterFunc(endTimeout, func() { _ = p.cmd.Process.Kill() })
	defer timer.Stop()
	var exit *exec.ExitError
	if err := p.cmd.Wait(); err != nil && !errors.As(err, &exit) {
		return fmt.Errorf("end the %s: %w", p.role, err)
	}
	return nil
}
