package file

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

const (
	checkpointFile = "checkpoint"
	oldPrefix      = "old-"
	// checkpointEvery is how often everything is made durable while blobs come
	// in. The kernel itself writes dirty pages back after 30 s
	// (vm.dirty_expire_centisecs); more often would write files of finished
	// actions to the disk that would never have got there.
	checkpointEvery = 30 * time.Second
	// clockSlack covers that the kernel stamps inodes with a clock that is a
	// tick behind.
	clockSlack = 2 * time.Second
)

// checkpoint is the content of the file of that name.
type checkpoint struct {
	// BootID tells the kernel's run: in the same one, the page cache has
	// everything that was ever acknowledged.
	BootID string `json:"boot_id"`
	// DurableUntil: files that have not changed since are on the disk.
	DurableUntil time.Time `json:"durable_until"`
	// Clean: the store was closed, and nothing was written since.
	Clean bool `json:"clean"`
}

// keepDurable is the goroutine that makes checkpoints.
func (s *Store) keepDurable() {
	tick := time.NewTicker(checkpointEvery)
	defer tick.Stop()
	for {
		select {
		case <-s.closing:
			return
		case <-tick.C:
		}
		if s.recovery.active.Load() || !s.dirty.Swap(false) {
			continue
		}
		if err := s.checkpoint(false); err != nil {
			s.dirty.Store(true)
			s.log.Error("checkpoint", "error", err)
		}
	}
}

// Sync returns when all that was acknowledged before the call would survive a
// power failure. That can take seconds; other calls go on meanwhile. A Close
// soon after it takes little time.
func (s *Store) Sync() error { return s.checkpoint(false) }

// checkpoint makes all files durable, then says so: openat, syncfs, close,
// and those of replaceFile.
func (s *Store) checkpoint(clean bool) error {
	if s.recovery.active.Load() {
		return nil // the older one holds until recovery is done
	}
	now := time.Now()
	dir, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	err = unix.Syncfs(int(dir.Fd()))
	if err := errors.Join(err, dir.Close()); err != nil {
		return fmt.Errorf("sync the file system of %s: %w", s.dir, err)
	}
	return s.recovery.write(s.dir, checkpoint{DurableUntil: now, Clean: clean})
}

// recovery serves a store whose machine went down, while it was in use, after
// some blobs were acknowledged and before they were durable. The folders of
// before are set aside; a blob in them is served after it was moved back, and
// what may have changed after the last checkpoint is moved back only if its
// bytes have the right digest. Entries need none of this: each has a checksum.
type recovery struct {
	active       atomic.Bool
	untrusted    bool // what is on the disk may be neither old nor new
	bootID       string
	durableUntil time.Time
	olds         []string // folders laid out as cas; with a slash at their ends
}

// begin finds out whether there is something to recover. Nobody else has the
// store yet.
func (r *recovery) begin(s *Store, bootID string) error {
	if r.bootID = bootID; bootID == "" {
		data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			s.log.Warn("boot id unknown: all blobs will be verified after an unclean shutdown", "error", err)
		}
		r.bootID = strings.TrimSpace(string(data))
	}
	cp := r.read(s)
	r.untrusted = !cp.Clean && (cp.BootID != r.bootID || r.bootID == "")
	if err := r.setAside(s, !r.untrusted); err != nil {
		return err
	}
	r.durableUntil = cp.DurableUntil
	if r.active.Load() {
		s.log.Warn("the machine went down while the store was in use: verifying blobs", "since", cp.DurableUntil)
		return nil
	}
	if cp.Clean || cp.DurableUntil.IsZero() {
		cp.DurableUntil = time.Now()
	}
	return r.write(s.dir, checkpoint{DurableUntil: cp.DurableUntil})
}

