package file_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
)

// childWork is what the child does, as JSON in childEnv.
type childWork struct {
	Dir      string
	MaxBytes int64         // 0: none
	Lifetime time.Duration // 0: the default
}

func (w childWork) options() file.Options {
	return file.Options{Dir: w.Dir, MaxBytes: w.MaxBytes, MinLifetime: w.Lifetime, MinFreeBytes: -1}
}

const (
	childWriters = 4
	childKeys    = 8 // entries that each writer writes again and again
)

// ack is a line that the child prints once the store has acknowledged something.
type ack struct {
	Kind string // blob, entry, over (an entry with the number N), gone (an entry)
	Name string // of the blob, or of the entry's action
	N    int64
	At   time.Time // when the call began
}

// writeUntilKilled is the child: writers that put, adopt and link blobs, and put,
// replace and delete entries, and print what was acknowledged.
func writeUntilKilled(work string) error {
	var w childWork
	if err := json.Unmarshal([]byte(work), &w); err != nil {
		return err
	}
	s, err := file.New(w.options())
	if err != nil {
		return err
	}
	links, err := os.MkdirTemp(filepath.Dir(w.Dir), "work")
	if err != nil {
		return err
	}
	errs := make(chan error)
	for i := range childWriters {
		go func() { // ends with the process
			c := childWriter{s: s, id: i, links: links}
			for {
				if err := c.one(); err != nil {
					errs <- err
					return
				}
			}
		}()
	}
	return <-errs
}

type childWriter struct {
	s     *file.Store
	id    int
	links string
	n     int64
}

// one does one thing. That the store is full is no error.
func (c *childWriter) one() error {
	c.n++
	begun := time.Now()
	a, err := c.act()
	switch {
	case errors.Is(err, blob.ErrFull):
		time.Sleep(time.Millisecond)
		return nil
	case err != nil:
		return err
	}
	a.At = begun
	line, err := json.Marshal(a)
	if err == nil {
		_, err = os.Stdout.Write(append(line, '\n')) // one write, which no other comes into
	}
	return err
}

func (c *childWriter) act() (ack, error) {
	ctx := context.Background()
	data := blobtest.Random(rand.Uint64(), childSize())
	d := digest.Of(digest.SHA256, data)
	path := filepath.Join(c.links, fmt.Sprint(c.id, "-", c.n))
	entry := blob.EntryKey{Instance: "i", Action: d}
	switch rand.IntN(6) {
	case 0:
		return ack{Kind: "blob", Name: d.String()}, blob.ReceiveBytes(ctx, c.s, d, data)
	case 1:
		err := blob.Receive(ctx, c.s, d, bytes.NewReader(data))
		if err == nil {
			err = c.s.Link(ctx, d, path, blob.LinkExecutable)
		}
		return ack{Kind: "blob", Name: d.String()}, err
	case 2:
		err := os.WriteFile(path, data, 0o600)
		if err == nil {
			err = adoptPath(ctx, c.s, path)
		}
		return ack{Kind: "blob", Name: d.String()}, err
	case 3:
		return ack{Kind: "entry", Name: d.String()}, c.s.PutEntry(ctx, entry, data)
	case 4:
		err := c.s.PutEntry(ctx, entry, data)
		if err == nil {
			err = c.s.DeleteEntry(ctx, entry)
		}
		return ack{Kind: "gone", Name: d.String()}, err
	}
	// Each writer has keys of its own, so that one write of a key at most is
	// under way when the kill comes.
	key := overKey(c.id, rand.IntN(childKeys))
	n := time.Now().UnixNano() // larger than that of all processes before
	value := append(strconv.AppendInt(nil, n, 10), data...)
	return ack{Kind: "over", Name: key.Action.String(), N: n}, c.s.PutEntry(ctx, key, append(value[:19:19], data...))
}

// overKey names an entry that is written again and again.
func overKey(writer, i int) blob.EntryKey {
	return blob.EntryKey{Instance: "over", Action: digest.Of(digest.SHA256, fmt.Appendf(nil, "%d %d", writer, i))}
}

// childSize is that of most blobs of a build: small, and seldom large.
func childSize() int {
	switch n := rand.IntN(20); {
	case n == 0:
		return 1 + rand.IntN(300_000)
	case n < 6:
		return 1 + rand.IntN(64_000)
	}
	return 1 + rand.IntN(4000)
}

func adoptPath(ctx context.Context, s *file.Store, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = s.Adopt(ctx, digest.SHA256, f)
	return err
}
