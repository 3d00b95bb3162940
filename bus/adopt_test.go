package bus_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// logBook keeps what is logged.
type logBook struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logBook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// lines returns the lines that hold all of some words.
func (l *logBook) lines(words ...string) (found []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.text.String()) {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			found = append(found, line)
		}
	}
	return found
}

func (l *logBook) use(c *bus.Config) { c.Logger = slog.New(slog.NewTextHandler(l, nil)) }

func streamConfig(t *testing.T, nc *nats.Conn, name string) jetstream.StreamConfig {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return ofMaker(s.CachedInfo().Config)
}

// A lower max age is refused as long as it would delete what is there.
func TestLowerMaxAgeDeletesNothing(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	if err := noted.Publish(t.Context(), newBus(t, nc), &note{N: 1}); err != nil {
		t.Fatal(err)
	}
	aged := func(age time.Duration) error {
		b := newBus(t, nc, func(c *bus.Config) { c.Streams[0].MaxAge = age })
		return noted.Publish(t.Context(), b, &note{N: 2})
	}
	if err := aged(time.Hour); err != nil { // nothing is that old
		t.Fatal(err)
	}
	const short = 200 * time.Millisecond
	postridertest.Eventually(t, func() error {
		if age := time.Since(stored(t, nc, "NOTES")[0].Time); age < short {
			return fmt.Errorf("the message is %v old", age)
		}
		return nil
	})
	err := aged(short)
	if postrider.CodeOf(err) != postrider.FailedPrecondition || !strings.Contains(err.Error(), "max age: 1h0m0s -> 200ms") {
		t.Errorf("error %v, want FailedPrecondition with both values", err)
	}
	if cfg := streamConfig(t, nc, "NOTES"); cfg.MaxAge != time.Hour {
		t.Errorf("max age is %v", cfg.MaxAge)
	}
	if n := len(stored(t, nc, "NOTES")); n != 2 {
		t.Errorf("%d messages are left, want 2", n)
	}
}

// ofMaker removes what the server notes about itself.
func ofMaker(cfg jetstream.StreamConfig) jetstream.StreamConfig {
	maps.DeleteFunc(cfg.Metadata, func(k, _ string) bool { return strings.HasPrefix(k, "_nats.") })
	return cfg
}

