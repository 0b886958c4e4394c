//go:build linux

package helper

import (
	"errors"
	"strconv"

	"golang.org/x/sys/unix"
)

// unlinked adds up the files that processes have open and that have no name any more,
// which a walk through directories does not find. One that is mapped and not open is
// not found either.
type unlinked struct {
	walker *walker
	dev    uint64 // of the root
	seen   map[inode]bool
	buf    [4096]byte
}

// maxOpenFiles bounds a look at what processes have open, which is as long as a look at
// as many files.
const maxOpenFiles = 1 << 16

// addUnlinked looks at the processes in a /proc.
func (w *walker) addUnlinked(proc string, dev uint64) {
	u := unlinked{walker: w, dev: dev, seen: map[inode]bool{}}
	fd, err := unix.Open(proc, dirFlags, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd) //nolint:errcheck // only read
	for _, pid := range u.numbers(fd) {
		files, err := unix.Openat(fd, strconv.Itoa(pid)+"/fd", dirFlags, 0)
		if err != nil {
			continue // it has ended, or may not be looked at
		}
		u.addFiles(files)
		unix.Close(files) //nolint:errcheck // only read
		if w.total > w.limit || w.isStopped() {
			return
		}
	}
}

// numbers are the names in a directory that are numbers.
func (u *unlinked) numbers(fd int) (all []int) {
	var names []string
	for len(all) < maxOpenFiles {
		n, err := unix.ReadDirent(fd, u.buf[:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n <= 0 {
			break
		}
		_, _, names = unix.ParseDirent(u.buf[:n], -1, names[:0])
		for _, name := range names {
			if i, err := strconv.Atoi(name); err == nil {
				all = append(all, i)
			}
		}
	}
	return all
}

// addFiles adds what one process has open.
func (u *unlinked) addFiles(fd int) {
	w := u.walker
	for _, n := range u.numbers(fd) {
		var st unix.Stat_t
		if w.seen++; w.total > w.limit || w.isStopped() || unix.Fstatat(fd, strconv.Itoa(n), &st, 0) != nil {
			continue
		}
		id := inode{st.Dev, st.Ino}
		if st.Nlink > 0 || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Dev != u.dev || u.seen[id] || len(u.seen) == maxOpenFiles {
			continue
		}
		if w.uid >= 0 && int(st.Uid) != w.uid {
			continue // of another slot, where processes of the whole machine are seen
		}
		u.seen[id] = true
		w.total += st.Blocks * 512
	}
}
