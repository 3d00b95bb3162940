//go:build unix

package devstack

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// account is the user that a server runs as. Nil is the user that we are.
type account struct {
	name     string
	uid, gid int
}

// postgresAccount returns who may run PostgreSQL: nil if we may, and an unprivileged user if we are root, since PostgreSQL
// refuses to run as root.
func postgresAccount() (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, errUID := strconv.Atoi(u.Uid)
		gid, errGID := strconv.Atoi(u.Gid)
		if errUID == nil && errGID == nil && uid != 0 {
			return &account{name: name, uid: uid, gid: gid}, nil
		}
	}
	return nil, errors.New("PostgreSQL refuses to run as root, and this machine has neither a user postgres nor a user nobody")
}

// process gives a child a session of its own, so that Ctrl-C in the terminal does not end it before we have drained.
func (a *account) process() *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Setsid: true}
	if a != nil {
		attr.Credential = &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid)}
	}
	return attr
}

// own hands path over to the account.
func (a *account) own(path string) error {
	if a == nil {
		return nil
	}
	return os.Chown(path, a.uid, a.gid)
}

// mkdir makes the folder path for the account alone.
func (a *account) mkdir(path string) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	if !a.reaches(path) {
		return fmt.Errorf("user %s, who runs PostgreSQL since we are root, cannot enter a folder above %s: choose another or open it with chmod o+x", a.name, path)
	}
	return a.own(path)
}

// tempBase returns the folder to make temporary ones in, in memory if so wished and possible. Where another account than
// ours is to use them, it must let that in and let it remove its own, as /tmp does and the TMPDIR of a root user may not.
func (a *account) tempBase(inMemory bool) (string, error) {
	var bases []string
	if inMemory {
		bases = memoryFolder()
	}
	bases = append(bases, os.TempDir())
	if a != nil {
		bases = append(bases, "/tmp", "/var/tmp")
	}
	var last error
	for _, base := range bases {
		info, err := os.Stat(base)
		switch {
		case err != nil:
			last = err
		case a != nil && (info.Mode().Perm()&0o003 != 0o003 || !a.reaches(filepath.Join(base, "any"))):
			last = fmt.Errorf("user %s, who runs PostgreSQL since we are root, may not write to %s", a.name, base)
		default:
			return base, nil
		}
	}
	return "", last
}

// reaches reports whether the account may enter every folder above path.
func (a *account) reaches(path string) bool {
	if a == nil {
		return true
	}
	path, err := filepath.EvalSymlinks(filepath.Dir(path))
	for ; err == nil && path != "/"; path = filepath.Dir(path) {
		var info os.FileInfo
		if info, err = os.Stat(path); err == nil && !a.enters(info) {
			return false
		}
	}
	return err == nil
}

func (a *account) enters(info os.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	switch perm := info.Mode().Perm(); {
	case !ok:
		return false
	case int(st.Uid) == a.uid:
		return perm&0o100 != 0
	case int(st.Gid) == a.gid:
		return perm&0o010 != 0
	default:
		return perm&0o001 != 0
	}
}
