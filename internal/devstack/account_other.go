//go:build !unix

package devstack

import (
	"errors"
	"os"
	"syscall"
)

// account is the user that a server runs as. Only Unix has others than our own.
type account struct{}

func postgresAccount() (*account, error) {
	return nil, errors.New("a private PostgreSQL is started on Unix only")
}

func (*account) process() *syscall.SysProcAttr { return nil }
func (*account) own(string) error              { return nil }
func (*account) mkdir(path string) error       { return os.MkdirAll(path, 0o700) }
func (*account) tempBase(bool) (string, error) { return os.TempDir(), nil }
func (*account) reaches(string) bool           { return true }
