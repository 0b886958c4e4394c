//go:build linux

package image

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// layer is one that is unpacked.
type layer struct {
	diff    v1.Hash
	dir     string // tree and info are in it
	bytes   int64
	entries int
	pins    int       // who uses it; guarded by Cache.mu, as is used
	used    time.Time // last
}

func (l *layer) tree() string { return filepath.Join(l.dir, treeName) }

// What is in the directory of the cache, and of a layer.
const (
	treeName   = "tree"
	infoName   = "info"
	stateName  = "state"
	lockName   = "lock"
	partSuffix = ".part"
)

// info is a layer's info file. The time of its last change is that of the layer's
// last use.
type info struct {
	DiffID  v1.Hash
	Bytes   int64
	Entries int
	// Form is that of the tree, formVersion if it is ours.
	Form int
}

// formVersion changes when trees that older versions of this program unpacked are
// not what this one would unpack.
const formVersion = 1

// state is the state file: whether everything below the directory has reached the
// disk, or else since which start of the machine it may not have.
type state struct {
	Boot  string
	Clean bool
}

// open takes the directory and finds out what is in it.
func (c *Cache) open() error {
	for _, dir := range []string{c.o.Dir, c.layersDir(), c.imagesDir()} {
		// Nobody else looks into it: it is full of what other machines sent.
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	var err error
	if c.lock, err = os.OpenFile(filepath.Join(c.o.Dir, lockName), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	if err := unix.Flock(int(c.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errors.New("another worker uses it")
		}
		return errors.Join(err, c.lock.Close())
	}
	if err := c.restore(); err != nil {
		return errors.Join(err, c.lock.Close())
	}
	return nil
}

// restore reads what an earlier process left, and removes what is of no use.
func (c *Cache) restore() error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	var was state
	if data, err := os.ReadFile(filepath.Join(c.o.Dir, stateName)); err != nil || json.Unmarshal(data, &was) != nil || !was.Clean && was.Boot != boot {
		for _, dir := range []string{c.layersDir(), c.imagesDir()} {
			if err := empty(dir, func(string) bool { return true }); err != nil {
				return err
			}
		}
	}
	if err := c.writeState(state{Boot: boot}); err != nil {
		return err
	}
	if err := empty(c.layersDir(), func(name string) bool { return strings.HasSuffix(name, partSuffix) }); err != nil {
		return err
	}
	entries, err := os.ReadDir(c.layersDir())
	if err != nil {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(c.layersDir(), e.Name())
		l := readLayer(dir)
		if l == nil || c.layers[l.diff] != nil {
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
			continue
		}
		c.layers[l.diff] = l
		c.used += l.bytes
	}
	c.readRecords()
	c.mu.Lock()
	gone := c.evict(0)
	c.mu.Unlock()
	if c.white, err = findWhiteouts(c.o.Dir); err != nil {
		return err
	}
	return c.remove(gone)
}

func bootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(data)), err
}

func empty(dir string, which func(name string) bool) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if which(e.Name()) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

// readLayer is the layer in a directory, nil if there is none that is whole.
func readLayer(dir string) *layer {
	data, err := os.ReadFile(filepath.Join(dir, infoName))
	if err != nil {
		return nil
	}
	var i info
	if json.Unmarshal(data, &i) != nil || i.Form != formVersion || i.Bytes < 0 || i.DiffID.Algorithm == "" {
		return nil
	}
	st, err := os.Stat(filepath.Join(dir, infoName))
	if err != nil {
		return nil
	}
	return &layer{diff: i.DiffID, dir: dir, bytes: i.Bytes, entries: i.Entries, used: st.ModTime()}
}

// writeState writes the state so that it is on the disk before anything that
// follows.
//
//	open, write, fsync, rename, fsync of the directory
func (c *Cache) writeState(s state) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	path := filepath.Join(c.o.Dir, stateName)
	f, err := os.OpenFile(path+partSuffix, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+partSuffix, path); err != nil {
		return err
	}
	dir, err := os.Open(c.o.Dir)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// settle has the disk take all, so that a start after the machine's next one finds