// makeStream makes a stream as others do, with a client, the command or Terraform, and returns what the server made of it.
func makeStream(t *testing.T, nc *nats.Conn, change func(*jetstream.StreamConfig)) jetstream.StreamConfig {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	cfg := jetstream.StreamConfig{Name: "NOTES", Subjects: []string{"notes.>"}, Description: "made by hand"}
	change(&cfg)
	s, err := js.CreateStream(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return ofMaker(s.CachedInfo().Config)
}

// start runs a bus until the test ends, and returns when it has begun.
func start(t *testing.T, b *bus.Bus) {
	t.Helper()
	run(t, b)
	awaitStart(t, b)
}

func awaitStart(t *testing.T, b *bus.Bus) {
	t.Helper()
	select {
	case <-b.Started():
	case <-time.After(30 * time.Second):
		t.Fatal("Run has not begun")
	}
}

// A stream that others made takes what is declared and keeps the rest.
func TestAdoptStream(t *testing.T) {
	t.Parallel()
	day := 24 * time.Hour
	for name, tt := range map[string]struct {
		made     func(*jetstream.StreamConfig)
		declared bus.Stream
		want     func(*jetstream.StreamConfig)
		warnings []string
	}{
		"limits that are not declared stay": {
			made: func(c *jetstream.StreamConfig) {
				c.MaxAge, c.MaxBytes, c.Duplicates, c.Discard = day, 100<<20, time.Hour, jetstream.DiscardNew
				c.MaxMsgSize, c.MaxConsumers, c.Compression, c.DenyDelete = 1<<20, 50, jetstream.S2Compression, true
				c.Metadata = map[string]string{"owner": "platform"}
			},
			declared: bus.Stream{Topics: []string{"notes.>"}},
			want:     func(*jetstream.StreamConfig) {},
		},
		"limits that are declared apply": {
			made: func(c *jetstream.StreamConfig) { c.MaxAge, c.MaxBytes, c.Duplicates = day, 100<<20, time.Hour },
			declared: bus.Stream{
				Topics: []string{"notes.>"}, MaxAge: 2 * day, MaxBytes: 200 << 20, DuplicateWindow: time.Minute, Replicas: 1,
			},
			want: func(c *jetstream.StreamConfig) {
				c.MaxAge, c.MaxBytes, c.Duplicates, c.Discard = 2*day, 200<<20, time.Minute, jetstream.DiscardNew
			},
		},
		"limits that are declared off": {
			made:     func(c *jetstream.StreamConfig) { c.MaxAge, c.MaxBytes = day, 100<<20 },
			declared: bus.Stream{Topics: []string{"notes.>"}, MaxAge: -1, MaxBytes: -1},
			want:     func(c *jetstream.StreamConfig) { c.MaxAge, c.MaxBytes = 0, -1 },
		},
		"an age below the duplicate window takes it along": {
			made:     func(c *jetstream.StreamConfig) { c.Duplicates = time.Hour },
			declared: bus.Stream{Topics: []string{"notes.>"}, MaxAge: time.Minute},
			want:     func(c *jetstream.StreamConfig) { c.MaxAge, c.Duplicates = time.Minute, time.Minute },
		},
		"topics that it takes already": {
			made:     func(c *jetstream.StreamConfig) { c.Subjects = []string{"other.>", "notes.*.v1"} },
			declared: bus.Stream{Topics: []string{"notes.written.v1", "notes.*.v1"}},
			want:     func(*jetstream.StreamConfig) {},
		},
		"topics beside those that it has": {
			made:     func(c *jetstream.StreamConfig) { c.Subjects = []string{"other.>"} },
			declared: bus.Stream{Topics: []string{"notes.*.v1", "notes.*"}},
			want:     func(c *jetstream.StreamConfig) { c.Subjects = []string{"other.>", "notes.*.v1", "notes.*"} },
		},
		"topics that cover those that it has": {
			made:     func(c *jetstream.StreamConfig) { c.Subjects = []string{"notes.*.v1", "other", "notes.written.v2"} },
			declared: bus.Stream{Topics: []string{"notes.>"}},
			want:     func(c *jetstream.StreamConfig) { c.Subjects = []string{"other", "notes.>"} },
		},
		"in memory": {
			made:     func(c *jetstream.StreamConfig) { c.Storage = jetstream.MemoryStorage },
			declared: bus.Stream{Topics: []string{"notes.>"}},
			want:     func(*jetstream.StreamConfig) {},
			warnings: []string{"kept in memory"},
		},
		"with interest retention": {
			made:     func(c *jetstream.StreamConfig) { c.Retention = jetstream.InterestPolicy },
			declared: bus.Stream{Topics: []string{"notes.>"}},
			want:     func(*jetstream.StreamConfig) {},
			warnings: []string{"acknowledged and dropped"},
		},
		"a work queue that drops the oldest and forgets soon": {
			made: func(c *jetstream.StreamConfig) {
				c.Retention, c.MaxMsgs, c.Duplicates = jetstream.WorkQueuePolicy, 1000, time.Second
			},
			declared: bus.Stream{Topics: []string{"notes.>"}},
			want:     func(*jetstream.StreamConfig) {},
			warnings: []string{"one group for each topic", "drops the oldest", "duplicate window of 1s"},
		},
		"one message for each subject": {
			made:     func(c *jetstream.StreamConfig) { c.MaxMsgsPerSubject = 1 },
			declared: bus.Stream{Topics: []string{"notes.>"}},
			want:     func(*jetstream.StreamConfig) {},
			warnings: []string{"drops the oldest"},
		},
		"with sources": {
			made:     func(c *jetstream.StreamConfig) { c.Sources = []*jetstream.StreamSource{{Name: "ELSEWHERE"}} },
			declared: bus.Stream{Topics: []string{"notes.>"}},
			want:     func(*jetstream.StreamConfig) {},
			warnings: []string{"duplicate window of 0s"}, // the server's default for these
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nc := postridertest.NATS(t)
			want := makeStream(t, nc, tt.made)
			tt.want(&want)
			want.AllowAtomicPublish, want.AllowBatchPublish = true, true
			var log logBook
			declared := tt.declared
			declared.Name = "NOTES"
			for range 2 { // instances
				b := newBus(t, nc, log.use, func(c *bus.Config) { c.Streams = []bus.Stream{declared} })
				if err := b.Subscribe(collect(new(seen)), bus.From(bus.DeliverAll)); err != nil {
					t.Fatal(err)
				}
				start(t, b)
				if err := noted.Publish(t.Context(), b, &note{}); err != nil {
					t.Fatal(err)
				}
				postridertest.Eventually(t, wantCount(func() int { return int(b.Stats().Published) }, 1))
			}
			if have := streamConfig(t, nc, "NOTES"); !reflect.DeepEqual(have, want) {
				t.Errorf("the stream is\n%+v, want\n%+v", have, want)
			}
			if changes := log.lines("stream changed"); len(changes) != 1 {
				t.Errorf("the second start changed it again: %q", changes)
			}
			if all := log.lines("level=WARN", "stream NOTES: "); len(all) != 2*len(tt.warnings) {
				t.Errorf("warnings are %q, want %q once for each bus", all, tt.warnings)
			}
			for _, w := range tt.warnings {
				if len(log.lines("level=WARN", "stream NOTES: ", w)) != 2 {
					t.Errorf("no warning says %q", w)
				}
			}
		})
	}
}

