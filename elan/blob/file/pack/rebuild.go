package pack

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
)

// oldSuffix is that of the former index while a new one is made. It is there as
// long as the new one is not complete.
const oldSuffix = "-old"

// beginRebuild sets the index aside, begins an empty one, and starts the
// goroutine that fills it. Where that was interrupted before, what it had made
// is dropped.
func (s *Store) beginRebuild(dir string, interrupted bool) error {
	var err error
	if interrupted {
		err = os.RemoveAll(dir)
	} else if err = os.Rename(dir, dir+oldSuffix); errors.Is(err, os.ErrNotExist) {
		err = os.Mkdir(dir+oldSuffix, 0o700)
	}
	if err != nil {
		return err
	}
	if s.index, err = openIndex(dir, s.secret.check(), &s.segs, s.grew); err != nil {
		return err
	}
	for n := range s.index.shard {
		s.index.shard[n].counted = true // there is nothing to count
	}
	s.old = openOld(dir+oldSuffix, s.secret.check())
	segs := make([]*segment, 0, len(s.segs.all()))
	for _, seg := range s.segs.all() {
		segs = append(segs, seg)
	}
	// The newest first: what they have is asked for most.
	slices.SortFunc(segs, func(a, b *segment) int { return cmp.Compare(b.id, a.id) })
	s.running.Go(func() { s.rebuild(segs, dir+oldSuffix) })
	return nil
}

// openOld maps what can be read of a former index, for the last uses in it.
func openOld(dir string, check uint64) *index {
	old := &index{dir: dir}
	for n := range old.shard {
		if t, err := openTable(old.path(n), n, check); err == nil {
			old.shard[n].t = t
		}
	}
	return old
}

// rebuild puts every whole record of segs into the index. Of the last uses it
// believes the old index where that knows the record, as the recorded use of a
// file is believed after a crash; otherwise they begin now, so that nothing is
// evicted too early.
func (s *Store) rebuild(segs []*segment, oldDir string) {
	started, records, unread := time.Now(), 0, 0
	for _, seg := range segs {
		n, err := s.restoreAll(seg)
		if errors.Is(err, blob.ErrFull) {
			// The former index takes what the new one needs. Last uses count from now on.
			s.log.Warn("there is no room for a new index of the packs beside the former one, which is given up", "error", err)
			s.old.drop()
			n, err = s.restoreAll(seg)
		}
		records += n
		if errors.Is(err, ErrStopped) {
			return
		}
		if err != nil {
			// What is in it is missing until the next start can read it: nobody
			// gains from waiting for it.
			unread++
			seg.unread.Store(true)
			s.log.Error("making the index of the packs anew: a segment can't be read", "segment", seg.id, "error", err)
		}
	}
	err := s.old.close()
	if unread == 0 {
		err = errors.Join(err, os.RemoveAll(oldDir))
	}
	if err != nil {
		s.log.Error("removing the former index of the packs: it is made anew at the next start again", "error", err)
	}
	if len(segs) > 0 { // not at the first start
		s.log.Info("made the index of the packs anew", "records", records, "segments", len(segs), "duration", time.Since(started))
	}
	close(s.rebuilt)
}

// restoreAll puts the records of seg into the index, and counts them.
func (s *Store) restoreAll(seg *segment) (records int, err error) {
	err = s.scan(seg, func(l location, p *parsed, _ []byte) error {
		if p.dead {
			return nil
		}
		records++
		return s.restore(l, p)
	})
	return records, err
}

// drop gives up the tables of a former index, and the room that they take.
func (ix *index) drop() {
	for n := range ix.shard {
		sh := &ix.shard[n]
		sh.mu.Lock()
		if sh.t != nil {
			_, _ = sh.t.unmap(), os.Remove(ix.path(n)) // it is a copy of nothing that counts
		}
		sh.t = nil
		sh.mu.Unlock()
	}
}

// restore puts the record p, at l, into the index, if there is none that holds
// more than it.
func (s *Store) restore(l location, p *parsed) error {
	h := s.secret.hash(p.Key)
	use, ok := s.old.lastUse(h)
	if !ok {
		use = nowSeconds()
	}
	there, _, ok := s.index.look(h)
	if ok && there == l {
		return nil // by an attempt that did not come to the end of the segment
	}
	if ok && p.Mutable {
		written, err := s.writtenAt(there)
		if err != nil {
			return err
		}
		if written < p.written {
			if s.index.move(h, there, l) {
				return s.bury(there)
			}
		}
		return s.bury(l)
	}
	if ok {
		return nil
	}
	_, _, err := s.index.put(h, l, use, true)
	return err
}

// writtenAt is when the record at l, which is in the index, was written.
func (s *Store) writtenAt(l location) (int64, error) {
	raw := make([]byte, headerBytes)
	if err := s.read(l, raw); err != nil {
		return 0, fmt.Errorf("%w: %w", blob.ErrUnavailable, err)
	}
	return int64(binary.LittleEndian.Uint64(raw[8:])), nil //nolint:gosec // written as it was
}

// lastUse is the last use of h in Unix seconds.
func (ix *index) lastUse(h hashed) (uint32, bool) {
	_, use, ok := ix.look(h)
	return use, ok
}

// peek is find without a use.
func (ix *index) peek(h hashed) (location, uint32, error) {
	sh, _ := ix.of(h)
	sh.mu.RLock()
	closed := sh.closed
	sh.mu.RUnlock()
	if closed {
		return noRecord, 0, errClosed
	}
	l, use, ok := ix.look(h)
	if !ok || !ix.segs.holds(l) {
		return noRecord, 0, nil
	}
	return l, use, nil
}

// look returns where h is and when it was last used, and is no use.
func (ix *index) look(h hashed) (location, uint32, bool) {
	sh, _ := ix.of(h)
	sh.mu.RLock()
	defer sh.mu.RUnlock()
	if sh.t == nil {
		return noRecord, 0, false
	}
	i, ok := sh.t.find(h)
	if !ok {
		return noRecord, 0, false
	}
	return sh.t.location(i), sh.t.use(i), true
}
