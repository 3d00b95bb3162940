package bus_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What other libraries were seen to get wrong, and what the bus promises for envelopes and topology, each with the tests that
// fail when it does not hold. A name without a package is a test of this package, or of the one that the entry names; one
// with "promise " is a subtest of the conformance suite, package postridertest/bustest, which the bus in memory keeps too.
var promises = []struct {
	promise string
	tests   []string
}{
	// Must not happen.
	{"a graceful close in mid-batch loses messages", []string{"promise CloseInMidBatchLosesNothing", "TestDrainLosesNothing"}},
	{"one slow handler loses its batch", []string{"promise SlowHandlerDoesNotLoseItsBatch", "TestSlowHandlersKeepTheirMessages"}},
	{"the redelivery of a failed message is swallowed by deduplication", []string{
		"promise FailedMessageComesBack", "promise LongRetriesKeepIDAndAttempts", "TestLongRetryLeavesTheConsumer",
	}},
	{"two different payloads are taken for duplicates", []string{"promise DifferentMessagesAreNotDuplicates", "TestPublishDuplicatesInABatch"}},
	{"a multiplier of 1.5 never grows", []string{"promise MultiplierGrows"}},
	{"one undecodable message stops the process, or the ones behind it", []string{"promise UndecodableMessageStopsNobody", "TestDeadLetters"}},
	{"a close under load panics", []string{"promise CloseUnderLoadDoesNotPanic"}},
	{"non-ASCII attributes are changed on the way", []string{"promise AttributesArriveIntact", "promise DeadLettersHaveCauseAndMessage"}},
	{"a plain nak burns all attempts in milliseconds", []string{"promise DefaultPolicySpacesPlainErrors", "promise RetryAfterIsKept"}},
	{"a restart replays everything", []string{
		"promise RestartReplaysNothing", "promise GroupsBeginWhereTheySay", "TestAGroupGoesOnWhereItWas",
	}},
	{"a crashed worker's messages wait for minutes", []string{"promise CrashedWorkersMessagesComeBack"}},
	{"shutdown cancels handlers in flight", []string{"promise ShutdownDoesNotCancelHandlers", "TestDrainWaitsForHandlers"}},
	{"a re-drive inside the duplicate window is swallowed", []string{"promise RedriveIsNotSwallowed", "TestReplayReachesOnlyTheGroupThatFailed"}},
	{"a re-drive runs beside another message of its key", []string{"promise RedriveTakesItsTurn"}},
	{"a poison message holds up its neighbours", []string{
		"promise PoisonDoesNotHoldUpNeighbours", "TestOrderedFailureHoldsItsKeyOnly", "TestOrderedDeadLetterFreesItsKey",
	}},
	{"a parked key goes on without its release, or not in its order", []string{
		"promise ParkedKeyWaitsForItsRelease", "promise ParkedKeyOutlivesItsOwner", "promise CrashInAReleaseLosesNothing",
		"promise RedriveWaitsBehindItsParkedKey", "TestParkedKeysKeepTheirOrder",
	}},
	{"one bad event of a batch handler fails its neighbours", []string{"promise BatchTellsEachEventsFate"}},
	{"a close while a batch is filled or handled loses messages", []string{"promise CloseGivesBatchesBack"}},
	{"large messages fill the memory of a slow process", []string{"TestPrefetchBoundsBytes", "TestPrefetchTakesWhatIsLargerThanItsBound"}},

	// Envelope.
	{"binary mode is that of the CloudEvents NATS binding, by the vectors of the specification", []string{
		"TestDecode", "TestWireDocumentEvent", "../internal/envelope TestEscape", "../internal/envelope TestUnescapeIsTolerant",
	}},
	{"structured JSON and protobuf are read, and written as the SDK reads them", []string{
		"TestDecode", "TestCompactIsReadBySDK", "../internal/envelope TestJSONRoundTripAndSDK", "../internal/envelope TestProtoRoundTripAndSDK",
	}},
	{"batches are read, each event with an outcome of its own", []string{"TestBatchOfEvents", "TestBatchDeadLetters", "TestBatchIsBounded"}},
	{"what the Go SDK sends, not encoded and without a content type, is read", []string{"TestReadsWhatTheGoSDKWrites", "TestDecode"}},
	{"what is no CloudEvent goes to raw handlers, else to the dead letters with its cause", []string{
		"TestRawHandlerTakesAnything", "promise UndecodableMessageStopsNobody", "TestDecodeRefuses",
	}},

	// Declared topology.
	{"streams and consumers are declared once, however often and by how many instances", []string{
		"TestDeclareStreams", "TestInstancesStartTogether", "TestServicesDeclareOneStreamTogether", "TestAdoptStream", "TestDeclaredAgain",
	}},
	{"a change that is refused names both values", []string{"TestAdoptRefuses"}},
	{"a stream of others is adopted, or used and never changed, and what it does not promise is told", []string{
		"TestAdoptStream", "TestUseStreamOfOthers",
	}},
	{"a topic without a stream is an error at start and at publish", []string{"promise MisuseIsAnError", "promise PublishTellsEachMessagesFate"}},
}

// TestPromisesHaveTests holds the table to the truth.
func TestPromisesHaveTests(t *testing.T) {
	t.Parallel()
	known := map[string]map[string]bool{}
	for _, p := range promises {
		for _, name := range p.tests {
			dir, test, other := strings.Cut(name, " ")
			switch {
			case dir == "promise":
				dir = "../postridertest/bustest"
			case !other:
				dir, test = ".", name
			}
			if known[dir] == nil {
				known[dir] = declared(t, dir)
			}
			if !known[dir][test] {
				t.Errorf("%s: package %s has no %s", p.promise, dir, test)
			}
		}
	}
}

// declared returns the functions of a folder's tests and the names of the suite's promises.
func declared(t *testing.T, dir string) map[string]bool {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, e := range entries {
		if e.Name() != "suite.go" && !strings.HasSuffix(e.Name(), "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(dir, e.Name()), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for n := range ast.Preorder(file) {
			switch n := n.(type) {
			case *ast.FuncDecl:
				names[n.Name.Name] = true
			case *ast.BasicLit:
				if e.Name() == "suite.go" {
					names[strings.Trim(n.Value, `"`)] = true
				}
			}
		}
	}
	return names
}
