//go:build linux

package inputroot

import (
	"slices"

	"github.com/mettle-build/mettle/elan/digest"
)

// plan is what is to be done to make one root of another, or of nothing: a step for
// each directory that changes, parents first.
type plan struct {
	t     *loaded
	steps []step
}

// step is what changes in one directory. What stands in its way is removed before
// anything is made.
type step struct {
	path string
	node *node
	// make says that there is no directory yet. It is not set for the root.
	make     bool
	old      *node // what the indices of the next two lines are of
	unlink   []int // files
	unlinkSy []int // symlinks
	remove   []int // children, with all that is in them
	files    []int // of node.dir, to be made
	symlinks []int // likewise
}

// directory plans the directory at path, of which old is there; nil is nothing. It
// changes nothing of old, but what it returns shares the nodes that stay.
func (p *plan) directory(path string, old *node, d digest.Digest, want *directory, isNew bool) *node {
	if old != nil && old.digest == d && old.whole {
		return old
	}
	n := &node{
		digest: d, dir: want, whole: true, entries: p.t.entriesBelow(want),
		files: make([]fileState, len(want.files)), symlinks: make([]uint64, len(want.symlinks)), children: make([]*node, len(want.children)),
	}
	s := step{path: path, node: n, make: isNew, old: old}
	if old == nil {
		s.files, s.symlinks = upTo(len(want.files)), upTo(len(want.symlinks))
	} else {
		n.stamp, n.sure = old.stamp, old.sure
		s.compare(want)
	}
	at := len(p.steps)
	p.steps = append(p.steps, s)
	changed := old == nil || len(s.unlink)+len(s.unlinkSy)+len(s.files)+len(s.symlinks) > 0
	i := 0
	for j, c := range want.children {
		var there *node
		for ; old != nil && i < len(old.children) && old.dir.children[i].name <= c.name; i++ {
			switch {
			case old.children[i] == nil:
			case old.dir.children[i].name == c.name:
				there = old.children[i]
			default:
				p.steps[at].remove = append(p.steps[at].remove, i)
			}
		}
		changed = changed || there == nil
		n.children[j] = p.directory(path+"/"+c.name, there, c.digest, p.t.all[c.digest], there == nil)
	}
	for ; old != nil && i < len(old.children); i++ {
		if old.children[i] != nil {
			p.steps[at].remove = append(p.steps[at].remove, i)
		}
	}
	if !changed && len(p.steps[at].remove) == 0 {
		p.steps[at].node = nil // only what is below it changes
	}
	return n
}

func upTo(n int) []int {
	if n == 0 {
		return nil
	}
	l := make([]int, n)
	for i := range l {
		l[i] = i
	}
	return l
}

// compare finds which files and symlinks change.
func (s *step) compare(want *directory) {
	old, n := s.old, s.node
	i := 0
	for j := range want.files {
		f := &want.files[j]
		for ; i < len(old.files) && old.dir.files[i].name < f.name; i++ {
			s.unlinkFile(i)
		}
		if i < len(old.files) && old.dir.files[i].name == f.name {
			if old.files[i].ino != 0 && sameFile(&old.dir.files[i], f) {
				n.files[j] = old.files[i]
				i++
				continue
			}
			s.unlinkFile(i)
			i++
		}
		s.files = append(s.files, j)
	}
	for ; i < len(old.files); i++ {
		s.unlinkFile(i)
	}
	i = 0
	for j, l := range want.symlinks {
		for ; i < len(old.symlinks) && old.dir.symlinks[i].Name < l.Name; i++ {
			s.unlinkSymlink(i)
		}
		if i < len(old.symlinks) && old.dir.symlinks[i].Name == l.Name {
			if old.symlinks[i] != 0 && old.dir.symlinks[i].Target == l.Target {
				n.symlinks[j] = old.symlinks[i]
				i++
				continue
			}
			s.unlinkSymlink(i)
			i++
		}
		s.symlinks = append(s.symlinks, j)
	}
	for ; i < len(old.symlinks); i++ {
		s.unlinkSymlink(i)
	}
}

func (s *step) unlinkFile(i int) {
	if s.old.files[i].ino != 0 {
		s.unlink = append(s.unlink, i)
	}
}

func (s *step) unlinkSymlink(i int) {
	if s.old.symlinks[i] != 0 {
		s.unlinkSy = append(s.unlinkSy, i)
	}
}

// made counts what is to be made.
func (p *plan) made() (n int) {
	for i := range p.steps {
		s := &p.steps[i]
		if n += len(s.files) + len(s.symlinks); s.make {
			n++
		}
	}
	return n
}

// newFiles are the digests of all files that are to be made, each once.
func (p *plan) newFiles() []digest.Digest {
	var ds []digest.Digest
	for i := range p.steps {
		s := &p.steps[i]
		if s.node == nil {
			continue
		}
		ds = slices.Grow(ds, len(s.files))
		for _, j := range s.files {
			ds = append(ds, s.node.dir.files[j].digest)
		}
	}
	return unique(ds)
}
