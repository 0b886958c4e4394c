//go:build linux

package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// record is what is remembered of an image, by its digest.
type record struct {
	Layers []descriptor // the lowest first
	used   time.Time
}

// descriptor is a layer as a manifest and a configuration have it.
type descriptor struct {
	DiffID v1.Hash // of the unpacked tar
	Blob   v1.Hash // as it comes
	Size   int64   // of Blob
	// Saved says that Blob is DiffID, because what comes is not known by anything
	// else: it may be compressed or not.
	Saved bool
}

// maxRecords bounds the images that are remembered, each in a file of some
// kilobytes.
const maxRecords = 1 << 10

func (c *Cache) recordFile(h v1.Hash) string { return filepath.Join(c.imagesDir(), h.Hex) }

// readRecords reads those of an earlier process. One that can't be read is asked
// for again.
func (c *Cache) readRecords() {
	entries, err := os.ReadDir(c.imagesDir())
	if err != nil {
		return
	}
	for _, e := range entries {
		path := filepath.Join(c.imagesDir(), e.Name())
		h, err := v1.NewHash("sha256:" + e.Name())
		r := &record{used: time.Now()}
		if err == nil {
			err = readJSON(path, r)
		}
		if err != nil || len(c.records) == maxRecords || r.check() != nil {
			_ = os.Remove(path) // it is one less to remember
			continue
		}
		c.records[h] = r
	}
}

func readJSON(path string, v any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, v)
}

func (r *record) check() error {
	if len(r.Layers) == 0 || len(r.Layers) > maxLayers {
		return fmt.Errorf("%w: it has %d layers, 1 to %d are taken", ErrUnusable, len(r.Layers), maxLayers)
	}
	for _, l := range r.Layers {
		if l.DiffID.Algorithm != "sha256" || l.Blob.Algorithm != "sha256" || l.Size < 0 {
			return fmt.Errorf("%w: its layers are not known by sha256", ErrUnusable)
		}
	}
	return nil
}

// known is the record of an image, nil if there is none.
func (c *Cache) known(h v1.Hash) *record {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.records[h]
	if r != nil {
		r.used = time.Now()
	}
	return r
}

// remember keeps a record.
func (c *Cache) remember(h v1.Hash, r *record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := c.recordFile(h)
	err = os.WriteFile(path+partSuffix, data, 0o600)
	if err == nil {
		err = os.Rename(path+partSuffix, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(path+partSuffix))
	}
	c.mu.Lock()
	r.used = time.Now()
	c.records[h] = r
	var oldest v1.Hash
	if len(c.records) > maxRecords {
		for k, v := range c.records {
			if o := c.records[oldest]; o == nil || v.used.Before(o.used) {
				oldest = k
			}
		}
		delete(c.records, oldest)
	}
	c.mu.Unlock()
	if oldest.Hex == "" {
		return nil
	}
	return os.Remove(c.recordFile(oldest))
}

// topmost lists the layers that count: one that occurs twice is seen where it is
// on top, and the kernel takes no directory twice.
func topmost(all []descriptor) []descriptor {
	seen := make(map[v1.Hash]bool, len(all))
	out := make([]descriptor, len(all))
	at := len(all)
	for _, d := range slices.Backward(all) {
		if !seen[d.DiffID] {
			seen[d.DiffID] = true
			at--
			out[at] = d
		}
	}
	return out[at:]
}

// refusal is remembered for a while, so that a registry is not asked for the same
// thousands of times.
type refusal struct {
	err   error
	until time.Time
}

// refusalTTL is how long: a tag may be pushed late, a right given.
const refusalTTL = 10 * time.Second

// maxRemembered bounds refusals and tags.
const maxRemembered = 1 << 10

func (c *Cache) refusal(ref Reference) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r, ok := c.refused[ref]; ok && time.Now().Before(r.until) {
		return r.err
	}
	return nil
}

func (c *Cache) refuse(ref Reference, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.refused) >= maxRemembered {
		clear(c.refused)
	}
	c.refused[ref] = refusal{err, time.Now().Add(refusalTTL)}
}

// tagged is what a tag stood for.
type tagged struct {
	digest v1.Hash
	until  time.Time
}

func (c *Cache) tagged(ref Reference) (v1.Hash, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t, ok := c.tags[ref]
	return t.digest, ok && time.Now().Before(t.until)
}

func (c *Cache) tag(ref Reference, h v1.Hash) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.tags) >= maxRemembered {
		clear(c.tags)
	}
	c.tags[ref] = tagged{h, time.Now().Add(c.o.TagTTL)}
}
