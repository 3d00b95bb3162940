package bustest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
)

// Bus is what the suite asks of an implementation.
type Bus interface {
	postrider.Publisher
	postrider.Runner

	Subscribe(h postrider.Handler, opts ...bus.SubscribeOption) error
	Started() <-chan struct{}
	Cancel(ctx context.Context, id string) (bool, error)
	Schedule(ctx context.Context, s bus.Schedule) error
	Unschedule(ctx context.Context, name string) (bool, error)
	PublishAfter(ctx context.Context, last uint64, m *postrider.Message) (uint64, error)
	Pause(ctx context.Context, group, topic string, until time.Time) error
	Resume(ctx context.Context, group, topic string) error
}

// DeadLetters is what the suite asks of the dead letters of a [Bus]: bus.DeadLetters.
type DeadLetters interface {
	List(ctx context.Context, f bus.LetterFilter, after uint64, limit int) (letters []bus.DeadLetter, next uint64, err error)
	Groups(ctx context.Context, f bus.LetterFilter) ([]bus.CauseGroup, error)
	Get(ctx context.Context, sequence uint64) (bus.DeadLetter, error)
	Replay(ctx context.Context, sequences []uint64, a bus.Action) (int, error)
	ReplayAll(ctx context.Context, f bus.LetterFilter, a bus.Action) (int, error)
	Discard(ctx context.Context, sequences []uint64, a bus.Action) (int, error)
	DiscardAll(ctx context.Context, f bus.LetterFilter, a bus.Action) (int, error)
	Edit(ctx context.Context, sequence uint64, change func(m *postrider.Message) error, a bus.Action) (uint64, error)
	Log(ctx context.Context, f bus.LetterFilter, after uint64, limit int) (entries []bus.LogEntry, next uint64, err error)
}

// Parked is what the suite asks of the parked keys of a [Bus]: bus.Parked.
type Parked interface {
	Keys(ctx context.Context, f bus.ParkedFilter, after string, limit int) (keys []bus.ParkedKey, next string, err error)
	Messages(ctx context.Context, f bus.ParkedFilter, after uint64, limit int) (messages []bus.DeadLetter, next uint64, err error)
	Release(ctx context.Context, f bus.ParkedFilter, a bus.Action) (int, error)
	Discard(ctx context.Context, sequences []uint64, a bus.Action) (int, error)
	DiscardAll(ctx context.Context, f bus.ParkedFilter, a bus.Action) (int, error)
	Log(ctx context.Context, f bus.ParkedFilter, after uint64, limit int) (entries []bus.LogEntry, next uint64, err error)
}

// Async is what the suite asks of a publisher that does not wait: bus.Async.
type Async interface {
	postrider.Publisher

	Flush(ctx context.Context) error
}

// Broker is what the buses of one test share. Open and DeadLetters are required: a promise that asks for more than an implementation has is
// skipped.
type Broker struct {
	// Open returns a bus with a connection of its own: another process.
	Open func(cfg bus.Config) (Bus, error)

	// DeadLetters returns the dead letters of a bus.
	DeadLetters func(b Bus) DeadLetters

	// Parked returns the parked keys of a bus.
	Parked func(b Bus) Parked

	// Async returns a publisher that does not wait, as bus.Bus.Async does.
	Async func(b Bus, window int, result func(m *postrider.Message, err error)) Async

	// Crash lets the process of a bus die: its connection is gone, nothing that it holds is settled.
	Crash func(b Bus)

	// Inject stores data that is no CloudEvent under a topic.
	Inject func(topic string, data []byte) error

	// Restart stops the broker and starts it with what it had stored.
	Restart func()
}

// Suite is the conformance suite for one implementation.
type Suite struct {
	// Start starts a broker of the test's own. Required.
	Start func(t testing.TB) Broker

	// Bubble runs each promise in a bubble of testing/synctest, for an implementation that does no I/O: delays pass at once,
	// and their length is checked to the nanosecond.
	Bubble bool
}

