//go:build unix

package bus_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// ledger takes effects in the order of the largest fence, and notes what should not happen.
type ledger struct {
	mu    sync.Mutex
	keys  map[string]*account
	stale map[string]int // refused, by member
	wrong []string

	broken map[string]bool // keys whose messages cannot be handled: they are to be parked

	holdFor string    // the answer to the next beginning of this member is held back
	held    *nats.Msg // that beginning
	heldKey string
}

type account struct {
	fence uint64
	open  *deed // being handled under the fence
	next  int   // the N to come
	owner string
	at    time.Time // of the last effect
}

func (l *ledger) handle(msg *nats.Msg) {
	var d deed
	if err := json.Unmarshal(msg.Data, &d); err != nil {
		_ = msg.Respond([]byte(err.Error()))
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.keys[d.Key]
	if k == nil {
		k = &account{}
		l.keys[d.Key] = k
	}
	wrong := func(format string, args ...any) { l.wrong = append(l.wrong, fmt.Sprintf(format, args...)) }
	switch {
	case d.Fence == 0:
		wrong("no fence on %v", d)
	case d.Fence < k.fence:
		l.stale[d.Member]++
		_ = msg.Respond([]byte("replaced"))
		return
	case d.Fence > k.fence:
		k.fence, k.open = d.Fence, nil
	}
	if msg.Subject == "ledger.begin" {
		if l.broken[d.Key] {
			_ = msg.Respond([]byte(answerPark))
			return
		}
		if o := k.open; o != nil && (o.Member != d.Member || o.N != d.N) { // else it is tried again
			wrong("two of one key at once: %v and %v", *o, d)
		}
		k.open = &d
		if l.holdFor == d.Member {
			l.holdFor, l.held, l.heldKey = "", msg, d.Key
			return
		}
		_ = msg.Respond(nil)
		return
	}
	k.open = nil
	if d.N > k.next {
		wrong("%v took effect before %d", d, k.next)
	}
	if d.N == k.next {
		k.next++
		k.owner, k.at = d.Member, time.Now()
	}
	_ = msg.Respond(nil)
}

// breaks has keys fail from now on, and no others.
func (l *ledger) breaks(keys ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.broken = map[string]bool{}
	for _, key := range keys {
		l.broken[key] = true
	}
}

// owned returns the keys whose last effect was a member's.
func (l *ledger) owned(name string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var keys []string
	for key, k := range l.keys {
		if k.owner == name {
			keys = append(keys, key)
		}
	}
	return keys
}

// movedFrom returns when the last of some keys had its first effect by another member, or an error until all had.
func (l *ledger) movedFrom(name string, keys []string, since time.Time) (last time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, key := range keys {
		k := l.keys[key]
		if k.owner == name || k.at.Before(since) {
			return last, fmt.Errorf("%s still has %s", name, key)
		}
	}
	return time.Now(), nil
}

// crew is a test's server, ledger, publisher and members.
type crew struct {
	testing.TB
	*ledger

	url     string
	members map[string]*exec.Cmd
	started int
	publish func() (each int) // ends the publishing, returns how many were published of each key
}

func newCrew(t testing.TB) *crew {
	srv := postridertest.NewNATS(t)
	c := &crew{
		TB: t, ledger: &ledger{keys: map[string]*account{}, stale: map[string]int{}}, url: srv.URL, members: map[string]*exec.Cmd{},
	}
	nc := srv.Connect()
	if _, err := nc.Subscribe("ledger.*", c.handle); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	pub := newBus(t, srv.Connect(), inPartitions(16), func(c *bus.Config) { c.Logger = nil })
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan int)
	go func() {
		n := 0
		for ticker := time.Tick(50 * time.Millisecond); ctx.Err() == nil; n++ {
			notes := make([]*note, memberKeys)
			for k := range notes {
				notes[k] = &note{N: n, Text: fmt.Sprintf("key-%d", k)}
			}
			if err := keyed.PublishAll(context.WithoutCancel(ctx), pub, notes); err != nil {
				t.Errorf("publish: %v", err)
				cancel()
			}
			select {
			case <-ticker:
			case <-ctx.Done():
			}
		}
		done <- n
	}()
	c.publish = sync.OnceValue(func() int { cancel(); return <-done })
	t.Cleanup(func() { c.publish() })
	return c
}

// start starts a member and returns its name.
func (c *crew) start() string {
	c.Helper()
	exe, err := os.Executable()
	if err != nil {
		c.Fatal(err)
	}
	c.started++
	name := fmt.Sprintf("member-%d", c.started)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), memberEnv+"="+name, memberURL+"="+c.url)
	cmd.Stderr = c.Output()
	if _, err := cmd.StdinPipe(); err != nil { // which closes with this process
		c.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		c.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		c.Fatal(err)
	}
	c.Cleanup(func() {
		if c.members[name] != nil {
			c.kill(name)
		}
	})
	c.members[name] = cmd
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "started\n" {
		c.Fatalf("%s said %q, %v", name, line, err)
	}
	return name
}

func (c *crew) signal(name string, s syscall.Signal) {
	c.Helper()
	if err := c.members[name].Process.Signal(s); err != nil {
		c.Fatal(err)
	}
}

