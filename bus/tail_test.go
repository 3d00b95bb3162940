package bus_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/internal/devstack"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

var _ outbox.Tailer = (*bus.Bus)(nil)

// fickle is a nats-server that can lose what it did not sync, an outbox, and a relay between them.
type fickle struct {
	t      *testing.T
	dir    string
	server *devstack.NATS // nil: several
	log    syncBuffer
	nc     *nats.Conn
	js     jetstream.JetStream
	pool   *pgxpool.Pool
	ob     *outbox.Outbox
	bus    *interrupted
	stop   func() error // of the relay
	n      int          // notes published
}

var keyedNotes = postrider.NewTopic[note]("notes.keyedNotes.v1", postrider.KeyBy(func(n *note) string { return fmt.Sprint("key", n.N%3) })) //nolint:gochecknoglobals // constant

// interrupted is a bus to which something may happen just before it looks for the ends of streams.
type interrupted struct {
	*bus.Bus
	before atomic.Pointer[func()]
}

func (i *interrupted) Tail(ctx context.Context, topics []string, delayed bool) (map[string]string, error) {
	if before := i.before.Swap(nil); before != nil {
		(*before)()
	}
	return i.Bus.Tail(ctx, topics, delayed)
}

func newFickle(t *testing.T, change ...func(*bus.Config)) *fickle {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "store")
	server, err := devstack.StartNATS(t.Context(), devstack.NATSConfig{StoreDir: dir, SyncDefault: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	f := newFickleOn(t, server.URL, change...)
	f.dir, f.server = dir, server
	return f
}

// newFickleOn is newFickle for servers that run.
func newFickleOn(t *testing.T, url string, change ...func(*bus.Config)) *fickle {
	t.Helper()
	f := &fickle{t: t, pool: postridertest.Postgres(t)}
	var err error
	if f.nc, err = nats.Connect(url, nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.nc.Close)
	if f.js, err = jetstream.New(f.nc); err != nil {
		t.Fatal(err)
	}
	if err := outbox.Migrate(t.Context(), f.pool, ""); err != nil {
		t.Fatal(err)
	}
	if f.ob, err = outbox.New(outbox.Config{Source: "//test/notes"}); err != nil {
		t.Fatal(err)
	}
	f.bus = &interrupted{Bus: newBus(t, f.nc, change...)}
	f.start()
	return f
}

func (f *fickle) start() {
	f.t.Helper()
	relay, err := outbox.NewRelay(f.pool, f.bus, outbox.RelayConfig{Outbox: f.ob, BatchSize: 20, Logger: slog.New(slog.NewTextHandler(&f.log, nil))})
	if err != nil {
		f.t.Fatal(err)
	}
	f.stop = run(f.t, relay)
}

// publish commits so many notes more, in transactions of ten.
func (f *fickle) publish(count int) {
	f.t.Helper()
	for end := f.n + count; f.n < end; {
		err := pgx.BeginFunc(f.t.Context(), f.pool, func(tx pgx.Tx) error {
			for ; f.n%10 != 9 && f.n < end-1; f.n++ {
				if err := keyedNotes.Publish(f.t.Context(), f.ob.In(tx), &note{N: f.n}); err != nil {
					return err
				}
			}
			f.n++
			return keyedNotes.Publish(f.t.Context(), f.ob.In(tx), &note{N: f.n - 1})
		})
		if err != nil {
			f.t.Fatal(err)
		}
	}
}

// notes returns the numbers of the notes that the stream holds, in its order.
func (f *fickle) notes() ([]int, error) { return f.notesOf("NOTES") }

func (f *fickle) notesOf(name string) ([]int, error) {
	stream, err := f.js.Stream(f.t.Context(), name)
	if err != nil {
		return nil, err
	}
	var got []int
	state := stream.CachedInfo().State
	for sequence := max(state.FirstSeq, 1); sequence <= state.LastSeq; sequence++ {
		msg, err := stream.GetMsg(f.t.Context(), sequence)
		if err != nil {
			return nil, err
		}
		var n int
		if _, err := fmt.Sscanf(string(msg.Data), `{"n":%d}`, &n); err != nil {
			return nil, err
		}
		got = append(got, n)
	}
	return got, nil
}

// wantAll waits until each note is in the stream once, and those of each key in their order.
func (f *fickle) wantAll() {
	f.t.Helper()
	last := map[int]int{}
	got := f.wantEach()
	for _, n := range got {
		if before, ok := last[n%3]; ok && n < before {
			f.t.Fatalf("%d comes after %d: %v", n, before, got)
		}
		last[n%3] = n
	}
}

// wantEach waits until each note is in the stream once, and returns them as they are there.
func (f *fickle) wantEach() (got []int) {
	f.t.Helper()
	postridertest.Eventually(f.t, func() (err error) {
		if got, err = f.notes(); err != nil {
			return err
		}
		if distinct := slices.Compact(slices.Sorted(slices.Values(got))); len(distinct) != f.n {
			return fmt.Errorf("%d of %d notes are in the stream", len(distinct), f.n)
		}
		return nil
	})
	if len(got) != f.n {
		f.t.Errorf("%d notes in the stream, want %d", len(got), f.n)
	}
	return got
}

// wantMark waits until it is written that the stream had so many notes.
func (f *fickle) wantMark(sequence int) {
	f.t.Helper()
	f.wantMarkOf("NOTES", sequence)
}

// wantMarkOf waits until it is written that a stream ended there.
func (f *fickle) wantMarkOf(stream string, sequence int) {
	f.t.Helper()
	postridertest.Eventually(f.t, func() error {
		var there bool
		err := f.pool.QueryRow(f.t.Context(), `select exists (select from postrider.postrider_outbox_mark where tails->>$2 like $1)`,
			fmt.Sprintf(`%%"sequence":%d,%%`, sequence), stream).Scan(&there)
		if err == nil && !there {
			err = errors.New("there is no mark")
		}
		return err
	})
}

// keep copies the store as it is.
func (f *fickle) keep() {
	f.t.Helper()
	postridertest.Eventually(f.t, func() error { // files come and go
		return errors.Join(os.RemoveAll(f.dir+".kept"), os.CopyFS(f.dir+".kept", os.DirFS(f.dir)))
	})
}

// syncBuffer keeps what several goroutines write.
type syncBuffer struct {
	mu  sync.Mutex
	all strings.Builder
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.all.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.all.String()
}

// lose has the server come back with the store that was kept.
func (f *fickle) lose() {
	f.t.Helper()
	err := errors.Join(f.server.Stop(), os.RemoveAll(f.dir), os.Rename(f.dir+".kept", f.dir), f.server.Start(f.t.Context()))
	if err != nil {
		f.t.Fatal(err)
	}
	postridertest.Eventually(f.t, func() error {
		if !f.nc.IsConnected() {
			return errors.New("not connected")
		}
		_, err := f.js.Stream(f.t.Context(), "NOTES")
		return err
	})
}

// A server that does not sync loses the end of its stream, at a moment when that is written and at one when it is not yet.
func TestRelaySendsAgainWhatAPowerCutHasLost(t *testing.T) {
	t.Parallel()
	for name, marked := range map[string]bool{"after a mark": true, "before a mark": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFickle(t)
			f.publish(50)
			f.wantAll()
			f.wantMark(50)
			f.keep()
			for range 3 {
				f.publish(30)
				f.wantAll()
				if marked {
					f.wantMark(f.n)
				}
			}
			f.lose()
			f.publish(30) // which must not come before what was lost
			f.wantAll()
			f.publish(10)
			f.wantAll()
		})
	}
}

