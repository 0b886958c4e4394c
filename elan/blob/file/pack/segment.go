package pack

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	segmentSuffix = ".seg"
	newSuffix     = ".new" // of files about to get their name
	// segmentHead is what each segment begins with: words for people who look
	// into it, and the reason that no record is at 0.
	segmentHead = "mettle pack 1: records of a file store, see its README.md      \n"
	firstRecord = int64(len(segmentHead))
	// maxOpen bounds the segments that are held open while nobody uses them: 32
	// GiB of the largest. Opening one takes some µs.
	maxOpen = 512
)

// segment is one append-only file.
type segment struct {
	id   uint32
	path string
	// size is up to where it is taken, in bytes; what is below it may not be
	// written yet.
	size atomic.Int64
	// live is the bytes of the records that the index points to. Until the index
	// was counted it is too low.
	live atomic.Int64
	// writers are those who took room and have not yet told the index.
	writers atomic.Int64
	// unread says that the index was made anew without it, since it could not be
	// read. That the index points to nothing in it says nothing then: it stays for
	// the next start.
	unread atomic.Bool

	mu   sync.Mutex // guards what follows
	fd   int        // -1: not open
	refs int        // who uses fd
	gone bool       // removed: it can't be opened any more
}

// errGone says that a segment was removed: the record is elsewhere, or nowhere.
var errGone = errors.New("the segment is gone")

// segments are all that there are.
type segments struct {
	dir     string
	grew    func(bytes int64)                   // called with the heads of new segments
	current atomic.Pointer[map[uint32]*segment] // replaced whole, under mu
	open    atomic.Int64                        // file descriptors

	mu   sync.Mutex // guards what follows
	next uint32     // no segment has this id or a higher one, until they wrap around
}

// load lists the segments in dir: getdents64, newfstatat for each.
func (ss *segments) load(dir string) error {
	ss.dir, ss.next = dir, 1
	all := make(map[uint32]*segment)
	names, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range names {
		stem, ok := strings.CutSuffix(e.Name(), segmentSuffix)
		id, err := strconv.ParseUint(stem, 10, segBits)
		if !ok || err != nil {
			continue
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		seg := &segment{id: uint32(id), path: filepath.Join(dir, e.Name()), fd: -1} //nolint:gosec // 26 bits
		// Records begin at multiples of 8 whatever a full disk left.
		seg.size.Store(min(max((info.Size()+recordAlign-1)&^(recordAlign-1), firstRecord), MaxSegmentBytes))
		all[seg.id] = seg
		ss.grew(seg.size.Load())
		ss.next = max(ss.next, seg.id+1)
	}
	ss.current.Store(&all)
	return nil
}

func (ss *segments) all() map[uint32]*segment { return *ss.current.Load() }

// holds reports whether l lies within a segment that is there.
func (ss *segments) holds(l location) bool {
	seg := ss.all()[l.segment()]
	return seg != nil && l.offset()+l.bytes() <= seg.size.Load()
}

// account adds n bytes to what lives in the segment of l, if it is there.
func (ss *segments) account(l location, n int64) {
	if seg := ss.all()[l.segment()]; seg != nil {
		seg.live.Add(n)
	}
}

// sums are the bytes of all segments, and those of them that live.
func (ss *segments) sums() (size, live int64) {
	for _, seg := range ss.all() {
		size += seg.size.Load()
		live += seg.live.Load()
	}
	return size, live
}

// create makes an empty segment: openat, write.
func (ss *segments) create() (*segment, error) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	all := ss.all()
	for ss.next > maxSegmentID || all[ss.next] != nil {
		if ss.next++; ss.next > maxSegmentID {
			ss.next = 1
		}
	}
	seg := &segment{id: ss.next, path: filepath.Join(ss.dir, fmt.Sprintf("%08d%s", ss.next, segmentSuffix))}
	fd, err := openFile(seg.path, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR)
	if err == nil {
		if err = pwriteFull(fd, []byte(segmentHead), 0); err != nil {
			_, _ = unix.Close(fd), unix.Unlink(seg.path)
		}
	}
	if err != nil {
		return nil, classify(err)
	}
	seg.fd = fd
	seg.size.Store(firstRecord)
	if ss.open.Add(1) > maxOpen {
		ss.closeAnother(seg)
	}
	ss.next++
	more := maps.Clone(all)
	more[seg.id] = seg
	ss.current.Store(&more)
	ss.grew(firstRecord)
	return seg, nil
}

