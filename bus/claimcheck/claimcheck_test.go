package claimcheck_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/bus/claimcheck"
	"github.com/postrider/postrider/codec"
	"github.com/postrider/postrider/internal/wiredoc"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

func TestMain(m *testing.M) { os.Exit(postridertest.Main(m)) }

// files carry their bytes as they are: a codec that takes an empty payload without complaint.
var (
	scanned = postrider.NewTopic[[]byte]("files.scanned.v1", postrider.Encoding(codec.Bytes))
	convert = postrider.NewMethod[[]byte, []byte]("files.v1/Convert", postrider.Encoding(codec.Bytes))
)

// fiveMiB is larger than the server's max_payload of 1 MiB, and no two parts of it are the same.
func fiveMiB() *[]byte {
	r := rand.NewChaCha8([32]byte{1})
	b := make([]byte, 5<<20)
	if _, err := r.Read(b); err != nil {
		panic(err)
	}
	return &b
}

func newStore(t *testing.T, nc *nats.Conn, change ...func(*claimcheck.Config)) *claimcheck.Store {
	t.Helper()
	cfg := claimcheck.Config{MaxAge: time.Hour}
	for _, c := range change {
		c(&cfg)
	}
	s, err := claimcheck.New(nc, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newBus(t *testing.T, nc *nats.Conn, mw ...postrider.Middleware) *bus.Bus {
	t.Helper()
	b, err := bus.New(nc, bus.Config{
		Source: "//test/files", Group: "tester", Logger: postridertest.Logger(t), Middleware: mw,
		Streams: []bus.Stream{{Name: "FILES", Topics: []string{"files.>"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// subscribe hands on the digests of what arrives.
func subscribe(t *testing.T, b *bus.Bus) <-chan [32]byte {
	t.Helper()
	got := make(chan [32]byte, 100)
	err := b.Subscribe(scanned.Handler(func(ctx context.Context, e postrider.Event[[]byte]) error {
		if m := postrider.MessageFromContext(ctx); len(m.Data) != len(*e.Value) || len(m.Extensions) != 0 {
			t.Errorf("the context has a message of %d bytes with %v", len(m.Data), m.Extensions)
		}
		got <- sha256.Sum256(*e.Value)
		return nil
	}), bus.From(bus.DeliverAll), bus.Retry(postrider.RetryPolicy{Attempts: 3, Initial: time.Millisecond}))
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// run runs parts until the test ends.
func run(t *testing.T, parts ...postrider.Runner) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- postrider.Run(ctx, parts...) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// wantNext waits for the next payload.
func wantNext(t *testing.T, got <-chan [32]byte, want []byte) {
	t.Helper()
	select {
	case digest := <-got:
		if digest != sha256.Sum256(want) {
			t.Errorf("another payload arrived, want one of %d bytes", len(want))
		}
	case <-time.After(30 * time.Second):
		t.Fatal("nothing arrived")
	}
}

// wantDeadLetter waits for the one dead letter.
func wantDeadLetter(t *testing.T, b *bus.Bus, code postrider.Code, attempts int, cause string) {
	t.Helper()
	var letters []bus.DeadLetter
	postridertest.Eventually(t, func() (err error) {
		if letters, _, err = b.DeadLetters().List(t.Context(), bus.LetterFilter{}, 0, 0); err == nil && len(letters) != 1 {
			err = fmt.Errorf("%d dead letters, want 1", len(letters))
		}
		return err
	})
	if l := letters[0]; l.Code != code || l.Attempts != attempts || !strings.Contains(l.Cause, cause) {
		t.Errorf("dead letter after %d attempts: %v: %s; want %d, %v with %q", l.Attempts, l.Code, l.Cause, attempts, code, cause)
	}
}

func bucket(t *testing.T, nc *nats.Conn) jetstream.ObjectStore {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	b, err := js.ObjectStore(t.Context(), "CLAIMS")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func objects(t *testing.T, nc *nats.Conn) []string {
	t.Helper()
	infos, err := bucket(t, nc).List(t.Context())
	if err != nil && !errors.Is(err, jetstream.ErrNoObjectsFound) {
		t.Fatal(err)
	}
	var names []string
	for _, info := range infos {
		names = append(names, info.Name)
	}
	return names
}

func TestLargePayloadOverTheBus(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	claims := newStore(t, nc)
	b := newBus(t, nc, claims.Middleware)
	got := subscribe(t, b)
	large, small := fiveMiB(), []byte("small")
	if err := scanned.Publish(t.Context(), b, large); !errors.Is(err, postrider.ResourceExhausted) {
		t.Fatalf("5 MiB without a claim check: %v, want the server's limit", err)
	}
	m, err := scanned.Message(t.Context(), large)
	if err != nil {
		t.Fatal(err)
	}
	if err := claims.Publisher(b).Publish(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	if len(m.Data) != len(*large) || len(m.Extensions) != 0 || m.Source != "//test/files" {
		t.Errorf("the caller's message changed: %d bytes, source %q, %v", len(m.Data), m.Source, m.Extensions)
	}
	run(t, b)
	wantNext(t, got, *large)
	if err := scanned.Publish(t.Context(), claims.Publisher(b), &small); err != nil {
		t.Fatal(err)
	}
	wantNext(t, got, small)
	if names := objects(t, nc); len(names) != 1 {
		t.Errorf("the store has %q, want the large payload only", names)
	}
}

func TestThroughTheOutbox(t *testing.T) {
	t.Parallel()
	nc, pool := postridertest.NATS(t), postridertest.Postgres(t)
	claims := newStore(t, nc)
	b := newBus(t, nc, claims.Middleware)
	got := subscribe(t, b)
	if err := outbox.Migrate(t.Context(), pool, ""); err != nil {
		t.Fatal(err)
	}
	ob, err := outbox.New(outbox.Config{Source: "//test/files"})
	if err != nil {
		t.Fatal(err)
	}
	relay, err := outbox.NewRelay(pool, b, outbox.RelayConfig{Outbox: ob, Logger: postridertest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	run(t, b, relay)
	large, rolledBack := fiveMiB(), errors.New("no")
	place := func(result error) error {
		return pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
			return errors.Join(scanned.Publish(t.Context(), claims.Publisher(ob.In(tx)), large), result)
		})
	}
	if err := place(rolledBack); !errors.Is(err, rolledBack) || errors.Is(err, postrider.ResourceExhausted) {
		t.Fatal(err)
	}
	if err := place(nil); err != nil {
		t.Fatal(err)
	}
	wantNext(t, got, *large)
	if names := objects(t, nc); len(names) != 2 {
		t.Errorf("the store has %q, want the payload and the orphan", names)
	}
	postridertest.Eventually(t, func() error { // it is counted after the handler has returned
		if s := b.Stats(); s.Handled != 1 || s.DeadLettered != 0 {
			return fmt.Errorf("%+v, want one message", s)
		}
		return nil
	})
}

// Payloads that nobody needs any more go by themselves, orphans too.
func TestCleanUp(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	claims := newStore(t, nc, func(c *claimcheck.Config) { c.MaxAge = time.Second })
	orphaned := false
	failing := &postridertest.Recorder{Fail: func(m *postrider.Message) error {
		orphaned = m.Extension(postrider.ExtDataRef) != ""
		return errors.New("no")
	}}
	data := make([]byte, 300<<10)
	if err := scanned.Publish(t.Context(), claims.Publisher(failing), &data); err == nil || !orphaned {
		t.Fatalf("stored %t, published: %v", orphaned, err)
	}
	postridertest.Eventually(t, func() error {
		status, err := bucket(t, nc).Status(t.Context())
		if err == nil && status.Size() > 0 {
			err = fmt.Errorf("the store still has %d bytes", status.Size())
		}
		return err
	})
}

func TestBucketKeepsTheLongestAge(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	// As an operator made it, with a limit that must stay.
	_, err = js.CreateObjectStore(t.Context(), jetstream.ObjectStoreConfig{Bucket: "CLAIMS", TTL: time.Hour, MaxBytes: 100 << 20})
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 1<<20)
	for _, tt := range []struct{ maxAge, want time.Duration }{
		{time.Minute, time.Hour}, {2 * time.Hour, 2 * time.Hour}, {time.Hour, 2 * time.Hour}, {-1, 0}, {time.Hour, 0},
	} {
		claims := newStore(t, nc, func(c *claimcheck.Config) { c.MaxAge = tt.maxAge })
		if err := scanned.Publish(t.Context(), claims.Publisher(&postridertest.Recorder{}), &data); err != nil {
			t.Fatal(err)
		}
		stream, err := js.Stream(t.Context(), "OBJ_CLAIMS")
		if err != nil {
			t.Fatal(err)
		}
		if cfg := stream.CachedInfo().Config; cfg.MaxAge != tt.want || cfg.MaxBytes != 100<<20 {
			t.Errorf("with MaxAge %v the bucket keeps payloads for %v and %d bytes, want %v", tt.maxAge, cfg.MaxAge, cfg.MaxBytes, tt.want)
		}
	}
}

// The reply of a durable command may be large as well.
func TestReply(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	claims := newStore(t, nc)
	b := newBus(t, nc, claims.Middleware)
	large := fiveMiB()
	got := make(chan [32]byte, 1)
	err := errors.Join(
		b.Subscribe(convert.Handler(func(_ context.Context, req *[]byte) (*[]byte, error) {
			res := bytes.Clone(*req)
			res[0]++
			return &res, nil
		})),
		b.Subscribe(postrider.RawHandler("files.replies", func(_ context.Context, m *postrider.Message) error {
			res, err := convert.Response(m)
			if err != nil {
				t.Errorf("reply: %v", err)
				return nil
			}
			got <- sha256.Sum256(*res)
			return nil
		}), bus.From(bus.DeliverAll)))
	if err != nil {
		t.Fatal(err)
	}
	run(t, b)
	if err := convert.Send(t.Context(), claims.Publisher(b), large, postrider.ReplyTo("files.replies")); err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(*large)
	want[0]++
	wantNext(t, got, want)
}

// What is wrong with a payload ends in the dead letters, with the cause.
func TestBadPayloads(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		spoil    func(t *testing.T, nc *nats.Conn, object string)
		code     postrider.Code
		attempts int
		cause    string
	}{
		"replaced": {func(t *testing.T, nc *nats.Conn, object string) {
			t.Helper()
			if _, err := bucket(t, nc).PutBytes(t.Context(), object, make([]byte, 1<<20)); err != nil {
				t.Fatal(err)
			}
		}, postrider.DataLoss, 1, "is not what was stored"},
		"grown beyond the limit": {func(t *testing.T, nc *nats.Conn, object string) {
			t.Helper()
			if _, err := bucket(t, nc).PutBytes(t.Context(), object, make([]byte, 9<<20)); err != nil {
				t.Fatal(err)
			}
		}, postrider.ResourceExhausted, 1, "Config.MaxBytes is 8388608"},
		"deleted": {func(t *testing.T, nc *nats.Conn, object string) {
			t.Helper()
			if err := bucket(t, nc).Delete(t.Context(), object); err != nil {
				t.Fatal(err)
			}
		}, postrider.Unavailable, 3, "has no object"},
		"bucket gone": {func(t *testing.T, nc *nats.Conn, _ string) {
			t.Helper()
			js, err := jetstream.New(nc)
			if err == nil {
				err = js.DeleteObjectStore(t.Context(), "CLAIMS")
			}
			if err != nil {
				t.Fatal(err)
			}
		}, postrider.Unavailable, 3, "has no object"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nc := postridertest.NATS(t)
			limit := func(c *claimcheck.Config) { c.MaxBytes = 8 << 20 }
			b := newBus(t, nc, newStore(t, nc, limit).Middleware)
			subscribe(t, b)
			if err := scanned.Publish(t.Context(), newStore(t, nc, limit).Publisher(b), fiveMiB()); err != nil {
				t.Fatal(err)
			}
			tt.spoil(t, nc, objects(t, nc)[0])
			run(t, b)
			wantDeadLetter(t, b, tt.code, tt.attempts, tt.cause)
		})
	}
}

// A handler without the middleware, or with that of another bucket, must not take a reference for an empty payload.
func TestReferencesThatAreNotResolved(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		middleware func(nc *nats.Conn) []postrider.Middleware
		change     func(m *postrider.Message)
		cause      string
	}{
		"no middleware": {
			func(*nats.Conn) []postrider.Middleware { return nil }, func(*postrider.Message) {},
			"the data is not in the message but at nats-object:CLAIMS/",
		},
		"another bucket": {func(nc *nats.Conn) []postrider.Middleware {
			return []postrider.Middleware{newStore(t, nc, func(c *claimcheck.Config) { c.Bucket = "OTHER" }).Middleware}
		}, func(*postrider.Message) {}, "and Config.Bucket is OTHER"},
		"another kind of reference": {func(nc *nats.Conn) []postrider.Middleware {
			return []postrider.Middleware{newStore(t, nc).Middleware}
		}, func(m *postrider.Message) { m.Extensions[1].Value = "https://example.com/1" }, "but at https://example.com/1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nc := postridertest.NATS(t)
			b := newBus(t, nc, tt.middleware(nc)...)
			got := subscribe(t, b)
			rec := &postridertest.Recorder{}
			if err := scanned.Publish(t.Context(), newStore(t, nc).Publisher(rec), fiveMiB()); err != nil {
				t.Fatal(err)
			}
			m := rec.Messages()[0]
			tt.change(m)
			if err := b.Publish(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			run(t, b)
			wantDeadLetter(t, b, postrider.FailedPrecondition, 1, tt.cause)
			if len(got) > 0 {
				t.Error("the handler ran")
			}
		})
	}
}

func TestPublishErrors(t *testing.T) {
	t.Parallel()
	server := postridertest.NewNATS(t)
	nc := server.Connect()
	claims := newStore(t, nc, func(c *claimcheck.Config) { c.MaxBytes = 1 << 20 })
	rec := &postridertest.Recorder{}
	p := claims.Publisher(rec)
	small, fits, large := []byte("small"), make([]byte, 1<<20), make([]byte, 1<<20+1)
	err := scanned.PublishAll(t.Context(), p, []*[]byte{&small, &fits, &large})
	if !errors.Is(err, postrider.ResourceExhausted) || postrider.Retryable(err) || len(rec.Messages()) != 0 {
		t.Errorf("one of three is too large: %v, %d published; want none", err, len(rec.Messages()))
	}
	if err := scanned.PublishAll(t.Context(), p, []*[]byte{&small, &fits}); err != nil || len(rec.Messages()) != 2 {
		t.Errorf("%v, %d published", err, len(rec.Messages()))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := scanned.Publish(ctx, p, &fits); !errors.Is(err, postrider.Canceled) {
		t.Errorf("with a cancelled context: %v", err)
	}
	server.Stop()
	postridertest.Eventually(t, func() error {
		if nc.IsConnected() {
			return errors.New("still connected")
		}
		return nil
	})
	if err := scanned.Publish(t.Context(), p, &fits); !errors.Is(err, postrider.Unavailable) || !strings.Contains(err.Error(), "not connected") {
		t.Errorf("with NATS away: %v", err)
	}
	if err := scanned.Publish(t.Context(), p, &small); err != nil {
		t.Errorf("a small payload needs no store: %v", err)
	}
	server.Start()
	postridertest.Eventually(t, func() error { return scanned.Publish(t.Context(), p, &fits) })
}

func TestManyInstancesStartAtOnce(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	data := make([]byte, 300<<10)
	var wg sync.WaitGroup
	for range 10 {
		p := newStore(t, nc).Publisher(&postridertest.Recorder{})
		wg.Go(func() {
			if err := scanned.Publish(t.Context(), p, &data); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := len(objects(t, nc)); n != 10 {
		t.Errorf("%d payloads, want 10", n)
	}
}

// What docs/wire.md shows is read, and written but for the object's name.
func TestWireDocument(t *testing.T) {
	t.Parallel()
	block := wiredoc.Text(t, "text claim")
	ref, digest, ok := strings.Cut(strings.TrimPrefix(block, "ce-dataref: "), "\nce-datadigest: ")
	if !ok {
		t.Fatalf("docs/wire.md shows a claim as %q", block)
	}
	nc, rec := postridertest.NATS(t), &postridertest.Recorder{}
	claims := newStore(t, nc, func(c *claimcheck.Config) { c.MinBytes = 500 })
	data := bytes.Repeat([]byte("large"), 100)
	if err := scanned.Publish(t.Context(), claims.Publisher(rec), &data); err != nil {
		t.Fatal(err)
	}
	m := rec.Messages()[0]
	wrote, name := m.Extension(postrider.ExtDataRef), objects(t, nc)[0]
	if prefix, _, _ := strings.Cut(ref, "/"); wrote != prefix+"/"+name || m.Extension(postrider.ExtDataDigest) != digest || len(m.Data) > 0 {
		t.Errorf("written with %v and %d bytes of data, docs/wire.md has %s and %s", m.Extensions, len(m.Data), ref, digest)
	}
	_, name, _ = strings.Cut(ref, "/")
	_, err := bucket(t, nc).PutBytes(t.Context(), name, data)
	if err = errors.Join(err, m.SetExtension(postrider.ExtDataRef, ref), m.SetExtension(postrider.ExtDataDigest, digest)); err != nil {
		t.Fatal(err)
	}
	_, err = claims.Middleware(func(_ context.Context, m *postrider.Message) (*postrider.Message, error) {
		if !bytes.Equal(m.Data, data) {
			t.Errorf("fetched %q", m.Data)
		}
		return nil, nil
	})(t.Context(), m)
	if err != nil {
		t.Error(err)
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	for field, cfg := range map[string]claimcheck.Config{
		"MaxAge is required": {},
		"Bucket is":          {MaxAge: 1, Bucket: "a.b"},
		"MinBytes is -1":     {MaxAge: 1, MinBytes: -1},
		"MaxBytes is 5":      {MaxAge: 1, MinBytes: 6, MaxBytes: 5},
		"Replicas is 6":      {MaxAge: 1, Replicas: 6},
		"Timeout is -1ns":    {MaxAge: 1, Timeout: -1},
	} {
		if _, err := claimcheck.New(nc, cfg); !errors.Is(err, postrider.InvalidArgument) || !strings.Contains(err.Error(), "claimcheck: Config."+field) {
			t.Errorf("%+v: %v, want %s", cfg, err, field)
		}
	}
}

// References come from the wire: whatever they say, the middleware answers with an error or leaves them alone.
func FuzzReference(f *testing.F) {
	nc := postridertest.NATS(f)
	claims, err := claimcheck.New(nc, claimcheck.Config{MaxAge: time.Hour, Timeout: 5 * time.Second})
	if err != nil {
		f.Fatal(err)
	}
	f.Add("nats-object:CLAIMS/01", "sha-256=00")
	f.Add("nats-object:CLAIMS/", "")
	f.Add("nats-object:CLAIMS/a.*.>", "x")
	f.Add("nats-object:", "")
	f.Add("https://example.com", "")
	f.Fuzz(func(t *testing.T, ref, digest string) {
		m := &postrider.Message{ID: "1", Type: "files.scanned.v1"}
		if errors.Join(m.SetExtension(postrider.ExtDataRef, ref), m.SetExtension(postrider.ExtDataDigest, digest)) != nil {
			return
		}
		_, err := claims.Middleware(func(_ context.Context, got *postrider.Message) (*postrider.Message, error) {
			if got != m || strings.HasPrefix(ref, "nats-object:") {
				t.Errorf("%q was resolved", ref)
			}
			return nil, nil
		})(t.Context(), m)
		if err == nil && strings.HasPrefix(ref, "nats-object:") {
			t.Errorf("%q gives no error", ref)
		}
	})
}

func BenchmarkClaim(b *testing.B) {
	nc := postridertest.NATS(b)
	claims, err := claimcheck.New(nc, claimcheck.Config{MaxAge: time.Hour})
	if err != nil {
		b.Fatal(err)
	}
	for _, size := range []int{1 << 20, 5 << 20} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			data := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() { // stored and fetched
				rec := &postridertest.Recorder{}
				if err := scanned.Publish(b.Context(), claims.Publisher(rec), &data); err != nil {
					b.Fatal(err)
				}
				_, err := claims.Middleware(func(_ context.Context, m *postrider.Message) (*postrider.Message, error) {
					if len(m.Data) != size {
						b.Errorf("fetched %d bytes", len(m.Data))
					}
					return nil, nil
				})(b.Context(), rec.Messages()[0])
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
