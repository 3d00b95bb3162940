package bus

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
)

// Proof is how sure it is that what a stream has acknowledged outlives a power cut.
type Proof int

// Proofs.
const (
	NotProved Proof = iota // nobody could be asked
	Disproved              // it is known that a power cut may lose acknowledged messages
	Proved                 // every server that keeps the streams syncs to disk before it acknowledges
)

// String returns "not proved", "disproved" or "proved".
func (p Proof) String() string {
	switch p {
	case Proved:
		return "proved"
	case Disproved:
		return "disproved"
	default:
		return "not proved"
	}
}

// Durability says what is known about the streams of a [Bus]: what becomes of acknowledged messages in a power cut.
type Durability struct {
	Proof Proof

	// Findings say in plain words what stands against the proof, or what it does not cover.
	Findings []string

	// silent says that a server did not answer that should have, so that asking again may help.
	silent bool
}

// err is nil if the proof succeeded.
func (d Durability) err(op string) error {
	code := postrider.FailedPrecondition
	switch {
	case d.Proof == Proved:
		return nil
	case d.silent && d.Proof == NotProved:
		code = postrider.Unavailable
	}
	return &postrider.Error{
		Code: code, Op: op, Unprocessed: true,
		Msg: "RequireDurable is set and durability is " + d.Proof.String() + ": " + strings.Join(d.Findings, "; "),
	}
}

// Durability finds out whether the streams that the bus declares keep what they have acknowledged in a power cut. Each
// stream must be on disk, not in persist_mode async, and each server that keeps a replica must have sync_interval: always.
// Only the servers know the latter; the bus asks them
//
//   - by a request to $SYS.REQ.SERVER.PING.VARZ, which an account may make if it imports that service from the system
//     account (docs/wire.md shows the configuration). Where a user may not, the server tells the connection's error handler.
//   - at [Config.Monitors].
//
// What disks do with a sync is beyond this proof, and so is a server that restarts with another configuration while the
// bus stays connected to another one. The error is that of reading the streams.
func (b *Bus) Durability(ctx context.Context) (Durability, error) {
	if err := b.declare(ctx); err != nil {
		return Durability{}, err
	}
	b.proof.forget()
	names := []string{b.cfg.DeadLetters.Name}
	for _, s := range b.cfg.Streams {
		names = append(names, s.Name)
	}
	all := Durability{Proof: Proved}
	for i, name := range names {
		stream, err := b.js.Stream(ctx, name)
		if i == 0 && errors.Is(err, jetstream.ErrStreamNotFound) {
			continue // only a bus that subscribes has dead letters
		}
		if err != nil {
			return Durability{}, fromNATS("bus: prove durability: stream "+name, err)
		}
		d := b.proof.of(ctx, stream.CachedInfo())
		for _, f := range d.Findings {
			if !slices.Contains(all.Findings, f) {
				all.Findings = append(all.Findings, f)
			}
		}
		if all.Proof == Proved || d.Proof == Disproved {
			all.Proof = d.Proof
		}
		all.silent = all.silent || d.silent
	}
	return all, nil
}

// proveDurable says at start what is known, once, and fails if RequireDurable is set and the proof is not there.
func (b *Bus) proveDurable(ctx context.Context) error {
	d, err := b.Durability(ctx)
	if err != nil {
		return err
	}
	if b.cfg.RequireDurable {
		if err := d.err("bus: start"); err != nil {
			return err
		}
	}
	switch d.Proof {
	case Proved:
		b.log.Info("acknowledged messages outlive a power cut", "durability", d.Proof.String(), "findings", d.Findings)
	case Disproved:
		b.log.Warn("a power cut may lose acknowledged messages", "durability", d.Proof.String(), "findings", d.Findings)
	default:
		b.log.Info("it is not known whether acknowledged messages outlive a power cut", "durability", d.Proof.String(), "findings", d.Findings)
	}
	return nil
}

// syncSetting is what a server says about itself (nats-server: server/monitor.go, Varz).
type syncSetting struct {
	Name      string `json:"server_name"`
	JetStream struct {
		Config *jetStreamConfig `json:"config"`
	} `json:"jetstream"`
}

type jetStreamConfig struct {
	Always   bool          `json:"sync_always"`
	Interval time.Duration `json:"sync_interval"`
}

// proof asks servers for their sync setting and remembers the answers as long as the connection holds: a server that was
// started anew may be configured anew.
type proof struct {
	nc       *nats.Conn
	monitors []string

	mu      sync.Mutex
	epoch   uint64 // reconnects of the connection when the answers came
	servers map[string]syncSetting
}

func newProof(nc *nats.Conn, monitors []string) *proof {
	return &proof{nc: nc, monitors: monitors, servers: map[string]syncSetting{}}
}

func (p *proof) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.servers)
}

// admit fails unless a stream is proved to be durable.
func (p *proof) admit(ctx context.Context, info *jetstream.StreamInfo) error {
	return p.of(ctx, info).err("bus: publish to stream " + info.Config.Name)
}