// remove takes seg away: unlinkat. Who reads it goes on reading.
func (ss *segments) remove(seg *segment) error {
	ss.mu.Lock()
	less := maps.Clone(ss.all())
	delete(less, seg.id)
	ss.current.Store(&less)
	ss.mu.Unlock()
	seg.mu.Lock()
	seg.gone = true
	ss.closeIdle(seg)
	seg.mu.Unlock()
	if err := unix.Unlink(seg.path); err != nil && !errors.Is(err, unix.ENOENT) {
		return classify(err)
	}
	return nil
}

// acquire opens seg if it is not open, for reading and writing; release follows.
// The error is errGone, or wraps blob.ErrUnavailable.
func (ss *segments) acquire(seg *segment) (fd int, err error) {
	seg.mu.Lock()
	defer seg.mu.Unlock()
	if seg.fd < 0 {
		if seg.gone {
			return -1, errGone
		}
		if seg.fd, err = openFile(seg.path, unix.O_RDWR); err != nil {
			seg.fd = -1
			return -1, classify(err)
		}
		if ss.open.Add(1) > maxOpen {
			ss.closeAnother(seg)
		}
	}
	seg.refs++
	return seg.fd, nil
}

func (ss *segments) release(seg *segment) {
	seg.mu.Lock()
	defer seg.mu.Unlock()
	if seg.refs--; seg.gone {
		ss.closeIdle(seg)
	}
}

// closeIdle closes seg if nobody uses it. The caller holds its mutex.
func (ss *segments) closeIdle(seg *segment) {
	if seg.refs == 0 && seg.fd >= 0 {
		_ = unix.Close(seg.fd) // what was written is the kernel's already
		seg.fd = -1
		ss.open.Add(-1)
	}
}

// closeAnother closes some segment that nobody uses. The caller holds the mutex
// of opened.
func (ss *segments) closeAnother(opened *segment) {
	for _, seg := range ss.all() { // maps are ranged over in random order
		if seg == opened || !seg.mu.TryLock() {
			continue
		}
		closed := seg.refs == 0 && seg.fd >= 0
		ss.closeIdle(seg)
		seg.mu.Unlock()
		if closed {
			return
		}
	}
}

// closeAll closes what is open. Nobody uses it any more.
func (ss *segments) closeAll() {
	for _, seg := range ss.all() {
		seg.mu.Lock()
		seg.gone = true // whoever comes too late can't open it
		ss.closeIdle(seg)
		seg.mu.Unlock()
	}
}

// head is where records are appended: one for those that come in, and one for
// those that cleaning moves, so that old ones gather with old ones.
type head struct {
	mu  sync.Mutex // guards seg and the growing of its size
	seg *segment   // nil: the next record makes one
}

// reserve takes n bytes at the end of h's segment. The caller calls done after
// the index was told. A new segment is made under the lock, because no other
// writer could go on without it.
func (ss *segments) reserve(h *head, n, segmentBytes int64) (*segment, int64, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.seg == nil || h.seg.size.Load()+n > segmentBytes {
		seg, err := ss.create()
		if err != nil {
			return nil, 0, err
		}
		h.seg = seg
	}
	h.seg.writers.Add(1)
	off := h.seg.size.Load()
	h.seg.size.Store(off + n)
	return h.seg, off, nil
}

// giveBack undoes reserve where the bytes could not be written and nobody has
// taken room after them.
func (ss *segments) giveBack(h *head, seg *segment, off, n int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.seg == seg {
		seg.size.CompareAndSwap(off+n, off)
	}
}

func (h *head) is(seg *segment) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.seg == seg
}
