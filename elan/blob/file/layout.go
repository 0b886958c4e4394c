package file

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// version is the content of the VERSION file. A change of the layout that
	// older code would misread changes the number.
	version     = "mettle file store 2\n"
	version1    = "mettle file store 1\n" // it had no packs; all else is the same
	versionFile = "VERSION"
	lockFile    = "lock"
	newSuffix   = ".new" // of files about to replace another
	// twinSuffix marks the executable inode of a blob.
	twinSuffix = ".x"

	// fanOut is the number of folders of a digest function: 40,000 files in
	// each of 10 million, which the hashed folders of ext4, XFS and Btrfs take
	// easily, and few enough to be made and walked at once.
	fanOut = 256

	regularPerm    = 0o444
	executablePerm = 0o555

	// blockBytes is what sizes are rounded up to when space is counted: the
	// usual block of ext4, XFS and Btrfs.
	blockBytes = 4096
	// maxQuarantined bounds the files that are kept for a look after they were
	// found to be corrupt, and maxQuarantinedBytes the size of each.
	maxQuarantined      = 64
	maxQuarantinedBytes = 16 << 20
)

// blobPath is where the blob d is. In mode LinkExecutable, where its twin is.
func (s *Store) blobPath(d digest.Digest, mode blob.LinkMode) string {
	var buf [256]byte
	b := appendBlobName(append(buf[:0], s.casDir...), d)
	if mode == blob.LinkExecutable {
		b = append(b, twinSuffix...)
	}
	return string(b)
}

func appendBlobName(b []byte, d digest.Digest) []byte {
	b = append(b, d.Function().String()...)
	b = append(b, '/')
	b = append(b, d.Hash()[:2]...)
	b = append(b, '/')
	b = append(b, d.Hash()...)
	b = append(b, '-')
	b = strconv.AppendInt(b, d.Size(), 10)
	if space := d.Space(); !space.IsZero() {
		b = append(append(b, '-'), space.String()...)
	}
	return b
}

// entryPath is where the entry k is. An instance can have any name, so that its
// hash stands for it.
func (s *Store) entryPath(k blob.EntryKey) string {
	var buf [384]byte
	b := appendBlobName(append(buf[:0], s.acDir...), k.Action)
	if k.Instance != "" {
		sum := sha256.Sum256([]byte(k.Instance))
		b = append(b, '-')
		b = hex.AppendEncode(b, sum[:])
	}
	return string(b)
}

// parseBlobName reads the name of a blob's file in a folder of function fn.
func parseBlobName(fn digest.Function, name string) (d digest.Digest, mode blob.LinkMode, ok bool) {
	name, executable := strings.CutSuffix(name, twinSuffix)
	if executable {
		mode = blob.LinkExecutable
	}
	hash, rest, ok := strings.Cut(name, "-")
	if !ok {
		return d, mode, false
	}
	size, tag, spaced := strings.Cut(rest, "-")
	n, err := digest.ParseSize(size)
	if err != nil {
		return d, mode, false
	}
	if d, err = digest.New(fn, hash, n); err != nil || !spaced {
		return d, mode, err == nil
	}
	space, err := digest.ParseSpace(tag)
	return d.In(space), mode, err == nil && !space.IsZero()
}

// tmpPath is a name in tmp that nobody has.
func (s *Store) tmpPath() string {
	var buf [256]byte
	return string(strconv.AppendUint(append(buf[:0], s.tmpDir...), s.tmpSeq.Add(1), 36))
}

func perm(mode blob.LinkMode) uint32 {
	if mode == blob.LinkExecutable {
		return executablePerm
	}
	return regularPerm
}

// onDisk is the space that a file of size bytes is counted with.
func onDisk(size int64) int64 {
	return (size + blockBytes - 1) &^ (blockBytes - 1)
}

// layOut makes what every store has, and removes what unfinished writes of an
// earlier process left.
func (s *Store) layOut() error {
	if err := os.RemoveAll(s.dir + "/tmp"); err != nil {
		return err
	}
	for _, d := range []string{"tmp", "quarantine", "cas", "ac"} {
		if err := mkdir(filepath.Join(s.dir, d)); err != nil {
			return err
		}
	}
	for _, fn := range digest.Functions() {
		if err := s.layOutFunction(fn); err != nil {
			return err
		}
	}
	if err := s.probe(); err != nil {
		return err
	}
	return s.writeVersion()
}

