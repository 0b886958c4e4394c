package pack

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
)

const (
	// shardBits: 128 tables grow each for itself, so that with ten million
	// records one that grows moves 78,000 slots, in some 2 ms, and only the
	// 128th part of the calls waits for it.
	shardBits = 7
	shards    = 1 << shardBits
)

// index knows where each record is and when it was last used. It is files that
// are mapped into memory: it is there at once at a start, survives the process,
// and the kernel takes its pages back where memory is short.
type index struct {
	dir   string
	check uint64
	segs  *segments
	grew  func(bytes int64)
	bytes atomic.Int64 // of the files
	shard [shards]shard
}

type shard struct {
	mu     sync.RWMutex // guards what follows; uses of slots are written under RLock
	t      *table       // nil: nothing was ever put here, or it is closed
	closed bool
	// counted says that the live bytes of the segments have those of this shard.
	counted bool
}

// openIndex maps what is in dir. Where a file of it is damaged the error wraps
// errBadTable.
func openIndex(dir string, check uint64, segs *segments, grew func(int64)) (*index, error) {
	ix := &index{dir: dir, check: check, segs: segs, grew: grew}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	for n := range ix.shard {
		if err := os.Remove(ix.path(n) + newSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, errors.Join(err, ix.close())
		}
		t, err := openTable(ix.path(n), n, check)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil, errors.Join(err, ix.close())
		}
		ix.shard[n].t = t
		ix.bytes.Add(t.bytes())
		grew(t.bytes())
	}
	return ix, nil
}

func (ix *index) path(n int) string { return filepath.Join(ix.dir, fmt.Sprintf("%02x", n)) }

// close unmaps all. Calls that come later fail.
func (ix *index) close() error {
	var err error
	for n := range ix.shard {
		sh := &ix.shard[n]
		sh.mu.Lock()
		if sh.t != nil {
			err = errors.Join(err, sh.t.unmap())
		}
		sh.t, sh.closed = nil, true
		sh.mu.Unlock()
	}
	return err
}

func (ix *index) of(h hashed) (*shard, int) {
	n := int(h.a >> (64 - shardBits)) //nolint:gosec // 7 bits
	return &ix.shard[n], n
}

var errClosed = fmt.Errorf("%w: it is closed", blob.ErrUnavailable)

// find returns where the record of h is, noRecord if there is none. A last use
// of staleAfter seconds ago or more, or from the future, becomes now.
func (ix *index) find(h hashed, now, staleAfter uint32) (location, error) {
	sh, _ := ix.of(h)
	sh.mu.RLock()
	defer sh.mu.RUnlock()
	if sh.t == nil {
		if sh.closed {
			return noRecord, errClosed
		}
		return noRecord, nil
	}
	i, ok := sh.t.find(h)
	if !ok {
		return noRecord, nil
	}
	l := sh.t.location(i)
	if !ix.segs.holds(l) {
		return noRecord, nil // somebody removed or cut its segment
	}
	if use := sh.t.use(i); now-use >= staleAfter && now != use {
		sh.t.setUse(i, now)
	}
	return l, nil
}

// put points h to l. A record that was there already stays where keep is true,
// if its segment is there: then put returns noRecord and false. Otherwise it
// returns where the record was that was replaced, if there was one.
func (ix *index) put(h hashed, l location, use uint32, keep bool) (old location, placed bool, err error) {
	sh, n := ix.of(h)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if sh.closed {
		return noRecord, false, errClosed
	}
	if sh.t != nil {
		if i, ok := sh.t.find(h); ok {
			old = sh.t.location(i)
			if keep && ix.segs.holds(old) {
				sh.t.setUse(i, use)
				return noRecord, false, nil
			}
			sh.t.setLocation(i, l)
			sh.t.setUse(i, use)
			sh.account(ix.segs, old, -old.bytes())
			sh.account(ix.segs, l, l.bytes())
			return old, true, nil
		}
	}
	if sh.t == nil || sh.t.full() {
		if err := ix.grow(sh, n); err != nil && (sh.t == nil || sh.t.quiteFull()) {
			return noRecord, false, err
		}
	}
	if !sh.t.insert(h, l, use) {
		// Its counts are not right: those of another table will be.
		if err := ix.grow(sh, n); err != nil {
			return noRecord, false, err
		}
		sh.t.insert(h, l, use) // half of its slots are free
	}
	sh.account(ix.segs, l, l.bytes())
	return noRecord, true, nil
}

