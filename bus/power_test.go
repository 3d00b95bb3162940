package bus_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider/internal/devstack"
)

// serverEnv makes the test binary a nats-server: its value is the sync setting.
const serverEnv = "POSTRIDER_BUS_TEST_SERVER"

// beServer is the server that a test traces.
func beServer(sync string) error {
	srv, err := devstack.StartNATS(context.Background(), devstack.NATSConfig{SyncDefault: sync == "default"})
	if err != nil {
		return err
	}
	err = json.NewEncoder(os.Stdout).Encode(srv.URL)
	_, _ = io.Copy(io.Discard, os.Stdin) // until the test is over
	return errors.Join(err, srv.Close())
}

// TestAcknowledgedIsOnDisk reads from the server's system calls that what it acknowledges is synced: a power cut after the
// acknowledgement loses nothing, neither of a message that went alone nor of a group. With the server's default setting
// the same check finds that it would.
func TestAcknowledgedIsOnDisk(t *testing.T) {
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed")
	}
	for _, sync := range []string{"always", "default"} {
		t.Run(sync, func(t *testing.T) {
			t.Parallel()
			trace := filepath.Join(t.TempDir(), "trace")
			publishTraced(t, strace, trace, sync)
			acks, groups, atRisk := readTrace(t, trace)
			t.Logf("%d acknowledgements, %d of them for groups, %d before their data was synced", acks, groups, atRisk)
			if acks < 3 {
				t.Fatalf("%d acknowledgements in the trace: want one for each message or group", acks)
			}
			if sync == "always" && atRisk > 0 || sync == "default" && atRisk == 0 {
				t.Errorf("%d of %d acknowledgements were sent before the data was synced", atRisk, acks)
			}
		})
	}
}

// publishTraced publishes single messages and groups to a server that is traced, one after the other.
func publishTraced(t *testing.T, strace, trace, sync string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(strace, "-f", "-y", "-xx", "-s", "4000", "-e", "trace=write,writev,pwrite64,fsync,fdatasync", "-o", trace, self)
	cmd.Env = append(os.Environ(), serverEnv+"="+sync, "TMPDIR="+t.TempDir())
	cmd.Stderr = t.Output()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the traced server: %v", err)
		}
	}()
	var url string
	if err := json.NewDecoder(out).Decode(&url); err != nil {
		t.Skipf("strace cannot trace here: %v", err)
	}
	nc, err := nats.Connect(url)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	b := newBus(t, nc)
	for round := range 4 {
		if err := noted.Publish(t.Context(), b, &note{N: round}); err != nil {
			t.Fatal(err)
		}
		group := make([]*note, 300)
		for i := range group {
			group[i] = &note{N: 1000*round + i}
		}
		if err := noted.PublishAll(t.Context(), b, group); err != nil {
			t.Fatal(err)
		}
	}
}

// What strace writes, but for strings and paths, which are in hexadecimal: "12 pwrite64(7</tmp/1.blk>, "ab", ...) = 9", or in
// two halves "12 fsync(7</tmp/1.blk> <unfinished ...>" and "12 <... fsync resumed>) = 0".
var (
	callLine    = regexp.MustCompile(`^(\d+) +(\w+)\(\d+(<[^>]*>)(.*)$`)
	resumedLine = regexp.MustCompile(`^(\d+) +<\.\.\. \w+ resumed>`)
	hexText     = regexp.MustCompile(`["<]((?:\\x[0-9a-f]{2})+)[">]`)
	streamAck   = regexp.MustCompile(`\{"stream":"NOTES", ?"seq":(\d+)[^}]*`)
)

// traced is what readTrace knows about a file: the first sequence number of each write, and how many writes are synced.
type traced struct {
	writes []uint64
	synced int
}

// readTrace counts the acknowledgements of the test's stream, those for atomic batches among them, and those before which
// a message up to the acknowledged one was written and not synced. A sync counts from its end, for what was written before
// it began.
func readTrace(t *testing.T, trace string) (acks, groups, atRisk int) {
	t.Helper()
	f, err := os.Open(trace)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	files, unfinished := map[string]*traced{}, map[string]func(){}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 64<<20) // a line has all that was written at once, as text
	for lines.Scan() {
		line := lines.Text()
		if m := resumedLine.FindStringSubmatch(line); m != nil {
			if end := unfinished[m[1]]; end != nil {
				end()
			}
			delete(unfinished, m[1])
			continue
		}
		m := callLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		thread, name, path, data := m[1], m[2], string(readHex(t, m[3])), readHex(t, m[4])
		if !strings.HasSuffix(path, ".blk") || !strings.Contains(path, "/NOTES/msgs/") {
			for _, ack := range streamAck.FindAllStringSubmatch(string(data), -1) {
				acks++
				if strings.Contains(ack[0], `"batch":`) {
					groups++
				}
				seq, _ := strconv.ParseUint(ack[1], 10, 64)
				for _, f := range files {
					if slices.ContainsFunc(f.writes[f.synced:], func(first uint64) bool { return first <= seq }) {
						atRisk++
						break
					}
				}
			}
			continue
		}
		f := files[path]
		if f == nil {
			f = &traced{}
			files[path] = f
		}
		end := func() {}
		if written := len(f.writes); name == "fsync" || name == "fdatasync" {
			end = func() { f.synced = max(f.synced, written) }
		} else if len(data) >= 12 {
			// A record of a block begins with its length, 4 bytes, and its sequence number.
			f.writes = append(f.writes, binary.LittleEndian.Uint64(data[4:]))
		}
		if strings.HasSuffix(line, "<unfinished ...>") {
			unfinished[thread] = end
		} else {
			end()
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatalf("read the trace: %v", err)
	}
	return acks, groups, atRisk
}

// readHex returns the strings of a part of a line, one after the other.
func readHex(t *testing.T, args string) []byte {
	t.Helper()
	var data []byte
	for _, m := range hexText.FindAllStringSubmatch(args, -1) {
		part, err := hex.DecodeString(strings.ReplaceAll(m[1], `\x`, ""))
		if err != nil {
			t.Fatal(err)
		}
		data = append(data, part...)
	}
	return data
}