// layOutFunction makes the folders of fn, if fn was used before or is the one
// that all clients use.
func (s *Store) layOutFunction(fn digest.Function) error {
	used := fn == digest.SHA256
	for _, top := range append([]string{s.casDir, s.acDir}, s.recovery.olds...) {
		if _, err := os.Lstat(top + fn.String()); err == nil {
			used = true
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if !used {
		return nil
	}
	return s.makeFolders(fn)
}

// prepare makes the folders of fn when its first blob or entry comes. After
// that, one that is missing is a fault, and never read as an empty one.
func (s *Store) prepare(ctx context.Context, fn digest.Function) error {
	if s.prepared[fn].Load() {
		return nil
	}
	name := s.casDir + fn.String()
	if !s.keys.lock(ctx.Done(), name) {
		return ctx.Err()
	}
	defer s.keys.unlock(name)
	if s.prepared[fn].Load() {
		return nil
	}
	if err := s.makeFolders(fn); err != nil {
		return classify(err)
	}
	return nil
}

func (s *Store) makeFolders(fn digest.Function) error {
	for _, top := range []string{s.casDir, s.acDir} {
		sub := top + fn.String()
		if err := mkdir(sub); err != nil {
			return err
		}
		have, err := os.ReadDir(sub)
		if err != nil {
			return err
		}
		if len(have) == fanOut {
			continue
		}
		for i := range fanOut {
			if err := mkdir(fmt.Sprintf("%s/%02x", sub, i)); err != nil {
				return err
			}
		}
	}
	s.prepared[fn].Store(true)
	return nil
}

func mkdir(path string) error {
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func (s *Store) checkVersion() error {
	got, err := os.ReadFile(filepath.Join(s.dir, versionFile))
	switch {
	case err == nil && (string(got) == version || string(got) == version1):
		return nil
	case err == nil && len(got) > 0:
		return fmt.Errorf("its format is %q, this program knows %q and what was before: run the version that it was used with last, or name another directory",
			firstLine(got), strings.TrimSpace(version))
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	// A new directory, or one whose making was interrupted.
	have, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	ours := []string{versionFile, lockFile, "tmp", "cas", "ac", packsDir, "quarantine", checkpointFile, checkpointFile + newSuffix, versionFile + newSuffix}
	for _, e := range have {
		if !slices.Contains(ours, e.Name()) {
			return fmt.Errorf("it is not a store, and not empty: there is %q", e.Name())
		}
	}
	return nil
}

// firstLine is what an error may quote of a file that is not ours to know.
func firstLine(text []byte) string {
	line, _, _ := strings.Cut(string(text[:min(len(text), 64)]), "\n")
	return line
}

func (s *Store) writeVersion() error {
	path := filepath.Join(s.dir, versionFile)
	if got, err := os.ReadFile(path); err == nil && string(got) == version {
		return nil
	}
	return replaceFile(path, []byte(version))
}

// replaceFile makes data the content of path, durably and at once:
// openat, write, fsync, close, renameat, openat(folder), fsync, close.
func replaceFile(path string, data []byte) error {
	tmp := path + newSuffix
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// overwrite makes data the content of a small file in the place that it has, which
// takes no room: openat, fstat, pwrite64, fsync, close. A crash may leave neither the
// former content nor this one, so only what is checked when it is read may be
// written so. Spaces fill what was longer.
func overwrite(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil {
		if rest := info.Size() - int64(len(data)); 0 < rest && rest < 4<<10 {
			data = append(data, bytes.Repeat([]byte(" "), int(rest))...)
		}
		_, err = f.WriteAt(data, 0)
	}
	return errors.Join(err, f.Sync(), f.Close())
}

// probe makes a file as a writer does, to see that this works and whether the
// mode that comes out is the one asked for.
func (s *Store) probe() error {
	path := s.tmpPath()
	fd, err := openFile(path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, regularPerm)
	if err != nil {
		return err
	}
	defer unix.Unlink(path) //nolint:errcheck // tmp is emptied at the next start
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	if err := errors.Join(err, unix.Close(fd)); err != nil {
		return err
	}
	s.needChmod = st.Mode&0o7777 != regularPerm
	return nil
}