// account tells the segment of l that n bytes more live, if those of the shard
// were counted. The caller holds the lock.
func (sh *shard) account(segs *segments, l location, n int64) {
	if sh.counted {
		segs.account(l, n)
	}
}

// grow gives the shard a table of which few more than half is taken. The caller
// holds its lock; this is the one call that does IO under it, of some MB into
// the page cache, each time that a shard has got half as many records again.
func (ix *index) grow(sh *shard, n int) error {
	slots := max(minSlots, sh.t.records()*15/7)
	t, err := newTable(ix.path(n), n, ix.check, slots, sh.t)
	if err != nil {
		return classify(err)
	}
	grew := t.bytes()
	if sh.t != nil {
		grew -= sh.t.bytes()
		if err := sh.t.unmap(); err != nil {
			return classify(err)
		}
	}
	sh.t = t
	ix.bytes.Add(grew)
	ix.grew(grew)
	return nil
}

// move points h from one location to another, and reports whether it still was
// at from. It is no use of the record.
func (ix *index) move(h hashed, from, to location) bool {
	sh, _ := ix.of(h)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	i, ok := sh.findAt(h, from)
	if !ok {
		return false
	}
	sh.t.setLocation(i, to)
	sh.account(ix.segs, from, -from.bytes())
	sh.account(ix.segs, to, to.bytes())
	return true
}

// remove forgets h, if it is at l, or wherever it is if l is noRecord, and
// returns where it was.
func (ix *index) remove(h hashed, l location) (location, bool) {
	sh, _ := ix.of(h)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if l == noRecord && sh.t != nil {
		if i, ok := sh.t.find(h); ok {
			l = sh.t.location(i)
		}
	}
	i, ok := sh.findAt(h, l)
	if ok {
		sh.drop(ix.segs, i)
	}
	return l, ok
}

// removeOld forgets h if it is at l and was last used before then. It reports
// whether it is not at l any more.
func (ix *index) removeOld(h hashed, l location, then time.Time) bool {
	sh, _ := ix.of(h)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	i, ok := sh.findAt(h, l)
	if ok && !lastUse(sh.t.use(i)).Before(then) {
		return false
	}
	if ok {
		sh.drop(ix.segs, i)
	}
	return true
}

// at reports whether h is at l.
func (ix *index) at(h hashed, l location) (use uint32, ok bool) {
	sh, _ := ix.of(h)
	sh.mu.RLock()
	defer sh.mu.RUnlock()
	i, ok := sh.findAt(h, l)
	if ok {
		use = sh.t.use(i)
	}
	return use, ok
}

// findAt returns the slot of h if it points to l. The caller holds the lock.
func (sh *shard) findAt(h hashed, l location) (uint64, bool) {
	if sh.t == nil {
		return 0, false
	}
	i, ok := sh.t.find(h)
	return i, ok && sh.t.location(i) == l
}

// drop forgets slot i. The caller holds the lock.
func (sh *shard) drop(segs *segments, i uint64) {
	l := sh.t.location(i)
	sh.t.drop(i)
	sh.account(segs, l, -l.bytes())
}

// count adds up what lives in each segment, once, and forgets slots whose
// segments are not there. It holds one shard at a time, for less than a ms.
func (ix *index) count(done <-chan struct{}) error {
	for n := range ix.shard {
		if stopped(done) {
			return ErrStopped
		}
		ix.shard[n].count(ix.segs)
	}
	return nil
}

func (sh *shard) count(segs *segments) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if sh.counted {
		return
	}
	for i := range sh.t.length() {
		if l := sh.t.location(i); l.isRecord() {
			if segs.holds(l) {
				segs.account(l, l.bytes())
			} else {
				sh.t.drop(i)
			}
		}
	}
	sh.counted = true
}

// records is the number of records, nearly.
func (ix *index) records() (n int64) {
	for i := range ix.shard {
		sh := &ix.shard[i]
		sh.mu.RLock()
		if sh.t != nil {
			n += int64(sh.t.live()) //nolint:gosec // far below 2^63
		}
		sh.mu.RUnlock()
	}
	return n
}
