package file

import (
	"errors"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// SetBootID makes a Store of o believe that it runs in the run of the kernel
// that id names.
func (o *Options) SetBootID(id string) { o.bootID = id }

// SetLinkat replaces the system call that Link makes.
func (s *Store) SetLinkat(linkat func(oldname, newname string) error) { s.linkat = linkat }

// Recovering reports whether blobs are still being verified after a crash.
func (s *Store) Recovering() bool { return s.recovery.active.Load() }

// Used is the space that the store believes to take, in bytes.
func (s *Store) Used() int64 { return s.space.state().used }

// Crash ends the Store as a kill does: nothing is written any more.
func (s *Store) Crash() error {
	var err error
	s.closeOnce.Do(func() {
		close(s.closing)
		s.running.Wait()
		err = errors.Join(s.closePacks(), s.lock.Close())
	})
	return err
}

// BlobPath is where a blob is.
func (s *Store) BlobPath(d digest.Digest, mode blob.LinkMode) string { return s.blobPath(d, mode) }

// Counted is closed when what was there at the start is counted.
func (s *Store) Counted() <-chan struct{} { return s.counted }

// FormatEntry is the content of an entry's file.
func FormatEntry(instance string, value []byte) []byte { return formatEntry(instance, value) }

// ParseEntry reads the content of an entry's file.
func ParseEntry(data []byte) (instance string, value []byte, ok bool) {
	e, ok := parseEntry(data)
	return e.instance, e.value, ok
}

// Dir is the directory of s.
func (s *Store) Dir() string { return s.dir }