// of judges one stream.
func (p *proof) of(ctx context.Context, info *jetstream.StreamInfo) Durability {
	name, cfg := info.Config.Name, info.Config
	d := Durability{Proof: Proved}
	find := func(proof Proof, format string, args ...any) {
		d.Findings = append(d.Findings, fmt.Sprintf(format, args...))
		if d.Proof == Proved || proof == Disproved {
			d.Proof = proof
		}
	}
	if cfg.Storage == jetstream.MemoryStorage {
		find(Disproved, "stream %s is kept in memory", name)
	}
	if cfg.PersistMode == jetstream.AsyncPersistMode {
		find(Disproved, "stream %s has persist_mode async: it acknowledges before it writes", name)
	}
	names := []string{p.nc.ConnectedServerName()}
	if c := info.Cluster; c != nil && c.Leader != "" {
		names[0] = c.Leader
		for _, r := range c.Replicas {
			names = append(names, r.Name)
		}
	}
	settings, why, silent := p.ask(ctx, names)
	for _, server := range names {
		s, ok := settings[server]
		switch {
		case !ok:
			d.silent = d.silent || silent
			find(NotProved, "server %s: %s", server, why)
		case s.JetStream.Config == nil || !s.JetStream.Config.Always:
			interval := 2 * time.Minute
			if c := s.JetStream.Config; c != nil {
				interval = cmp.Or(c.Interval, interval)
			}
			find(Disproved, "server %s syncs to disk every %v, not before it acknowledges: set sync_interval: always", server, interval)
		}
	}
	if len(names) == 1 && d.Proof == Proved {
		find(Proved, "stream %s is on one server: the loss of its disk is the loss of the stream", name)
	}
	return d
}

// ask returns the settings of servers by name, those that can be had. Why says what is wrong with the others; silent says
// whether they should have answered.
func (p *proof) ask(ctx context.Context, names []string) (settings map[string]syncSetting, why string, silent bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if epoch := p.nc.Stats().Reconnects; epoch != p.epoch {
		clear(p.servers)
		p.epoch = epoch
	}
	missing := func() bool {
		return slices.ContainsFunc(names, func(n string) bool { _, ok := p.servers[n]; return !ok })
	}
	var problems []string
	if missing() {
		answered, err := p.request(ctx, missing)
		silent = answered
		if err != nil {
			problems = append(problems, err.Error())
		}
	}
	for _, url := range p.monitors {
		if !missing() {
			break
		}
		if err := p.monitor(ctx, url); err != nil {
			silent = true
			problems = append(problems, err.Error())
		}
	}
	problems = append(problems, "so its sync setting is not known")
	return maps.Clone(p.servers), strings.Join(problems, ", "), silent
}

// askTimeout bounds the wait for the answers of servers.
const askTimeout = 5 * time.Second

// varzSubject is where all servers of a cluster listen for requests of the system account.
const varzSubject = "$SYS.REQ.SERVER.PING.VARZ"

// request asks all servers over the connection until nothing is missing. It tells whether there was an answer at all.
func (p *proof) request(ctx context.Context, missing func() bool) (answered bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	sub, err := p.nc.SubscribeSync(p.nc.NewInbox())
	if err != nil {
		return false, err
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := p.nc.PublishRequest(varzSubject, sub.Subject, nil); err != nil {
		return false, err
	}
	// The server tells of a missing permission, by an error of the connection, before it answers the flush.
	if err := p.nc.FlushWithContext(ctx); err != nil {
		return false, err
	}
	if err := p.nc.LastError(); errors.Is(err, nats.ErrPermissionViolation) && strings.Contains(err.Error(), varzSubject) {
		return false, errors.New("this user may not publish to " + varzSubject)
	}
	for missing() {
		msg, err := sub.NextMsgWithContext(ctx)
		switch {
		case errors.Is(err, nats.ErrNoResponders):
			return answered, errors.New("the account does not import " + varzSubject)
		case err != nil:
			return answered, fmt.Errorf("no answer to %s within %v", varzSubject, askTimeout)
		}
		var answer struct {
			Data syncSetting `json:"data"`
		}
		if err := json.Unmarshal(msg.Data, &answer); err != nil {
			return answered, fmt.Errorf("the answer to %s cannot be read: %w", varzSubject, err)
		}
		answered = true
		p.servers[answer.Data.Name] = answer.Data
	}
	return answered, nil
}

// monitor asks one server at its monitoring port.
func (p *proof) monitor(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, Proxy: http.ProxyFromEnvironment}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(url, "/")+"/varz", http.NoBody)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("the monitor does not answer: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the monitor %s answers %s", url, resp.Status)
	}
	var s syncSetting
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&s); err != nil {
		return fmt.Errorf("the answer of the monitor %s cannot be read: %w", url, err)
	}
	p.servers[s.Name] = s
	return nil
}
