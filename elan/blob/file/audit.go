package file

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Audit implements blob.Auditor: newfstatat. Every other use of a blob looks at the
// same things, and has its bytes verified where they differ; Audit does not
// give it that chance, because whoever changed it may still be at it.
//
// Somebody who runs as the owner of the store can write a file and set its
// modification time back; no look from outside tells. Run actions as another
// user, or in the sandbox, where that matters.
func (s *Store) Audit(ctx context.Context, d digest.Digest, mode blob.LinkMode, linked time.Time) error {
	if err := s.audit(ctx, d, mode, linked); err != nil {
		return fmt.Errorf("audit blob %s: %w", d, err)
	}
	return nil
}

func (s *Store) audit(ctx context.Context, d digest.Digest, mode blob.LinkMode, linked time.Time) error {
	if err := s.check(ctx, d); err != nil {
		return err
	}
	path := s.blobPath(d, mode)
	if s.changed.since(path, linked) {
		return fmt.Errorf("%w: it was changed, and replaced meanwhile", blob.ErrCorrupt)
	}
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		return s.absent(d.Function(), path)
	case err != nil:
		return classify(err)
	case s.sound(&st, d.Size(), perm(mode)):
		return nil
	}
	if !s.keys.lock(ctx.Done(), path) {
		return ctx.Err()
	}
	defer s.keys.unlock(path)
	s.changed.note(path)
	if err := unix.Lstat(path, &st); err != nil || s.sound(&st, d.Size(), perm(mode)) {
		// Withdrawn or repaired meanwhile; what was linked before was tampered with all the same.
		return fmt.Errorf("%w: it was changed, and replaced meanwhile", blob.ErrCorrupt)
	}
	what := fmt.Sprintf("mode %o, owner %d, %d bytes, modified at %d.%09d; want mode %o, owner %d, modified at %d",
		st.Mode, st.Uid, st.Size, st.Mtim.Sec, st.Mtim.Nsec, unix.S_IFREG|perm(mode), s.uid, constMtime)
	if err := s.withdraw(d, mode, what); !errors.Is(err, blob.ErrNotFound) {
		return err
	}
	return fmt.Errorf("%w: its file was changed: %s", blob.ErrCorrupt, what)
}

// maxChanged bounds how many changed files are remembered: some 200 bytes each.
const maxChanged = 4096

// changes remembers which files were changed from outside and replaced, for the
// audits of those who had linked them before.
type changes struct {
	mu   sync.Mutex // guards what follows
	last map[string]time.Time
	// forgotten is until when changes are not in last any more.
	forgotten time.Time
}

func (c *changes) note(path string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.last) >= maxChanged {
		c.last, c.forgotten = nil, time.Now()
	}
	if c.last == nil {
		c.last = make(map[string]time.Time)
	}
	c.last[path] = time.Now()
}

// since reports whether the file was, or may have been, changed since then.
func (c *changes) since(path string, then time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.last[path].Before(then) || !c.forgotten.Before(then)
}
