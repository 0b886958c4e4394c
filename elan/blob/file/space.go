package file

import (
	"context"
	"fmt"
	"math"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// maxDefaultFree is the most that is left free where Options do not say.
const maxDefaultFree = 2 << 30

// space counts what the store takes, and decides whether there is room. What is
// about to be written is counted from the moment that it is announced.
type space struct {
	dir     string
	max     int64 // of used; math.MaxInt64 where there is no bound
	spare   int64 // what is over max for the moment that cleaning a pack takes
	total   int64 // size of the file system
	minFree int64

	kick chan struct{} // wakes the goroutine that evicts; one token says all

	mu      sync.Mutex // guards what follows
	used    int64      // files of this store, in whole blocks
	files   int64      // how many these are, about; a replaced one may be counted twice
	pending int64      // the part of used whose files are not in place yet
	moved   int64      // bytes that came or went, ever: see correct
	// free is the free disk space at the last refresh, less what was announced
	// since. The kernel has the last word: ENOSPC is ErrFull too.
	free   int64
	wanted int64         // bytes that writers wait for
	passed chan struct{} // closed at the end of the next eviction pass to begin
	// hopeless is until when another pass would be in vain.
	hopeless time.Time
}

// spaceState is what space knows at one moment.
type spaceState struct{ used, pending, moved, free, files int64 }

func (sp *space) state() spaceState {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	return spaceState{used: sp.used, pending: sp.pending, moved: sp.moved, free: sp.free, files: sp.files}
}

func (sp *space) init(dir string, maxBytes, minFree int64) error {
	sp.dir, sp.max, sp.minFree = dir, maxBytes, minFree
	if maxBytes == 0 {
		sp.max = math.MaxInt64
	}
	sp.kick = make(chan struct{}, 1)
	sp.passed = make(chan struct{})
	var err error
	if sp.total, err = sp.refresh(); err != nil {
		return err
	}
	switch {
	case minFree == 0:
		sp.minFree = min(sp.total/20, maxDefaultFree)
	case minFree < 0:
		sp.minFree = 0
	}
	return nil
}

// refresh asks the kernel for the free disk space: statfs. It returns the size
// of the file system.
func (sp *space) refresh() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(sp.dir, &st); err != nil {
		return 0, err
	}
	sp.mu.Lock()
	defer sp.mu.Unlock()
	sp.free = int64(st.Bavail) * st.Bsize   //nolint:gosec // far below 2^63
	return int64(st.Blocks) * st.Bsize, nil //nolint:gosec // as above
}

// bound is what the store takes at most, for people.
func (sp *space) bound() float64 {
	if sp.max == math.MaxInt64 {
		return math.MaxInt64
	}
	return float64(sp.max + sp.spare)
}

// high and low are where eviction begins and ends, so that writers seldom wait
// for it and one pass over the folders frees much.
func (sp *space) high() int64 { return sp.max - sp.max/20 }
func (sp *space) low() int64  { return sp.max - sp.max/10 }

// add counts a file of n bytes that is there, room or not.
func (sp *space) add(n int64) {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	sp.addBytes(n)
	if n < 0 {
		sp.files--
	} else {
		sp.files++
	}
}

// addBytes counts n bytes that are no file of their own. The caller holds mu.
func (sp *space) addBytes(n int64) {
	sp.used += n
	sp.free -= n
	sp.moved += max(n, -n)
}

// grow counts n bytes by which the packs are larger, room or not.
func (sp *space) grow(n int64) {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	sp.addBytes(n)
}

// release takes back a file of n bytes that is gone.
func (sp *space) release(n int64) { sp.add(-n) }

// tryReserve counts n bytes if there is room for them.
func (sp *space) tryReserve(n int64) bool {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	if sp.used+n > sp.max || sp.free-n < sp.minFree {
		return false
	}
	sp.used += n
	sp.free -= n
	sp.pending += n
	if sp.used > sp.high() {
		sp.wake()
	}
	return true
}

