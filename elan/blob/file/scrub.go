package file

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// DefaultScrubBytesPerSecond is a fifth of what a slow disk reads, and 3 %
	// of what a CPU hashes.
	DefaultScrubBytesPerSecond = 20 << 20
	// DefaultScrubEvery is a week: disks and their arrays are scrubbed weekly to
	// monthly.
	DefaultScrubEvery = 7 * 24 * time.Hour

	scrubFile = "scrub"
	// scrubDelay lets a start, with its first builds, pass by.
	scrubDelay = time.Minute
	// scrubSaveEvery bounds what is read again after a kill.
	scrubSaveEvery = time.Minute
	// scrubFileCost is what a file counts for beside its bytes: finding it costs
	// a disk as much as reading so many bytes.
	scrubFileCost = 16 << 10
	// scrubNames is how many names are held in memory at once.
	scrubNames = 4096
)

// scrubState is the content of the file of that name. Where that is lost, the
// pass begins anew.
type scrubState struct {
	// Begun and Ended are of the last pass to do so; one is under way if Begun
	// is later.
	Begun time.Time `json:"begun"`
	Ended time.Time `json:"ended"`
	// After is the file that was looked at last, relative to the store.
	After string `json:"after,omitempty"`
}

// scrubber reads all files over and over, at a bounded rate, and has withdrawn
// what is not what it was: disks change bytes, and nobody would know before a
// build reads them.
type scrubber struct {
	s     *Store
	every time.Duration
	pacer pacer
	state scrubState
	saved time.Time // when state was written last
	files int64     // looked at in this run of the process
	bad   int64     // taken away
}

// keepScrubbed is the goroutine of the scrubber.
func (s *Store) keepScrubbed(bytesPerSecond int64, every time.Duration) {
	select {
	case <-s.closing:
		return
	case <-s.counted: // a recovery reads everything already
	}
	sc := &scrubber{s: s, every: every, pacer: pacer{bytesPerSecond: bytesPerSecond, closing: s.closing}}
	sc.state = s.readScrubState()
	s.metrics.scrubEnded.Store(unixSeconds(sc.state.Ended))
	for sc.wait(scrubDelay) && sc.wait(sc.pause()) {
		sc.pass()
	}
}

// wait returns false where the store is closed first.
func (sc *scrubber) wait(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-sc.s.closing:
		return false
	case <-t.C:
		return true
	}
}

// pause is how long the next pass, or the rest of one, is to wait.
func (sc *scrubber) pause() time.Duration {
	st := sc.state
	since := time.Since(st.Begun)
	if st.Begun.After(st.Ended) || since < 0 { // in the future where the clock was set back
		return 0
	}
	return max(sc.every-since, 0)
}

// pass is one pass over all files, or the rest of one.
func (sc *scrubber) pass() {
	s := sc.s
	if !sc.state.Begun.After(sc.state.Ended) {
		sc.state.Begun, sc.state.After = time.Now(), ""
	}
	sc.files, sc.bad, sc.saved = 0, 0, time.Now()
	started := time.Now()
	err := sc.walk()
	if err == nil {
		sc.state.Ended, sc.state.After = time.Now(), ""
		s.metrics.scrubEnded.Store(unixSeconds(sc.state.Ended))
		s.log.Info("scrubbed the store", "files", sc.files, "corrupt", sc.bad, "duration", time.Since(started))
	}
	sc.save()
}

// walk looks at the files after the position, in the order of their names. The
// error is errGivenUp: other trouble is that of a folder or a file.
func (sc *scrubber) walk() error {
	if sc.state.After == packsDir {
		return sc.packs()
	}
	folders := sc.s.folders()
	after := strings.TrimPrefix(sc.state.After, "/")
	at := slices.IndexFunc(folders, func(f folder) bool {
		return strings.HasPrefix(after, strings.TrimPrefix(f.path, sc.s.dir+"/"))
	})
	for i, f := range folders[max(at, 0):] {
		from := ""
		if i == 0 && at >= 0 {
			from = after[strings.LastIndexByte(after, '/')+1:]
		}
		err := sc.folder(f, from)
		if errors.Is(err, errGivenUp) {
			return err
		}
		if err != nil {
			sc.s.metrics.scrubFailed.Inc()
			sc.s.log.Error("scrubbing a folder", "path", f.path, "error", err)
		}
	}
	sc.state.After = packsDir
	return sc.packs()
}

// packs looks at the small blobs and entries that share files. The error is
// errGivenUp; after it they are begun anew.
func (sc *scrubber) packs() error {
	damaged, err := sc.s.verifyPacks(sc.count)
	sc.bad += damaged
	sc.s.metrics.scrubCorrupt.Add(float64(damaged))
	if err == nil || errors.Is(err, errGivenUp) {
		return err
	}
	sc.s.metrics.scrubFailed.Inc()
	sc.s.log.Error("scrubbing the packs", "error", err)
	return nil
}