// What cannot be is an error that says what is and what was wanted, before anything is published or handled.
func TestAdoptRefuses(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		made     func(*jetstream.StreamConfig)
		declared bus.Stream
		text     []string
	}{
		"replicas": {
			func(*jetstream.StreamConfig) {},
			bus.Stream{Topics: []string{"notes.>"}, Replicas: 3},
			[]string{"stream NOTES", "replicas: 1 -> 3"},
		},
		"a mirror": {
			func(c *jetstream.StreamConfig) {
				c.Subjects, c.Mirror = nil, &jetstream.StreamSource{Name: "ELSEWHERE"}
			},
			bus.Stream{Topics: []string{"notes.>"}},
			[]string{"stream NOTES", "topics: [] -> [notes.>]", "mirror"},
		},
		"topics of another stream": {
			func(c *jetstream.StreamConfig) { c.Name = "OTHER" },
			bus.Stream{Topics: []string{"notes.*.v1"}},
			[]string{"stream NOTES", "overlap"},
		},
		"more than the account may have": {
			func(*jetstream.StreamConfig) {},
			bus.Stream{Topics: []string{"notes.>"}, MaxBytes: 1 << 60},
			[]string{"stream NOTES", "max bytes: -1 -> 1152921504606846976"},
		},
		"no acknowledgements": {
			func(c *jetstream.StreamConfig) { c.NoAck = true },
			bus.Stream{Topics: []string{"notes.>"}},
			[]string{"stream NOTES", "no_ack"},
		},
		"dead letters in memory": {
			func(c *jetstream.StreamConfig) {
				c.Name, c.Subjects, c.Storage = "DEAD_LETTERS", []string{"dead.>"}, jetstream.MemoryStorage
			},
			bus.Stream{Topics: []string{"notes.>"}},
			[]string{"stream DEAD_LETTERS", "storage: Memory -> File"},
		},
		"dead letters that one may read once": {
			func(c *jetstream.StreamConfig) {
				c.Name, c.Subjects, c.Retention = "DEAD_LETTERS", []string{"dead.>"}, jetstream.WorkQueuePolicy
			},
			bus.Stream{Topics: []string{"notes.>"}},
			[]string{"stream DEAD_LETTERS", "retention: WorkQueue -> Limits"},
		},
		"another stream of the bus's own name": {
			func(c *jetstream.StreamConfig) { c.Name, c.Subjects = "SCHEDULES", []string{"sched.>"} },
			bus.Stream{Topics: []string{"notes.>"}},
			[]string{"stream SCHEDULES", "retention: Limits -> WorkQueue", "message schedules: false -> true"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nc := postridertest.NATS(t)
			before := makeStream(t, nc, tt.made)
			declared := tt.declared
			declared.Name = "NOTES"
			b := newBus(t, nc, func(c *bus.Config) { c.Streams = []bus.Stream{declared} })
			if err := b.Subscribe(collect(new(seen))); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second) // it must fail, not wait
			defer cancel()
			err := b.Run(ctx)
			if !errors.Is(err, postrider.FailedPrecondition) {
				t.Errorf("Run: %v, want FailedPrecondition", err)
			}
			for _, text := range tt.text {
				if !strings.Contains(fmt.Sprint(err), text) {
					t.Errorf("Run: %v, want an error that says %q", err, text)
				}
			}
			if after := streamConfig(t, nc, before.Name); !reflect.DeepEqual(before, after) {
				t.Errorf("the stream was changed all the same: %+v, before %+v", after, before)
			}
		})
	}
}