// settle says that n bytes that were reserved are in place, and cancel that they
// will not come.
func (sp *space) settle(n int64) {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	sp.pending -= n
	sp.moved += n
	sp.files++
}

// settleBytes is settle for what is no file of its own.
func (sp *space) settleBytes(n int64) {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	sp.pending -= n
	sp.moved += n
}

func (sp *space) cancel(n int64) {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	sp.pending -= n
	sp.used -= n
	sp.free += n
}

// correct takes note that a walk, which began at state before, found so many
// bytes in place. What came and went during the walk, or is about to be settled,
// may have been seen or not, so that only a larger difference is a mistake.
func (sp *space) correct(before spaceState, found int64) {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	diff, moved := found-(before.used-before.pending), sp.moved-before.moved+sp.pending
	switch {
	case diff > moved:
		sp.used += diff - moved
	case diff < -moved:
		sp.used += diff + moved
	}
}

// deficit is how many bytes to evict so that n more can be written and some
// more room is left, so that the next pass is not due at once. It is 0 or less
// where nothing is to be done. The caller holds mu.
func (sp *space) deficit(n int64) int64 {
	var need int64
	if used := sp.used + n; used > sp.high() {
		need = max(used-sp.max, sp.used-sp.low())
	}
	if free := sp.free - n; free < sp.minFree {
		need = max(need, sp.minFree+sp.minFree/20-free)
	}
	return need
}

// capacity is what would fit if the store were empty.
func (sp *space) capacity() int64 {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	return min(sp.max, max(sp.used+sp.free-sp.minFree, 0))
}

// fits returns an error that wraps ErrTooLarge for a size in bytes that even the
// empty store had no room for.
func (sp *space) fits(size int64) error {
	if n, room := onDisk(size), sp.capacity(); n > room || n < size {
		return fmt.Errorf("%w: %d bytes, and the store holds %d", blob.ErrTooLarge, size, room)
	}
	return nil
}

func (sp *space) wake() {
	select {
	case sp.kick <- struct{}{}:
	default: // a token is there already
	}
}

// want asks for n bytes. The channel is closed when an eviction pass that knew
// of it has ended; nil says that it would be in vain.
func (sp *space) want(n int64) <-chan struct{} {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	if time.Now().Before(sp.hopeless) {
		return nil
	}
	sp.wanted += n
	sp.wake()
	return sp.passed
}

// reserveBlob is reserve for d, with the folders that it needs.
func (s *Store) reserveBlob(ctx context.Context, d digest.Digest) error {
	if err := s.prepare(ctx, d.Function()); err != nil {
		return err
	}
	return s.reserve(ctx, d.Size())
}

// reserve counts a file of size bytes that is about to be written, after
// evicting others if that is needed and allowed. The error wraps ErrTooLarge or
// ErrFull, or is the context's.
func (s *Store) reserve(ctx context.Context, size int64) error {
	// What would not fit into the empty store is not worth evicting a byte for.
	if err := s.space.fits(size); err != nil {
		return err
	}
	return s.reserveBytes(ctx, onDisk(size))
}

// reserveBytes is reserve for n bytes as they are counted, far fewer than the
// store has.
func (s *Store) reserveBytes(ctx context.Context, n int64) error {
	// A pass may free too little where others write at the same time.
	for range 3 {
		if s.space.tryReserve(n) {
			return nil
		}
		passed := s.space.want(n)
		if passed == nil {
			break
		}
		select {
		case <-passed:
		case <-ctx.Done():
			return ctx.Err()
		case <-s.closing:
			return fmt.Errorf("%w: it is closed", blob.ErrUnavailable)
		}
	}
	if s.space.tryReserve(n) {
		return nil
	}
	now := s.space.state()
	of := ""
	if s.space.max < math.MaxInt64 {
		of = fmt.Sprintf(" of %d", s.space.max)
	}
	return s.refuse(fmt.Errorf("%w: nothing is older than the minimal lifetime of %v; %d%s bytes used, %d free on the disk, %d to be left free",
		blob.ErrFull, s.minLifetime, now.used, of, now.free, s.space.minFree))
}