// The server loses its end when the relay is about to write where that is.
func TestRelayWritesNoMarkOfWhatIsLost(t *testing.T) {
	t.Parallel()
	f := newFickle(t)
	f.publish(50)
	f.wantAll()
	f.wantMark(50)
	f.keep()
	asked, lost := make(chan struct{}), make(chan struct{})
	before := func() { close(asked); <-lost }
	f.bus.before.Store(&before)
	f.publish(30)
	<-asked
	f.wantAll()
	f.lose()
	close(lost)
	f.wantAll()
}

// What waits for its time is lost with the end of the stream where it waits, or with that stream.
func TestRelaySendsAgainWhatWasPutOff(t *testing.T) {
	t.Parallel()
	f, ctx := newFickle(t), t.Context()
	putOff := func(n int) {
		t.Helper()
		err := pgx.BeginFunc(ctx, f.pool, func(tx pgx.Tx) error {
			return noted.Publish(ctx, f.ob.In(tx), &note{N: n}, postrider.MessageID(fmt.Sprint("later ", n)), postrider.Delay(time.Hour))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	waiting := func(want uint64) {
		t.Helper()
		postridertest.Eventually(t, func() error {
			stream, err := f.js.Stream(ctx, "SCHEDULES")
			if err == nil && stream.CachedInfo().State.Msgs != want {
				err = fmt.Errorf("%d messages wait, want %d", stream.CachedInfo().State.Msgs, want)
			}
			return err
		})
	}
	putOff(0)
	f.publish(10)
	f.wantAll()
	waiting(1)
	f.wantMarkOf("SCHEDULES", 1)
	f.keep()
	for n := 1; n < 5; n++ {
		putOff(n)
	}
	waiting(5)
	f.wantMarkOf("SCHEDULES", 5)
	f.lose()
	f.publish(10) // so that there is something to do
	f.wantAll()
	waiting(5)
	if err := f.js.DeleteStream(ctx, "SCHEDULES"); err != nil {
		t.Fatal(err)
	}
	f.publish(10)
	f.wantAll()
	waiting(5)
	if in, err := f.bus.Cancel(ctx, "later 3"); !in || err != nil { // under its id, which is this bus's
		t.Errorf("cancel: %v, %v", in, err)
	}
}

// Outboxes of many schemas that rest, while the server loses what they have sent, and then a stream is deleted.
func TestRelaysAtRestNoticeALoss(t *testing.T) {
	t.Parallel()
	f := newFickle(t)
	if err := f.stop(); err != nil {
		t.Fatal(err)
	}
	var obs []*outbox.Outbox
	for _, schema := range []string{"one", "two", "three"} {
		ob, err := outbox.New(outbox.Config{Source: "//test/" + schema, Schema: schema})
		if err := errors.Join(err, outbox.Migrate(t.Context(), f.pool, schema)); err != nil {
			t.Fatal(err)
		}
		obs = append(obs, ob)
	}
	relays, err := outbox.NewRelays(f.pool, f.bus, outbox.RelaysConfig{
		Outboxes: obs, Relay: outbox.RelayConfig{Logger: slog.New(slog.NewTextHandler(&f.log, nil))},
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, relays)
	publish := func(ob, count int) {
		t.Helper()
		f.ob = obs[ob]
		f.publish(count)
		f.wantAll()
		postridertest.Eventually(t, func() error {
			s, err := f.ob.Status(t.Context(), f.pool)
			if err == nil && (s.Leader != "" || s.Depth > 0) {
				err = fmt.Errorf("no rest: %+v", s)
			}
			return err
		})
	}
	publish(0, 10)
	publish(1, 10)
	publish(2, 10)
	f.keep()
	publish(1, 10)
	publish(0, 20)
	f.lose()
	f.wantEach()
	if err := f.js.DeleteStream(t.Context(), "NOTES"); err != nil {
		t.Fatal(err)
	}
	f.wantEach()
}

// A stream that has lost nothing gets nothing again, though another one has lost all.
func TestRelaySendsAgainWhatWasLostOnly(t *testing.T) {
	t.Parallel()
	f := newFickle(t, func(c *bus.Config) {
		c.Streams = append(c.Streams, bus.Stream{Name: "OTHERS", Topics: []string{"others.>"}, DuplicateWindow: 100 * time.Millisecond})
	})
	others, n := postrider.NewTopic[note]("others.v1"), 0
	publish := func(count int) {
		t.Helper()
		for range count {
			n++
			err := pgx.BeginFunc(t.Context(), f.pool, func(tx pgx.Tx) error {
				return others.Publish(t.Context(), f.ob.In(tx), &note{N: n})
			})
			if err != nil {
				t.Fatal(err)
			}
			f.publish(1)
		}
	}
	want := func() {
		t.Helper()
		postridertest.Eventually(t, func() error {
			stream, err := f.js.Stream(t.Context(), "OTHERS")
			if err == nil && stream.CachedInfo().State.LastSeq < uint64(n) {
				err = fmt.Errorf("%d of %d", stream.CachedInfo().State.LastSeq, n)
			}
			return err
		})
	}
	publish(30)
	f.wantMark(30)
	publish(30)
	f.wantMarkOf("OTHERS", 60)
	f.wantMark(60)
	for range 2 {
		if err := f.js.DeleteStream(t.Context(), "NOTES"); err != nil {
			t.Fatal(err)
		}
		publish(5) // which are in doubt when that is noticed, and may come twice
		f.wantAll()
		want()
		f.wantMark(n)
	}
	got, err := f.notesOf("OTHERS")
	if err != nil {
		t.Fatal(err)
	}
	for i, n := range slices.Sorted(slices.Values(got)) {
		if i < 60 && n != i+1 || len(got) < 70 {
			t.Fatalf("the stream that lost nothing has %v", got)
		}
	}
}

// The relay is away when the server loses its end, and others have filled it again when the relay is back.
func TestRelayIsNotDeceivedByNewSequences(t *testing.T) {
	t.Parallel()
	f := newFickle(t)
	f.publish(20)
	f.wantAll()
	f.keep()
	f.publish(10)
	f.wantAll()
	if err := f.stop(); err != nil {
		t.Fatal(err)
	}
	f.lose()
	for i := range 40 {
		if _, err := f.js.Publish(t.Context(), "notes.other", fmt.Appendf(nil, `{"n":%d}`, 1000+i)); err != nil {
			t.Fatal(err)
		}
	}
	f.start()
	postridertest.Eventually(t, func() error {
		got, err := f.notes()
		if err == nil && (len(got) != 70 || slices.Max(got[60:]) >= 1000) {
			err = fmt.Errorf("the stream has %v", got)
		}
		return err
	})
}

// All that is retained comes again when a stream is deleted and made again, by the relay itself, and nothing when it is
// purged.
func TestRelayAfterDeletionAndPurge(t *testing.T) {
	t.Parallel()
	f := newFickle(t)
	f.publish(40)
	f.wantAll()
	f.wantMark(40)
	if err := f.js.DeleteStream(t.Context(), "NOTES"); err != nil {
		t.Fatal(err)
	}
	f.publish(10)
	f.wantAll()
	f.wantMark(50)

	stream, err := f.js.Stream(t.Context(), "NOTES")
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := f.stop(); err != nil { // the next relay looks first
		t.Fatal(err)
	}
	f.start()
	f.publish(5)
	postridertest.Eventually(t, func() error {
		got, err := f.notes()
		if err == nil && !slices.Equal(got, []int{50, 51, 52, 53, 54}) {
			err = fmt.Errorf("after the purge the stream has %v", got)
		}
		return err
	})
	if err := f.stop(); err != nil {
		t.Fatal(err)
	}
	f.start()
	f.publish(1)
	f.wantMark(56)
	if got, err := f.notes(); err != nil || !slices.Equal(got, []int{50, 51, 52, 53, 54, 55}) {
		t.Errorf("after another start: %v, %v", got, err)
	}
}

func TestTailAndLost(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b, ctx := newBus(t, nc), t.Context()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	put := func(n int) {
		t.Helper()
		for i := range n {
			if err := noted.Publish(ctx, b, &note{N: i}); err != nil {
				t.Fatal(err)
			}
		}
	}
	tail := func() map[string]string {
		t.Helper()
		tails, err := b.Tail(ctx, []string{"notes.written.v1", "notes.other", "replies.x"}, false)
		if err != nil || len(tails) != 1 || tails["NOTES"] == "" {
			t.Fatalf("tails %v, %v", tails, err)
		}
		return tails
	}
	want := func(what string, tails map[string]string, lost ...string) {
		t.Helper()
		if got, err := b.Lost(ctx, tails); err != nil || !slices.Equal(got, lost) {
			t.Errorf("%s: lost %q, %v, want %q", what, got, err, lost)
		}
	}
	put(3)
	three := tail()
	want("now", three)
	put(3)
	six := tail()
	want("with more behind it", three)
	other := map[string]string{"NOTES": strings.Replace(three["NOTES"], `"sequence":3`, `"sequence":4`, 1)}
	want("another message in its place", other, "NOTES")
	want("the end is shorter", map[string]string{"NOTES": strings.Replace(six["NOTES"], `"sequence":6`, `"sequence":7`, 1)}, "NOTES")
	stream, err := js.Stream(ctx, "NOTES")
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.DeleteMsg(ctx, 3); err != nil {
		t.Fatal(err)
	}
	want("the message was deleted", three)
	if err := stream.Purge(ctx); err != nil {
		t.Fatal(err)
	}
	want("purged", three)
	want("purged, the end", six)
	if err := js.DeleteStream(ctx, "NOTES"); err != nil {
		t.Fatal(err)
	}
	want("a stream of somebody else that is missing", map[string]string{"GONE": strings.Replace(six["NOTES"], "notes.", "gone.", 1)})
	want("deleted", six, "NOTES") // and declared again
	want("once more", six, "NOTES")
	want("the new one", tail())
	if _, err := b.Lost(ctx, map[string]string{"NOTES": "x"}); !errors.Is(err, postrider.InvalidArgument) {
		t.Errorf("no tail: %v", err)
	}
	if _, err := b.Tail(ctx, []string{"nobody.takes.this"}, false); !errors.Is(err, postrider.FailedPrecondition) {
		t.Errorf("no stream: %v", err)
	}
}

// What is published once more on purpose is no duplicate to the server, unless it is by the same purpose.
func TestRedriveIsNoDuplicate(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	b, ctx := newBus(t, nc), t.Context()
	for _, redrive := range []string{"", "", "a", "b", "a"} {
		m := &postrider.Message{ID: "1", Type: "notes.written.v1"}
		if err := m.SetExtension(postrider.ExtRedrive, redrive); err != nil {
			t.Fatal(err)
		}
		if err := b.Publish(ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	tails, err := b.Tail(ctx, []string{"notes.written.v1"}, true)
	if err != nil || !strings.Contains(tails["NOTES"], `"sequence":3,`) {
		t.Errorf("%v, %v, want three messages", tails, err)
	}
}