// promises are the subtests, each a sentence about the bus.
var promises = []struct {
	name string
	test func(*env)
}{
	{"PublishTellsEachMessagesFate", publishTellsEachMessagesFate},
	{"AsyncTellsEachMessagesFate", asyncTellsEachMessagesFate},
	{"AsyncWaitsForRoom", asyncWaitsForRoom},
	{"AsyncFailuresAreTold", asyncFailuresAreTold},
	{"StreamIsRead", streamIsRead},
	{"AttributesArriveIntact", attributesArriveIntact},
	{"DifferentMessagesAreNotDuplicates", differentMessagesAreNotDuplicates},
	{"EachGroupHandlesEachMessageOnce", eachGroupHandlesEachMessageOnce},
	{"GroupsBeginWhereTheySay", groupsBeginWhereTheySay},
	{"BroadcastReachesEachInstance", broadcastReachesEachInstance},
	{"WildcardsMatch", wildcardsMatch},
	{"OneWorkerKeepsTheOrder", oneWorkerKeepsTheOrder},
	{"OrderedKeysKeepTheirOrder", orderedKeysKeepTheirOrder},
	{"FencesGrow", fencesGrow},
	{"ConcurrencyIsReachedAndKept", concurrencyIsReachedAndKept},
	{"EventsAreLinkedToTheirCause", eventsAreLinkedToTheirCause},
	{"CommandsAreAnswered", commandsAreAnswered},
	{"MisuseIsAnError", misuseIsAnError},
	{"FailedMessageComesBack", failedMessageComesBack},
	{"DefaultPolicySpacesPlainErrors", defaultPolicySpacesPlainErrors},
	{"MultiplierGrows", multiplierGrows},
	{"RetryAfterIsKept", retryAfterIsKept},
	{"LongRetriesKeepIDAndAttempts", longRetriesKeepIDAndAttempts},
	{"DelayedMessageComesInItsTime", delayedMessageComesInItsTime},
	{"DelayedMessageTakesAnotherTime", delayedMessageTakesAnotherTime},
	{"CancelledMessageNeverComes", cancelledMessageNeverComes},
	{"ScheduleComesAgainAndAgain", scheduleComesAgainAndAgain},
	{"PauseHoldsAndResumeDelivers", pauseHoldsAndResumeDelivers},
	{"OneOfSeveralWritersWins", oneOfSeveralWritersWins},
	{"ExpiredMessageIsADeadLetter", expiredMessageIsADeadLetter},
	{"PoisonDoesNotHoldUpNeighbours", poisonDoesNotHoldUpNeighbours},
	{"DeadLettersHaveCauseAndMessage", deadLettersHaveCauseAndMessage},
	{"RedriveIsNotSwallowed", redriveIsNotSwallowed},
	{"RedriveTakesItsTurn", redriveTakesItsTurn},
	{"DeadLettersAreSelectedAndDiscarded", deadLettersAreSelectedAndDiscarded},
	{"DeadLettersAreEditedAndLogged", deadLettersAreEditedAndLogged},
	{"DeadLettersAreGroupedByCause", deadLettersAreGroupedByCause},
	{"ParkedKeyWaitsForItsRelease", parkedKeyWaitsForItsRelease},
	{"ParkedKeyOutlivesItsOwner", parkedKeyOutlivesItsOwner},
	{"CrashInAReleaseLosesNothing", crashInAReleaseLosesNothing},
	{"FailuresParkTheirKey", failuresParkTheirKey},
	{"ParkedMessagesAreDiscarded", parkedMessagesAreDiscarded},
	{"RedriveWaitsBehindItsParkedKey", redriveWaitsBehindItsParkedKey},
	{"BatchesParkTheirKeys", batchesParkTheirKeys},
	{"UndecodableMessageStopsNobody", undecodableMessageStopsNobody},
	{"FilterTakesWhatIsWanted", filterTakesWhatIsWanted},
	{"BatchIsWhatHasCome", batchIsWhatHasCome},
	{"BatchTellsEachEventsFate", batchTellsEachEventsFate},
	{"BatchFailsAsOne", batchFailsAsOne},
	{"BatchesKeepTheOrderOfKeys", batchesKeepTheOrderOfKeys},
	{"CloseGivesBatchesBack", closeGivesBatchesBack},
	{"BatchOptionsAreChecked", batchOptionsAreChecked},
	{"SlowHandlerDoesNotLoseItsBatch", slowHandlerDoesNotLoseItsBatch},
	{"CloseInMidBatchLosesNothing", closeInMidBatchLosesNothing},
	{"CloseUnderLoadDoesNotPanic", closeUnderLoadDoesNotPanic},
	{"ShutdownDoesNotCancelHandlers", shutdownDoesNotCancelHandlers},
	{"RestartReplaysNothing", restartReplaysNothing},
	{"CrashedWorkersMessagesComeBack", crashedWorkersMessagesComeBack},
	{"FaultsLoseNothing", faultsLoseNothing},
}

// Run runs the promises as parallel subtests.
func (s Suite) Run(t *testing.T) {
	t.Helper()
	for _, p := range promises {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			if s.Bubble {
				synctest.Test(t, func(t *testing.T) { p.test(&env{T: t, Broker: s.Start(t), bubble: true}) })
				return
			}
			p.test(&env{T: t, Broker: s.Start(t)})
		})
	}
}

// note is what the suite's events and commands carry.
type note struct {
	N    int    `json:"n"`
	Text string `json:"text,omitempty"`
}