// A stream that is not declared is found by its topics, used as it is, and never changed.
func TestUseStreamOfOthers(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		made    func(*jetstream.StreamConfig)
		warning string
	}{
		"plain":      {func(*jetstream.StreamConfig) {}, ""},
		"memory":     {func(c *jetstream.StreamConfig) { c.Storage = jetstream.MemoryStorage }, "kept in memory"},
		"interest":   {func(c *jetstream.StreamConfig) { c.Retention = jetstream.InterestPolicy }, "interest retention"},
		"work queue": {func(c *jetstream.StreamConfig) { c.Retention = jetstream.WorkQueuePolicy }, "work queue"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nc := postridertest.NATS(t)
			made := makeStream(t, nc, tt.made)
			var log logBook
			b := newBus(t, nc, log.use, func(c *bus.Config) { c.Streams = nil })
			var got seen
			if err := b.Subscribe(collect(&got), bus.From(bus.DeliverAll)); err != nil {
				t.Fatal(err)
			}
			start(t, b)
			publishNotes(t, b, 0, 50)
			postridertest.Eventually(t, wantCount(got.distinct, 50))
			if have := streamConfig(t, nc, "NOTES"); !reflect.DeepEqual(have, made) {
				t.Errorf("the stream is\n%+v, was\n%+v", have, made)
			}
			want := 0
			if tt.warning != "" {
				want = 1
			}
			if all := log.lines("level=WARN", "stream NOTES: ", tt.warning); len(all) != want {
				t.Errorf("warnings are %q, want %q", all, tt.warning)
			}
		})
	}
	t.Run("work queue, two groups", func(t *testing.T) {
		t.Parallel()
		nc := postridertest.NATS(t)
		makeStream(t, nc, func(c *jetstream.StreamConfig) { c.Retention = jetstream.WorkQueuePolicy })
		b := newBus(t, nc, func(c *bus.Config) { c.Streams = nil })
		for _, group := range []string{"mailer", "billing"} {
			if err := b.Subscribe(collect(new(seen)), bus.Group(group), bus.From(bus.DeliverAll)); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if err := b.Run(ctx); !errors.Is(err, postrider.FailedPrecondition) || !strings.Contains(err.Error(), "billing-notes_written_v1") {
			t.Errorf("Run: %v, want FailedPrecondition that names the second group's consumer", err)
		}
	})
}

