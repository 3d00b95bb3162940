package devstack

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
)

// folder is the directory of one server. A guard process watches over it: it waits for the end of a pipe whose other end we
// hold, and the system closes that end whenever and however this process ends. Then it stops the PostgreSQL of the folder,
// if there is one, and removes a temporary folder.
//
// A parent-death signal would be shorter, but exists on Linux only and is bound to the thread that started the child.
type folder struct {
	path string
	temp bool

	guard *exec.Cmd      // nil where there is no shell
	pipe  io.WriteCloser // its end is the guard's signal
}

// guardScript gets the folder and whether to "remove" it. PostgreSQL's children call setsid, so the postmaster's pid, which it
// keeps in its data directory, is the only handle on all of them; SIGQUIT is its immediate shutdown. The loops are
// bounded: in a container nobody may reap the dead, and initdb may still be writing.
const guardScript = `
while read -r _; do :; done
if read -r pid <"$1/data/postmaster.pid" && kill -s QUIT "$pid"; then
	n=0
	while kill -s 0 "$pid" && [ $n -lt 100 ]; do n=$((n+1)); sleep 0.1; done
fi
n=0
while [ "$2" = remove ] && [ -e "$1" ] && [ $n -lt 50 ]; do rm -rf "$1" && break; n=$((n+1)); sleep 0.1; done
`

// newFolder makes and guards the folder at path, or if path is empty a temporary one whose name begins with prefix, in memory
// where that is wished and possible. It belongs to owner, nil meaning us. The guard comes first: a process that is killed
// between the two leaves nothing behind.
func newFolder(path, prefix string, inMemory bool, owner *account) (*folder, error) {
	f := &folder{path: path, temp: path == ""}
	var err error
	if f.temp {
		var base string
		base, err = owner.tempBase(inMemory)
		f.path = filepath.Join(base, prefix+rand.Text())
	} else {
		f.path, err = filepath.Abs(path)
	}
	if err != nil {
		return nil, err
	}
	if err := f.startGuard(owner); err != nil {
		return nil, fmt.Errorf("start the guard: %w", err)
	}
	if err := owner.mkdir(f.path); err != nil {
		return nil, errors.Join(err, f.close())
	}
	return f, nil
}

func (f *folder) startGuard(owner *account) error {
	sh, err := exec.LookPath("/bin/sh")
	if err != nil {
		return nil //nolint:nilerr // no Unix shell: Close cleans up, a crash leaves the folder
	}
	action := "keep"
	if f.temp {
		action = "remove"
	}
	f.guard = exec.Command(sh, "-c", guardScript, "postrider-guard", f.path, action)
	f.guard.Dir = "/" // it must not hold a folder that somebody wants to remove
	f.guard.Env = []string{"PATH=/usr/bin:/bin:/usr/sbin:/sbin"}
	f.guard.SysProcAttr = owner.process()
	if f.pipe, err = f.guard.StdinPipe(); err != nil {
		return err
	}
	return f.guard.Start()
}

// close ends the guard and removes a temporary folder. The server in it must have ended.
func (f *folder) close() error {
	if f.guard != nil {
		f.pipe.Close()
		_ = f.guard.Wait() // its exit code is that of its last command, also when there was nothing to do
	}
	return f.remove()
}

func (f *folder) remove() error {
	if !f.temp {
		return nil
	}
	return os.RemoveAll(f.path)
}