func (c *crew) kill(name string) {
	c.Helper()
	c.signal(name, syscall.SIGKILL)
	_ = c.members[name].Wait() // says that it was killed
	delete(c.members, name)
}

// share waits until every member has keys.
func (c *crew) share() {
	c.Helper()
	postridertest.Eventually(c, func() error {
		for name := range c.members {
			if len(c.owned(name)) < memberKeys/len(c.members)/4 {
				return fmt.Errorf("%s has %d keys", name, len(c.owned(name)))
			}
		}
		return nil
	})
}

// failOver kills a member and returns after what time all its keys went on.
func (c *crew) failOver(name string) time.Duration {
	c.Helper()
	keys := c.owned(name)
	killed := time.Now()
	c.kill(name)
	var last time.Time
	postridertest.Eventually(c, func() (err error) { last, err = c.movedFrom(name, keys, killed); return err })
	return last.Sub(killed)
}

// finish waits until everything that was published has taken effect.
func (c *crew) finish() {
	c.Helper()
	each := c.publish()
	postridertest.Eventually(c, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		for key, k := range c.keys {
			if k.next < each {
				return fmt.Errorf("%d of %d of %s took effect", k.next, each, key)
			}
		}
		return nil
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.keys) != memberKeys {
		c.Errorf("%d keys took effect, want %d", len(c.keys), memberKeys)
	}
	for _, w := range c.wrong {
		c.Error(w)
	}
	c.Logf("%d messages took effect; refused as stale: %v", each*len(c.keys), c.stale)
}

// TestFailOver kills one of three processes, has another take its place, and stops one. Every message takes effect, in the
// order of its key, and no key is handled by two at once.
func TestFailOver(t *testing.T) {
	t.Parallel()
	c := newCrew(t)
	a, b := c.start(), c.start()
	c.start()
	c.share()
	t.Logf("the keys of the killed process went on within %v", c.failOver(a).Round(time.Millisecond))
	c.start()
	c.share()
	c.signal(b, syscall.SIGTERM)
	if err := c.members[b].Wait(); err != nil {
		t.Errorf("%s was told to stop: %v", b, err)
	}
	delete(c.members, b)
	c.share()
	c.finish()
}

// TestStalledMember stops a process in the middle of a message, until another one has handled it, and lets it go on. It must
// not have its effect then: the fence is for that.
func TestStalledMember(t *testing.T) {
	t.Parallel()
	c := newCrew(t)
	a := c.start()
	c.start()
	c.start()
	c.share()
	c.mu.Lock()
	c.holdFor = a
	c.mu.Unlock()
	var held *nats.Msg
	var keys []string
	postridertest.Eventually(t, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if held, keys = c.held, []string{c.heldKey}; held == nil {
			return errors.New("no message has begun")
		}
		return nil
	})
	stalled := time.Now()
	c.signal(a, syscall.SIGSTOP)
	postridertest.Eventually(t, func() error { _, err := c.movedFrom(a, keys, stalled); return err })
	c.signal(a, syscall.SIGCONT)
	if err := held.Respond(nil); err != nil {
		t.Fatal(err)
	}
	postridertest.Eventually(t, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.stale[a] == 0 {
			return errors.New("the stalled process was not refused")
		}
		return nil
	})
	c.share() // the stalled one has a part again
	c.finish()
}

// TestParkOverKills kills processes while keys are parked, and while they are released. Every message takes effect, in the
// order of its key.
func TestParkOverKills(t *testing.T) {
	t.Parallel()
	c := newCrew(t)
	a, b := c.start(), c.start()
	c.start()
	c.share()
	broken := []string{"key-0", "key-1", "key-2", "key-3", "key-4", "key-5"}
	nc, err := nats.Connect(c.url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	operators := newBus(t, nc)
	c.breaks(broken...)
	c.kill(a) // what it owned is parked by it, by others, or half
	c.start()
	postridertest.Eventually(t, func() error {
		keys, _, err := operators.Parked().Keys(t.Context(), bus.ParkedFilter{}, "", 0)
		if err == nil && len(keys) != len(broken) {
			err = fmt.Errorf("%d keys are parked, want %d", len(keys), len(broken))
		}
		return err
	})
	c.share()
	c.breaks()
	if n, err := operators.Parked().Release(t.Context(), bus.ParkedFilter{}, operator); n != len(broken) || err != nil {
		t.Fatalf("%d keys released, error %v", n, err)
	}
	c.kill(b)
	c.start()
	c.finish()
	nothingParked(t, nc, operators)
}

// BenchmarkFailOver kills one of three processes again and again, and reports after what time all its keys went on:
//
//	go test ./bus -run '^$' -bench FailOver -benchtime 10x
func BenchmarkFailOver(b *testing.B) {
	c := newCrew(b)
	names := []string{c.start(), c.start(), c.start()}
	var took []time.Duration
	for b.Loop() {
		c.share()
		took = append(took, c.failOver(names[0]))
		names = append(names[1:], c.start())
	}
	c.finish()
	slices.Sort(took)
	b.Logf("fail-over: %v", took)
	b.ReportMetric(took[len(took)/2].Seconds(), "s-median")
	b.ReportMetric(took[len(took)-1].Seconds(), "s-worst")
}
