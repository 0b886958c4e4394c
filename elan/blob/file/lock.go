package file

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrInUse is what New's error wraps where another process has the store open.
var ErrInUse = errors.New("in use")

// lockDir takes the directory for this process, until the file it returns is
// closed or the process ends: openat, flock, write,
// ftruncate. On a full disk the process id may be missing.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%w by process %s", ErrInUse, holder(f))
		}
		return nil, errors.Join(err, f.Close())
	}
	pid := strconv.Itoa(os.Getpid()) + "\n"
	_, err = f.WriteAt([]byte(pid), 0)
	if err == nil {
		err = f.Truncate(int64(len(pid)))
	}
	if err != nil && !noSpace(err) {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// holder is the process id that the lock's holder wrote into it.
func holder(f *os.File) string {
	data, err := io.ReadAll(io.LimitReader(f, 32))
	if pid := strings.TrimSpace(string(data)); err == nil && pid != "" {
		return pid
	}
	return "(unknown)"
}
