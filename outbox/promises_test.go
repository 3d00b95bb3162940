package outbox_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What other outboxes were seen to get wrong, each with the tests against a real PostgreSQL that fail when it happens here. A name
// without a folder is a test of this package.
var promises = []struct {
	never string
	tests []string
}{
	{"a row is skipped because its transaction committed later than a higher number", []string{
		"TestProof", "TestProofFindsWrongDesigns", "TestLogicalProof", "TestLogicalBeginning", "TestStatusCountsWhatCommittedLate",
		"TestRelaysFindWhatIsLate",
	}},
	{"an open transaction, in this or another database, a prepared one, a session idle in a transaction or a long read stalls the relay", []string{
		"TestNothingOpenStallsTheRelay", "TestOpenTransactionHoldsUpNobody", "TestLogicalServer",
	}},
	{"concurrent writers break the order of a key", []string{
		"TestProof", "TestProofFindsWrongDesigns", "TestKeyLock", "TestDirectOvertakesNothing", "TestProofDirect", "TestNumberIsDrawnUnderTheKeysLock", "TestPartialFailureKeepsTheOrderOfAKey",
	}},
	{"two relays break the order of a key", []string{"TestProof", "TestOneOfSeveralRelaysLeads", "TestKilledRelays"}},
	{"a relay that was stopped for long and goes on publishes over its successor without being fenced", []string{
		"TestZombieRelay", "TestLateCursorIsFenced",
	}},
	{"rows are lost or doubled when the ring turns", []string{
		"TestRotationBesideLongTransactions", "TestUnsentRowsAreNotTruncated", "TestKilledRelays", "TestRetainForEver",
	}},
	{"a commit whose answer is lost is taken for failed, or for done", []string{
		"TestLostAnswerOfAPublish", "TestLostAnswerOfADeferredCommit", "TestCommitThatFails",
	}},
	{"tables and indexes grow under a steady load, or have dead rows", []string{"TestBloat"}},
	{"a broker that was away for long stops the relay, fills its memory or breaks the order", []string{
		"TestBrokerDownForLong", "TestPublisherDownThenUp", "TestStopWhilePublisherIsDown", "TestBrokerRestartsUnderLoad",
	}},
	{"a poison row holds up the good ones beside it", []string{"TestPoisonAmongGoodMessages", "TestRefusedForGoodGoesToTheDead"}},
	{"a dump that is restored, in a new cluster or beside the old database, loses rows", []string{"TestDumpAndRestore", "TestRestoredDump"}},
	{"a clock set back stops the relay or loses rows", []string{"TestClockSetBack"}},
	{"a crash of the relay, the server or the broker loses rows, or repeats what the ids do not tell", []string{
		"TestCrashBetweenPublishAndCursor", "TestServerCrash", "TestDatabaseCrashesUnderLoad", "TestKilledRelays", "TestBrokerRestartsUnderLoad", "TestRestartRepeatsAndLosesNothing",
	}},
	{"what a broker has accepted and lost stays lost", []string{
		"../bus TestRelaySendsAgainWhatAPowerCutHasLost", "../bus TestRelayWritesNoMarkOfWhatIsLost",
		"../bus TestRelayIsNotDeceivedByNewSequences", "../bus TestRelayAfterDeletionAndPurge", "../bus TestRelayOnACluster",
		"../bus TestRelaySendsAgainWhatWasPutOff", "../bus TestRelaysAtRestNoticeALoss",
	}},
	{"a stream that is whole gets again what another one has lost", []string{
		"../bus TestRelaySendsAgainWhatWasLostOnly", "../bus TestRelayOnACluster",
	}},
	{"a replication slot outlives its relay", []string{"TestLogical", "TestLogicalServer", "TestLogicalProcesses"}},
	{"settings of a role, a small pool or a hostile search path break or stall it", []string{
		"TestOddSettings", "TestPoolsOfOneConnection", "TestHostileSearchPath", "TestReadOnlyDatabase", "TestPgBouncer",
	}},
	{"a message is sent though its transaction was rolled back", []string{
		"TestCommittedIsSentAndRolledBackIsNot", "TestProof", "TestMessagesGoWithTheCommit",
	}},
}

// TestPromisesHaveTests holds the table to the truth.
func TestPromisesHaveTests(t *testing.T) {
	t.Parallel()
	known := map[string]map[string]bool{}
	for _, p := range promises {
		for _, name := range p.tests {
			dir, test, other := strings.Cut(name, " ")
			if !other {
				dir, test = ".", name
			}
			if known[dir] == nil {
				known[dir] = testsOf(t, dir)
			}
			if !known[dir][test] {
				t.Errorf("%s: folder %s has no %s", p.never, dir, test)
			}
		}
	}
}

// testsOf returns the functions of a folder's tests.
func testsOf(t *testing.T, dir string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: %d files, %v", dir, len(files), err)
	}
	names := map[string]bool{}
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, text, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok {
				names[f.Name.Name] = true
			}
		}
	}
	return names
}
