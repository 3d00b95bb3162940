// Package wiredoc reads the examples of docs/wire.md, so that tests can compare them with what the code writes.
package wiredoc

import (
	"encoding/hex"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// tb is what this package needs of testing.TB.
type tb interface {
	Helper()
	Fatalf(format string, args ...any)
}

// Text returns the block of docs/wire.md that begins with ```info.
func Text(t tb, info string) string {
	t.Helper()
	dir, err := os.Getwd()
	for err == nil {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil || dir == filepath.Dir(dir) {
			break
		}
		dir = filepath.Dir(dir)
	}
	page, err := fs.ReadFile(os.DirFS(dir), "docs/wire.md")
	if err != nil {
		t.Fatalf("the wire document: %v", err)
	}
	_, block, found := strings.Cut(string(page), "```"+info+"\n")
	block, _, ended := strings.Cut(block, "\n```")
	if !found || !ended {
		t.Fatalf("docs/wire.md has no block %q", info)
	}
	return block
}

// Bytes returns a block that shows bytes: lines of hexadecimal digits, each with a remark behind "|".
func Bytes(t tb, info string) []byte {
	t.Helper()
	var data []byte
	for line := range strings.Lines(Text(t, info)) {
		digits, _, _ := strings.Cut(line, "|")
		b, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(digits), " ", ""))
		if err != nil {
			t.Fatalf("docs/wire.md, block %q, line %q: %v", info, line, err)
		}
		data = append(data, b...)
	}
	return data
}