// Services that share a stream start at the same time, each with topics of its own, and none loses its topics.
func TestServicesDeclareOneStreamTogether(t *testing.T) {
	t.Parallel()
	const services = 12
	srv := postridertest.NewNATS(t)
	var wg sync.WaitGroup
	begin := make(chan struct{})
	for i := range services {
		b := newBus(t, srv.Connect(), func(c *bus.Config) {
			c.Streams = []bus.Stream{{Name: "NOTES", Topics: []string{fmt.Sprintf("notes.%d.>", i), fmt.Sprintf("replies.%d", i)}}}
		})
		wg.Go(func() {
			<-begin
			m := &postrider.Message{ID: strconv.Itoa(i), Type: fmt.Sprintf("notes.%d.written", i)}
			if err := b.Publish(t.Context(), m); err != nil {
				t.Errorf("service %d: %v", i, err)
			}
		})
	}
	close(begin)
	wg.Wait()
	nc := srv.Connect()
	if cfg := streamConfig(t, nc, "NOTES"); len(cfg.Subjects) != 2*services {
		t.Errorf("the stream takes %v, want two topics of each of %d services", cfg.Subjects, services)
	}
	if n := len(stored(t, nc, "NOTES")); n != services {
		t.Errorf("%d messages are stored, want one of each service", n)
	}
}

// A service goes on when its stream was deleted, or lost its topics to somebody who wrote the configuration over.
func TestDeclaredAgain(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	b := newBus(t, nc)
	publish := func(id string, opts ...postrider.PublishOption) {
		t.Helper()
		if err := noted.Publish(t.Context(), b, &note{Text: id}, append(opts, postrider.MessageID(id))...); err != nil {
			t.Fatal(err)
		}
	}
	publish("first")
	cfg := streamConfig(t, nc, "NOTES")
	cfg.Subjects = []string{"other.>"}
	if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	publish("without topics")
	if have := streamConfig(t, nc, "NOTES"); !slices.Equal(have.Subjects, []string{"other.>", "notes.>", "replies.>"}) {
		t.Errorf("the stream takes %v, want our topics beside the new one", have.Subjects)
	}
	publish("later", postrider.Delay(time.Hour))
	for _, name := range []string{"NOTES", "SCHEDULES"} {
		if err := js.DeleteStream(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	publish("without stream")
	publish("much later", postrider.Delay(time.Hour))
	if n := len(stored(t, nc, "NOTES")); n != 1 {
		t.Errorf("%d messages are in the new stream, want 1", n)
	}
	if n := len(stored(t, nc, "SCHEDULES")); n != 1 {
		t.Errorf("%d messages wait in the new stream, want 1", n)
	}
	err = b.Publish(t.Context(), &postrider.Message{ID: "1", Type: "stray.v1"})
	if !errors.Is(err, postrider.FailedPrecondition) || postrider.Retryable(err) {
		t.Errorf("a topic that nobody declares: %v, want FailedPrecondition", err)
	}
}

// Instances of one service start at the same time on an empty server.
func TestInstancesStartTogether(t *testing.T) {
	t.Parallel()
	const instances, messages = 8, 40
	srv := postridertest.NewNATS(t)
	var got seen
	h := noted.Handler(func(_ context.Context, e postrider.Event[note]) error { got.add(*e.Value); return nil })
	p := newBus(t, srv.Connect())
	var all []*bus.Bus
	for range instances {
		b := newBus(t, srv.Connect())
		if err := errors.Join(b.Subscribe(h), b.Subscribe(h, bus.Group("ordered"), bus.Ordered())); err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	for _, b := range all {
		run(t, b)
	}
	for _, b := range all {
		awaitStart(t, b)
	}
	publishNotes(t, p, 0, messages)
	postridertest.Eventually(t, wantCount(got.count, 2*messages))
	js, err := jetstream.New(srv.Connect())
	if err != nil {
		t.Fatal(err)
	}
	if names := consumers(t, js); len(names) != 2 {
		t.Errorf("consumers are %v, want one for each group", names)
	}
}