// count is the pace of reading.
func (sc *scrubber) count(n int64) bool {
	ok := sc.pacer.wait(n)
	if ok {
		sc.s.metrics.scrubbedBytes.Add(float64(n))
	}
	return ok
}

// folders are those of all blobs, and then of all entries.
func (s *Store) folders() []folder {
	var all []folder
	for _, top := range []string{s.casDir, s.acDir} {
		for _, fn := range digest.Functions() {
			if !s.prepared[fn].Load() {
				continue
			}
			for i := range fanOut {
				all = append(all, folderOf(top, top == s.casDir, fn, i))
			}
		}
	}
	return all
}

// folder looks at the files of f whose names come after from.
func (sc *scrubber) folder(f folder, from string) error {
	for {
		names, err := sc.names(f, from)
		if err != nil || len(names) == 0 {
			return err
		}
		for _, name := range names {
			if err := sc.file(f, name); err != nil {
				return err
			}
			sc.state.After = strings.TrimPrefix(f.path, sc.s.dir+"/") + name
			if time.Since(sc.saved) >= scrubSaveEvery {
				sc.save()
			}
		}
		from = names[len(names)-1]
	}
}

// names are the first scrubNames of those in f that come after from, in order.
func (sc *scrubber) names(f folder, from string) ([]string, error) {
	var names []string
	shorten := func() {
		slices.Sort(names)
		names = names[:min(len(names), scrubNames)]
	}
	err := sc.s.walkFolder(f, func(_ folder, name string) error {
		if name > from {
			if names = append(names, name); len(names) == 2*scrubNames {
				shorten()
			}
		}
		return nil
	})
	shorten()
	return names, err
}

// file looks at one file. The error is errGivenUp.
func (sc *scrubber) file(f folder, name string) error {
	if !sc.pacer.wait(scrubFileCost) {
		return errGivenUp
	}
	m := sc.s.metrics
	var err error
	d, mode, ok := parseBlobName(f.fn, name)
	switch {
	case !f.cas:
		err = sc.s.checkEntry(f.path+name, sc.count)
	case ok:
		err = sc.s.checkFile(sc.s.closing, d, mode, sc.count)
	default:
		return nil // not ours
	}
	switch {
	case errors.Is(err, errGivenUp):
		return err
	case errors.Is(err, blob.ErrCorrupt):
		sc.bad++
		m.scrubCorrupt.Inc()
	case err != nil && !errors.Is(err, blob.ErrNotFound):
		m.scrubFailed.Inc()
		sc.s.log.Error("a file can't be verified", "path", f.path+name, "error", err)
	}
	sc.files++
	m.scrubbed.Inc()
	return nil
}

// checkEntry compares an entry with its checksum. The errors are checkFile's.
func (s *Store) checkEntry(path string, p pace) error {
	fd, st, err := openQuiet(path)
	switch {
	case errors.Is(err, unix.ENOENT):
		return blob.ErrNotFound
	case err != nil:
		return classify(err)
	}
	defer unix.Close(fd) //nolint:errcheck // opened for reading
	if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size <= maxEntryBytes {
		data, err := io.ReadAll(io.LimitReader(&quiet{fd: fd, pace: p}, st.Size))
		if err != nil {
			return err
		}
		if _, whole := parseEntry(data); whole {
			return nil
		}
	}
	if !s.keys.lock(s.closing, path) {
		return errGivenUp
	}
	defer s.keys.unlock(path)
	var now unix.Stat_t
	if unix.Lstat(path, &now) != nil || now.Ino != st.Ino {
		return blob.ErrNotFound // it was replaced
	}
	s.metrics.corrupt.Inc()
	s.log.Error("entry is damaged, and withdrawn", "path", path)
	if err := s.discard(path, now.Size); err != nil {
		return classify(err)
	}
	s.space.release(onDisk(now.Size))
	return blob.ErrCorrupt
}

// readScrubState returns the zero state where there is none that can be read.
func (s *Store) readScrubState() scrubState {
	var st scrubState
	data, err := os.ReadFile(s.dir + "/" + scrubFile)
	if err == nil {
		err = json.Unmarshal(data, &st)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("how far scrubbing went can't be read, it begins anew", "error", err)
		return scrubState{}
	}
	return st
}

// save writes the state: openat, write, close, renameat. There is no fsync: what
// a power failure does to it costs a pass, and an fsync costs others time.
func (sc *scrubber) save() {
	sc.saved = time.Now()
	data, err := json.Marshal(sc.state)
	path := sc.s.dir + "/" + scrubFile
	if err == nil {
		err = os.WriteFile(path+newSuffix, append(data, '\n'), 0o600)
	}
	if err == nil {
		err = os.Rename(path+newSuffix, path)
	}
	if err != nil {
		sc.s.log.Error("writing down how far scrubbing went", "error", err)
	}
}

func unixSeconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
