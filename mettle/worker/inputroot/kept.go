//go:build linux

package inputroot

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// KeepFor is how long a root serves again. Its links are as old as it is: by making
// them anew now and then the store hears that the blobs are in use, and what it has
// found to be damaged since goes away. Who has no work for as long drops all roots.
const KeepFor = 15 * time.Minute

const (
	// minKeptFiles is from how many files on an input root is kept: below, to look
	// at it costs as much as to make it.
	minKeptFiles = 4
	// maxKeptRoots and maxKeptEntries bound the input roots that a shelf keeps, by
	// their files, directories and symlinks: each is a name on the disk and some 100
	// bytes of memory.
	maxKeptRoots   = 8
	maxKeptEntries = 100_000
	// maxKeptCopies bounds the bytes of one kept root's files that are not links,
	// and so take room of their own.
	maxKeptCopies = 64 << 20
	// maxCompared bounds the entries that are compared to choose a root: a
	// millisecond.
	maxCompared = 30_000
)

// kept is an input root that was built and stays, after its command, for the next
// ones.
type kept struct {
	builder *Builder // a job sees nothing of another instance's
	name    string   // on the shelf; "" while it is in use
	dir     string   // while it is in use
	root    *node
	links   map[link]struct{}
	begun   time.Time // before the first of the links
	copies  int64     // bytes of files that are not links
	// unsure are the nodes whose stamps a change within the same tick of the
	// kernel's clock would leave as they are.
	unsure []*node
}

// node is a directory of a kept root: what of the Directory dir is in it.
type node struct {
	digest   digest.Digest
	dir      *directory
	files    []fileState // those of dir, in its order
	symlinks []uint64    // inodes; 0: it is not there
	children []*node     // nil: it is not there
	entries  int         // of dir, and below
	whole    bool        // all of it is there, and all that is below
	stamp    stamp
	// sure says that what changes an entry changes the stamp.
	sure bool
}

// fileState is what is known of a file of a kept root.
type fileState struct {
	ino    uint64 // 0: it is not there
	linked bool   // it is a link to the store's
	// Where commands are the worker's own user, in nanoseconds. A ctime of 0 does not
	// tell whether the file was changed.
	mtime, ctime int64
}

// stamp is what tells that a directory was not changed: nobody can set its ctime.
type stamp struct {
	dev, ino, nlink  uint64
	mode, uid, gid   uint32
	mtimeNS, ctimeNS int64
}

func stampOf(st *unix.Stat_t) stamp {
	return stamp{
		dev: st.Dev, ino: st.Ino, nlink: uint64(st.Nlink), //nolint:unconvert // 32 bits on some machines
		mode: st.Mode, uid: st.Uid, gid: st.Gid, mtimeNS: st.Mtim.Nano(), ctimeNS: st.Ctim.Nano(),
	}
}

// mark notes what n is like now.
func (k *kept) mark(n *node, st *unix.Stat_t) {
	n.stamp, n.sure = stampOf(st), false
	k.unsure = append(k.unsure, n)
}

// tick is the time that changes of files are stamped with, where the kernel has
// none that is finer (before 6.13).
func tick() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &ts); err != nil {
		return 0
	}
	return ts.Nano()
}

// settle is called when the root is ready and before anything else changes it.
func (k *kept) settle() {
	now := tick()
	for _, n := range k.unsure {
		n.sure = n.stamp.ctimeNS < now
		for i := range n.files {
			if n.files[i].ctime >= now {
				n.files[i].ctime = 0
			}
		}
	}
	k.unsure = k.unsure[:0]
}

// forget is called for what is removed from the root.
func (k *kept) forget(n *node) {
	if n == nil {
		return
	}
	for i := range n.files {
		k.forgetFile(n, i)
	}
	for _, c := range n.children {
		k.forget(c)
	}
}

func (k *kept) forgetFile(n *node, i int) {
	f := &n.files[i]
	switch {
	case f.ino == 0:
	case f.linked:
		delete(k.links, linkOf(&n.dir.files[i]))
	default:
		k.copies -= n.dir.files[i].digest.Size()
	}
	*f = fileState{}
}

func linkOf(f *fileNode) link { return link{f.digest, f.mode} }

// isOld reports whether the root is not to serve again.
func (k *kept) isOld() bool { return time.Since(k.begun) > KeepFor }

// isReliable reports whether the file system of fd is one of which it is known
// that each change of a directory changes its ctime, at once and for all to see.
func isReliable(fd int) bool {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return false
	}
	switch uint32(st.Type) { //nolint:gosec // the magic has 32 bits
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC, unix.OVERLAYFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC:
		return true
	}
	return false
}

// nearest is the kept root from which the one of t is made with the fewest
// changes, and how many they are. It is nil where a new one takes no more.
func (s *Shelf) nearest(b *Builder, t *loaded, d digest.Digest) (*kept, int) {
	var best *kept
	c := comparison{t: t, budget: maxCompared, best: t.entries}
	for i := len(s.kept) - 1; i >= 0 && c.budget > 0; i-- {
		k := s.kept[i]
		if k.builder != b || k.isOld() {
			continue
		}
		c.changes = 0
		c.directory(k.root, d, t.root)
		if c.changes < c.best {
			best, c.best = k, c.changes
		}
		if c.best == 0 {
			break
		}
	}
	return best, c.best
}

// comparison counts what is to be removed and made.
type comparison struct {
	t       *loaded
	budget  int
	changes int
	best    int // no need to count further
}

func (c *comparison) directory(n *node, d digest.Digest, want *directory) {
	if n.digest == d && n.whole {
		return
	}
	if c.budget -= len(n.dir.files) + len(want.files) + len(want.children); c.budget < 0 {
		c.changes = c.best
	}
	if c.changes >= c.best {
		return
	}
	i := 0
	for j := range want.files {
		for i < len(n.files) && n.dir.files[i].name < want.files[j].name {
			c.changes++
			i++
		}
		if i < len(n.files) && n.dir.files[i].name == want.files[j].name {
			if n.files[i].ino == 0 || !sameFile(&n.dir.files[i], &want.files[j]) {
				c.changes++
			}
			i++
			continue
		}
		c.changes++
	}
	c.changes += len(n.files) - i
	c.children(n, want)
}

func (c *comparison) children(n *node, want *directory) {
	i := 0
	for _, w := range want.children {
		for i < len(n.children) && n.dir.children[i].name < w.name {
			c.gone(n.children[i])
			i++
		}
		child := c.t.all[w.digest]
		if i < len(n.children) && n.dir.children[i].name == w.name {
			if n.children[i] != nil {
				c.directory(n.children[i], w.digest, child)
			} else {
				c.changes += 1 + c.t.sizes[child].entries
			}
			i++
			continue
		}
		c.changes += 1 + c.t.sizes[child].entries
	}
	for ; i < len(n.children); i++ {
		c.gone(n.children[i])
	}
}

func (c *comparison) gone(n *node) {
	if n != nil {
		c.changes += 1 + n.entries
	}
}

func sameFile(a, b *fileNode) bool { return a.mode == b.mode && a.digest == b.digest }

// permOf are the permissions of a linked file.
func permOf(mode blob.LinkMode) uint32 {
	if mode == blob.LinkExecutable {
		return 0o555
	}
	return 0o444
}
