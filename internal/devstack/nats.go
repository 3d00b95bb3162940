package devstack

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// NATSConfig configures [StartNATS]. The zero value starts a server on a free port with a temporary store.
type NATSConfig struct {
	// URL is a server that runs already. It is checked, nothing is started, and the fields below are not used.
	URL string

	// StoreDir keeps the streams after Close. Default: a temporary folder that goes with the server.
	StoreDir string

	// Port to listen on, at 127.0.0.1. Default: a free one.
	Port int

	// SyncDefault leaves sync_interval at the server's own default of two minutes, so that a power cut loses what was
	// acknowledged in that time. Default: always, each message is synced before its acknowledgement.
	SyncDefault bool

	// InMemory puts a temporary store into memory where the system offers that with 2 GiB to spare. For tests: they create
	// many streams, and the server syncs as it is told all the same.
	InMemory bool

	// Options, if not nil, changes the server's options last: limits, accounts, TLS, a cluster.
	Options func(*server.Options)
}

// NATS is a nats-server, embedded or given by URL. Its methods are safe for concurrent use.
type NATS struct {
	// URL is where clients connect. It stays the same over Stop and Start.
	URL string

	cfg    NATSConfig
	folder *folder // nil: the server was given by URL

	mu  sync.Mutex
	srv *server.Server // nil: stopped
}

// connectTimeout bounds the wait for a server given by URL, so that a wrong address is told in seconds.
const connectTimeout = 5 * time.Second

var errNotOurs = errors.New("the server was given by URL and is not ours to stop or start")

// StartNATS starts a nats-server inside this process, with JetStream, and returns when it accepts connections.
func StartNATS(ctx context.Context, cfg NATSConfig) (*NATS, error) {
	if cfg.URL != "" {
		return existingNATS(ctx, cfg.URL)
	}
	dir, err := newFolder(cfg.StoreDir, "postrider-nats-", cfg.InMemory, nil)
	if err != nil {
		return nil, fmt.Errorf("devstack: nats store: %w", err)
	}
	n := &NATS{cfg: cfg, folder: dir}
	if err := n.startOnFreePort(ctx); err != nil {
		return nil, errors.Join(err, dir.close())
	}
	return n, nil
}

// existingNATS connects once, to tell a wrong address now rather than at the first publish.
func existingNATS(ctx context.Context, url string) (*NATS, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	for {
		nc, err := nats.Connect(url, nats.Timeout(connectTimeout), nats.NoReconnect())
		if err == nil {
			nc.Close()
			return &NATS{URL: url}, nil
		}
		if !errors.Is(err, nats.ErrNoServers) || !pause(ctx) {
			return nil, fmt.Errorf("devstack: connect to the nats-server given by URL: %w", err)
		}
	}
}

func (n *NATS) startOnFreePort(ctx context.Context) error {
	if n.cfg.Port != 0 {
		return n.Start(ctx)
	}
	var err error
	for range portTries {
		if n.cfg.Port, err = freePort(); err != nil {
			return err
		}
		if err = n.Start(ctx); err == nil || !strings.Contains(err.Error(), "address already in use") {
			return err
		}
	}
	return err
}

// Start starts a stopped server again, on the same port and with the streams it had.
func (n *NATS) Start(ctx context.Context) error {
	if n.folder == nil {
		return fmt.Errorf("devstack: start nats-server: %w", errNotOurs)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.srv != nil {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("devstack: start nats-server: %w", err)
	}

	opts := &server.Options{
		Host:       "127.0.0.1",
		Port:       n.cfg.Port,
		JetStream:  true,
		StoreDir:   n.folder.path,
		SyncAlways: !n.cfg.SyncDefault,
		NoSigs:     true,
		NoLog:      true,
	}
	if n.cfg.Options != nil {
		n.cfg.Options(opts)
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		return fmt.Errorf("devstack: start nats-server: %w", err)
	}
	var fatal fatalLog
	srv.SetLoggerV2(&fatal, false, false, false)
	srv.Start()
	if srv.Addr() == nil || !srv.ReadyForConnections(connectTimeout) {
		srv.Shutdown()
		srv.WaitForShutdown()
		return fmt.Errorf("devstack: start nats-server on %s: %s", loopback(n.cfg.Port), fatal.text())
	}
	n.srv, n.URL = srv, srv.ClientURL()
	return nil
}

// Stop ends the server and keeps its port and its streams for Start. Clients see a lost connection.
func (n *NATS) Stop() error {
	if n.folder == nil {
		return fmt.Errorf("devstack: stop nats-server: %w", errNotOurs)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.srv != nil {
		n.srv.Shutdown()
		n.srv.WaitForShutdown()
		n.srv = nil
	}
	return nil
}

// Close ends the server and removes its store, unless StoreDir was given. A server given by URL goes on.
func (n *NATS) Close() error {
	if n.folder == nil {
		return nil
	}
	return errors.Join(n.Stop(), n.folder.close())
}

// fatalLog keeps what the server says before it gives up; it has no other way to tell why it did not start.
type fatalLog struct {
	mu   sync.Mutex
	last string
}

func (l *fatalLog) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last == "" {
		return "it does not accept connections"
	}
	return l.last
}

func (l *fatalLog) Fatalf(format string, v ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last = fmt.Sprintf(format, v...)
}

func (l *fatalLog) Errorf(string, ...any)  {}
func (l *fatalLog) Warnf(string, ...any)   {}
func (l *fatalLog) Noticef(string, ...any) {}
func (l *fatalLog) Debugf(string, ...any)  {}
func (l *fatalLog) Tracef(string, ...any)  {}

// pause waits a moment between two tries. It reports false when ctx has ended.
func pause(ctx context.Context) bool {
	t := time.NewTimer(20 * time.Millisecond)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