// setAside renames cas, unless it can be trusted, and lists what was renamed by
// this and earlier runs.
func (r *recovery) setAside(s *Store, trusted bool) error {
	olds, err := filepath.Glob(s.dir + "/" + oldPrefix + "*")
	if err != nil {
		return err
	}
	if !trusted {
		old := fmt.Sprintf("%s/%s%d", s.dir, oldPrefix, time.Now().UnixNano())
		err := os.Rename(s.dir+"/cas", old)
		switch {
		case err == nil:
			olds = append(olds, old)
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
	}
	for _, old := range olds {
		r.olds = append(r.olds, old+"/")
	}
	r.active.Store(len(olds) > 0)
	return nil
}

// read returns the zero checkpoint where there is none that can be read.
func (r *recovery) read(s *Store) checkpoint {
	var cp checkpoint
	data, err := os.ReadFile(filepath.Join(s.dir, checkpointFile))
	if err == nil {
		err = json.Unmarshal(data, &cp)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("checkpoint can't be read: all blobs will be verified", "error", err)
		return checkpoint{}
	}
	return cp
}

func (r *recovery) write(dir string, cp checkpoint) error {
	cp.BootID = r.bootID
	data, err := json.Marshal(cp)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, checkpointFile)
	err = replaceFile(path, append(data, '\n'))
	if noSpace(err) {
		// A store on a full disk has to open, since nothing else evicts from it.
		if overwrite(path, append(data, '\n')) == nil {
			return nil
		}
	}
	return err
}

// find moves the file of d back if it was set aside and is right, and starts
// its lifetime anew. The caller holds the lock of its path. The error is
// blob.ErrNotFound or wraps ErrUnavailable.
func (r *recovery) find(s *Store, d digest.Digest, mode blob.LinkMode) error {
	to := s.blobPath(d, mode)
	for _, old := range r.olds {
		from := old + strings.TrimPrefix(to, s.casDir)
		err := r.moveBack(s, from, d, mode)
		if err == nil {
			err = setAtime(to, time.Now())
		}
		if err == nil || !errors.Is(err, blob.ErrNotFound) && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return blob.ErrNotFound
}

// moveBack verifies the file from, of d, where that is needed, and moves it to
// where it belongs. The caller holds the lock of that path.
func (r *recovery) moveBack(s *Store, from string, d digest.Digest, mode blob.LinkMode) error {
	var st unix.Stat_t
	if err := unix.Lstat(from, &st); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return blob.ErrNotFound
		}
		return classify(err)
	}
	good := s.sound(&st, d.Size(), perm(mode))
	if changed := time.Unix(st.Ctim.Unix()); good && changed.After(r.durableUntil.Add(-clockSlack)) {
		var err error
		if good, err = holds(from, d); err != nil {
			return classify(err)
		}
	}
	if !good {
		s.metrics.corrupt.Inc()
		s.log.Warn("blob did not survive the crash", "digest", d.String())
		if err := s.discard(from, st.Size); err != nil {
			return classify(err)
		}
		return blob.ErrNotFound
	}
	err := renameNew(from, s.blobPath(d, mode))
	switch {
	case err == nil:
		s.space.add(onDisk(st.Size))
		return nil
	case errors.Is(err, unix.EEXIST):
		return unix.Unlink(from) // it came in again meanwhile
	}
	return classify(err)
}

// sweep moves everything back, and ends the recovery.
func (r *recovery) sweep(s *Store) error {
	if !r.active.Load() {
		return nil
	}
	started, files := time.Now(), 0
	for _, old := range r.olds {
		err := s.walkTop(old, true, func(f folder, name string) error {
			d, mode, ok := parseBlobName(f.fn, name)
			if !ok {
				return nil // goes with the folder
			}
			files++
			path := s.blobPath(d, mode)
			if !s.keys.lock(s.closing, path) {
				return errGivenUp
			}
			defer s.keys.unlock(path)
			if err := r.moveBack(s, f.path+name, d, mode); err != nil && !errors.Is(err, blob.ErrNotFound) {
				return err
			}
			return nil
		})
		if err == nil {
			err = os.RemoveAll(old)
		}
		if errors.Is(err, errGivenUp) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	if s.packed.store != nil {
		select {
		case <-s.packed.store.Rebuilt():
		case <-s.closing:
			return nil
		}
	}
	r.active.Store(false)
	s.dirty.Store(true)
	s.log.Info("recovered", "files", files, "duration", time.Since(started))
	return nil
}