var (
	written = postrider.NewTopic[note]("conformance.written.v1")
	keyed   = postrider.NewTopic[note]("conformance.keyed.v1", postrider.KeyBy(func(n *note) string { return n.Text }))
	tally   = postrider.NewMethod[note, note]("conformance.v1/Tally")
)

const replies = "conformance.replies"

var (
	all   = bus.From(bus.DeliverAll)
	quick = bus.Retry(postrider.RetryPolicy{Attempts: 3, Initial: time.Millisecond, Max: 2 * time.Millisecond})
)

// env is what one promise is tested with.
type env struct {
	*testing.T
	Broker

	bubble  bool
	crashed sync.Map // Bus: its Run may fail
}

// crash lets the process of a bus die.
func (e *env) crash(b Bus) {
	e.crashed.Store(b, true)
	e.Crash(b)
}

// open returns a bus whose stream takes what the suite publishes.
func (e *env) open(change ...func(*bus.Config)) Bus {
	e.Helper()
	cfg := bus.Config{
		Source: "//conformance/tests", Group: "tester", Logger: postridertest.Logger(e.T),
		Streams: []bus.Stream{{Name: "CONFORMANCE", Topics: []string{"conformance.>"}}},
	}
	for _, c := range change {
		c(&cfg)
	}
	b, err := e.Open(cfg)
	e.must(err)
	return b
}

func (e *env) must(err error) {
	e.Helper()
	if err != nil {
		e.Fatal(err)
	}
}

func (e *env) publish(b Bus, notes ...*note) {
	e.Helper()
	e.must(written.PublishAll(e.Context(), b, notes))
}

// run runs a bus until the test ends, or until the returned function is called, which returns Run's error.
func (e *env) run(b Bus) (stop func() error) {
	e.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	stop = sync.OnceValue(func() error { cancel(); return <-done })
	e.Cleanup(func() {
		err := stop()
		if _, crashed := e.crashed.Load(b); err != nil && !crashed {
			e.Errorf("Run: %v", err)
		}
	})
	select {
	case <-b.Started():
	case err := <-done:
		done <- err
		e.Fatalf("Run: %v", err)
	}
	return stop
}

// eventually waits until got returns want.
func (e *env) eventually(what string, got func() int, want int) {
	e.Helper()
	postridertest.Eventually(e.T, func() error {
		if n := got(); n != want {
			return fmt.Errorf("%s: %d, want %d", what, n, want)
		}
		return nil
	})
}

// letters waits for so many dead letters.
func (e *env) letters(b Bus, want int) []bus.DeadLetter {
	e.Helper()
	var letters []bus.DeadLetter
	postridertest.Eventually(e.T, func() (err error) {
		if letters, _, err = e.DeadLetters(b).List(e.Context(), bus.LetterFilter{}, 0, 0); err == nil && len(letters) != want {
			err = fmt.Errorf("%d dead letters, want %d", len(letters), want)
		}
		return err
	})
	return letters
}

// journal keeps what a handler saw.
type journal struct {
	mu   sync.Mutex
	seen []sighting
}

type sighting struct {
	note
	attempt int
	at      time.Time
}

func (j *journal) add(e postrider.Event[note]) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.seen = append(j.seen, sighting{*e.Value, e.Delivery.Attempt, time.Now()})
}

// handler returns one that succeeds.
func (j *journal) handler() postrider.Handler {
	return written.Handler(func(_ context.Context, e postrider.Event[note]) error { j.add(e); return nil })
}

func (j *journal) all() []sighting {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.seen)
}

func (j *journal) count() int { return len(j.all()) }

func (j *journal) distinct() int {
	ns := map[int]bool{}
	for _, s := range j.all() {
		ns[s.N] = true
	}
	return len(ns)
}

// once fails the test unless each of n notes was seen one time.
func (j *journal) once(e *env, n int) {
	e.Helper()
	e.eventually("notes handled", j.distinct, n)
	if got := j.count(); got != n {
		e.Errorf("%d notes were handled %d times", n, got)
	}
}

// waits returns, for each note, the time from an attempt to the next one, sorted.
func (j *journal) waits(attempt int) []time.Duration {
	first, second := map[int]time.Time{}, map[int]time.Time{}
	for _, s := range j.all() {
		switch s.attempt {
		case attempt:
			first[s.N] = s.at
		case attempt + 1:
			second[s.N] = s.at
		}
	}
	var waits []time.Duration
	for n, at := range second {
		waits = append(waits, at.Sub(first[n]))
	}
	slices.Sort(waits)
	return waits
}

// numbered returns n notes, numbered from first.
func numbered(first, n int) []*note {
	notes := make([]*note, n)
	for i := range notes {
		notes[i] = &note{N: first + i}
	}
	return notes
}

// errWeather is an error that says nothing.
var errWeather = errors.New("the weather is bad")