// it.
func (c *Cache) settle() error {
	if err := unix.Syncfs(int(c.lock.Fd())); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	boot, err := bootID()
	if err != nil {
		return err
	}
	return c.writeState(state{Boot: boot, Clean: true})
}

// pin returns the layer if it is there, which stays then until unpin.
func (c *Cache) pin(diff v1.Hash) *layer {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.layers[diff]
	if l != nil {
		l.pins++
		l.used = time.Now()
	}
	return l
}

func (c *Cache) unpin(ls []*layer) {
	now := time.Now()
	c.mu.Lock()
	for _, l := range ls {
		l.pins--
		l.used = now
	}
	c.mu.Unlock()
	for _, l := range ls {
		_ = os.Chtimes(filepath.Join(l.dir, infoName), time.Time{}, now) // for the order after a restart
	}
}

// reserve makes room for n bytes that are about to be written.
func (c *Cache) reserve(n int64) error {
	c.mu.Lock()
	if c.used+n <= c.o.MaxBytes {
		c.used += n
		c.mu.Unlock()
		return nil
	}
	gone := c.evict(n)
	fits := c.used+n <= c.o.MaxBytes
	if fits {
		c.used += n
	}
	c.mu.Unlock()
	err := c.remove(gone)
	if err == nil && !fits {
		err = fmt.Errorf("%w: the cache of %d bytes is full of images that are in use", ErrFull, c.o.MaxBytes)
	}
	return err
}

// release gives room back that was reserved.
func (c *Cache) release(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.used -= n
}

// evict forgets layers, those that were not used for the longest time first, until
// there is room for n bytes, and returns them for remove; none, if that is not
// enough. The mutex is held.
func (c *Cache) evict(n int64) []*layer {
	over := c.used + n - c.o.MaxBytes
	if over <= 0 {
		return nil
	}
	var idle []*layer
	for _, l := range c.layers {
		if l.pins == 0 {
			idle = append(idle, l)
		}
	}
	slices.SortFunc(idle, func(a, b *layer) int { return a.used.Compare(b.used) })
	for i, l := range idle {
		if over -= l.bytes; over <= 0 {
			idle = idle[:i+1]
			break
		}
	}
	if over > 0 && n > 0 {
		return nil
	}
	for _, l := range idle {
		delete(c.layers, l.diff)
		c.used -= l.bytes
	}
	return idle
}

// remove removes layers that are forgotten from the disk.
func (c *Cache) remove(ls []*layer) error {
	var err error
	for _, l := range ls {
		c.metrics.layers.WithLabelValues("evicted").Inc()
		c.o.Logger.Info("a layer of container images was evicted", "diff_id", l.diff.String(), "bytes", l.bytes)
		// First out of the way, or a half of it could be taken for a whole one.
		gone := l.dir + partSuffix
		if e := os.Rename(l.dir, gone); e != nil {
			err = errors.Join(err, e)
			continue
		}
		err = errors.Join(err, os.RemoveAll(gone))
	}
	return err
}

// newPart makes the directory that a layer is unpacked to.
func (c *Cache) newPart(diff v1.Hash) (string, error) {
	dir := filepath.Join(c.layersDir(), diff.Hex+"-"+strings.ToLower(rand.Text())+partSuffix)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	tree := filepath.Join(dir, treeName)
	if err := os.Mkdir(tree, dirMode); err != nil { //nolint:gosec // its parent lets nobody in
		return "", err
	}
	return dir, os.Chmod(tree, dirMode) //nolint:gosec // likewise
}

// errThere: another pull of the layer, which nobody waited for any more, came to its
// end all the same.
var errThere = errors.New("the layer is there")

// keep makes a part a layer of the cache. Its bytes are reserved already.
//
//	open, write, close, rename
func (c *Cache) keep(part string, i info) error {
	data, err := json.Marshal(i)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(part, infoName), data, 0o600); err != nil {
		return err
	}
	l := &layer{diff: i.DiffID, dir: strings.TrimSuffix(part, partSuffix), bytes: i.Bytes, entries: i.Entries, used: time.Now()}
	if err := os.Rename(part, l.dir); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.layers[l.diff] != nil {
		return errThere
	}
	c.layers[l.diff] = l
	return nil
}
