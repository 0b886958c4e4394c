package file

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
)

const (
	// watchEvery is how often the free disk space is looked at; others write
	// to the disk too.
	watchEvery = 2 * time.Second
	// ages is the number of classes that the survey sorts files into by age,
	// each touchEvery wide: finer differences of use are not recorded.
	ages = 4096
	// hopelessFor is, at least, how long eviction rests after it could not
	// free enough, and restFactor how long in times of what the pass took: so a
	// store that is full of young blobs does not spend its time looking at them.
	// Where nothing at all was old enough, it rests until something may be, but
	// looks again after maxHopelessFor, because clocks are set at times.
	hopelessFor    = time.Second
	restFactor     = 20
	maxHopelessFor = 10 * time.Minute
)

// keepSpace is the goroutine that alone evicts. It first ends a recovery and
// counts what is there.
func (s *Store) keepSpace() {
	if err := s.recovery.sweep(s); err != nil {
		s.log.Error("recovery did not end; it goes on at the next start", "error", err)
	}
	if err := s.count(); err != nil {
		s.log.Error("counting the store's files", "error", err)
	}
	close(s.counted)
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-s.closing:
			return
		case <-tick.C:
			if _, err := s.space.refresh(); err != nil {
				s.log.Error("looking at the free disk space", "error", err)
			}
		case <-s.space.kick:
		}
		if err := s.makeRoom(); err != nil && !errors.Is(err, errGivenUp) {
			s.log.Error("evicting", "error", err)
		}
	}
}

// count adds up the files that were there before this process: getdents64, and
// newfstatat of entries only. What is written meanwhile may be counted twice,
// until the next survey.
func (s *Store) count() error {
	started := time.Now()
	var files, bytes int64
	blobFiles, entryFiles := false, false
	err := s.walk(func(f folder, name string) error {
		if f.cas {
			if d, _, ok := parseBlobName(f.fn, name); ok {
				files++
				bytes += onDisk(d.Size())
				blobFiles = blobFiles || s.isUnpacked(f, name)
			}
			return nil
		}
		var st unix.Stat_t
		if unix.Lstat(f.path+name, &st) == nil && !s.dropOutdated(f, name) {
			files++
			bytes += onDisk(st.Size)
			entryFiles = true
		}
		return nil
	})
	if err == nil && !s.recovery.active.Load() {
		s.packed.counted(blobFiles, entryFiles)
	}
	s.space.mu.Lock()
	s.space.used += bytes
	s.space.files += files
	s.space.mu.Unlock()
	s.log.Info("counted the store", "files", files, "size_bytes", bytes, "duration", time.Since(started))
	if errors.Is(err, errGivenUp) {
		return nil
	}
	return err
}

// isUnpacked reports whether the file name is one of a blob that would be packed,
// and is not.
func (s *Store) isUnpacked(f folder, name string) bool {
	if !f.cas || s.packed.max < 0 {
		return false
	}
	d, mode, ok := parseBlobName(f.fn, name)
	return ok && mode == blob.LinkRegular && s.packable(d) && !s.hasPacked(d)
}

// makeRoom is one eviction pass, if there is need for one.
func (s *Store) makeRoom() error {
	sp := &s.space
	started := time.Now()
	sp.mu.Lock()
	wanted, passed, hopeless := sp.wanted, sp.passed, sp.hopeless
	sp.wanted, sp.passed = 0, make(chan struct{})
	need := sp.deficit(min(wanted, sp.max))
	sp.mu.Unlock()
	defer close(passed)

	if need <= 0 || started.Before(hopeless) {
		return nil
	}
	sv, err := s.survey(started)
	if err != nil {
		return err
	}
	cutoff := sv.cutoff(need, s.touchEvery)
	freed, err := s.reap(cutoff, need)
	if err == nil {
		var cleaned int64
		cleaned, err = s.reapPacks(sv, cutoff, need-freed, wanted > 0)
		freed += cleaned
	}
	if freed > 0 {
		if !cutoff.IsZero() {
			s.metrics.passAge.Store(int64(started.Sub(cutoff) - s.touchEvery))
		}
		s.log.Info("evicted", "size_bytes", freed, "wanted_bytes", need, "used_bytes", sp.state().used, "duration", time.Since(started))
	}
	if freed < need {
		rest := max(hopelessFor, restFactor*time.Since(started))
		if freed == 0 {
			rest = max(rest, min(maxHopelessFor, time.Until(sv.oldest.Add(s.minLifetime+s.touchEvery))))
		}
		sp.mu.Lock()
		sp.hopeless = time.Now().Add(rest)
		sp.mu.Unlock()
	}
	return err
}

// survey is what a pass over all files found. Memory does not grow with them.
type survey struct {
	from   time.Time // the last use of what may just be evicted
	bytes  [ages]int64
	packed [ages]int64 // of records in the packs
	oldest time.Time   // last use of any file or record

	packsSize, packsLive int64 // bytes of the segments
}

// survey sorts the files by age, and counts them anew: getdents64, and
// newfstatat for each.
func (s *Store) survey(now time.Time) (*survey, error) {
	sv := &survey{from: now.Add(-s.minLifetime - s.touchEvery), oldest: now}
	before := s.space.state()
	blobFiles := false
	found, err := s.surveyPacks(sv, now)
	if err != nil {
		return sv, err
	}
	err = s.walk(func(f folder, name string) error {
		var st unix.Stat_t
		if unix.Lstat(f.path+name, &st) != nil {
			return nil // it went away, or its reader will be told of the trouble
		}
		size, atime := onDisk(st.Size), atimeOf(&st)
		found += size
		blobFiles = blobFiles || s.isUnpacked(f, name)
		if atime.Before(sv.oldest) {
			sv.oldest = atime
		}
		if s.evictable(atime, now) {
			sv.bytes[sv.class(atime, s.touchEvery)] += size
		}
		return nil
	})
	if err == nil {
		s.space.correct(before, found)
		if !s.recovery.active.Load() {
			s.packed.blobFiles.Store(blobFiles)
		}
	}
	return sv, err
}

func (sv *survey) class(atime time.Time, width time.Duration) int {
	return int(min((sv.from.Sub(atime)-1)/max(width, 1), ages-1))
}

// cutoff is the time before which a file's last use must be for it to be
// evicted, if need bytes shall be freed. It is the same for files and records.
// It is zero where cleaning the packs is enough.
func (sv *survey) cutoff(need int64, width time.Duration) time.Time {
	var files, packed int64
	if sv.reclaimable(0) >= need {
		return time.Time{}
	}
	for i := ages - 1; i > 0; i-- {
		files += sv.bytes[i]
		packed += sv.packed[i]
		if files+sv.reclaimable(packed) >= need {
			return sv.from.Add(-time.Duration(i) * max(width, 1))
		}
	}
	return sv.from
}

// reap removes files last used before cutoff, until need bytes are freed:
// getdents64, newfstatat for each, unlinkat for those that go.
func (s *Store) reap(cutoff time.Time, need int64) (freed int64, err error) {
	if cutoff.IsZero() {
		return 0, nil
	}
	err = s.walk(func(f folder, name string) error {
		n, err := s.evict(f.path+name, cutoff)
		if freed += n; freed >= need {
			return errEnough
		}
		return err
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	return freed, err
}

// evict removes the file at path if nobody has used it since cutoff. Whoever is
// about to mark it as used holds its lock.
func (s *Store) evict(path string, cutoff time.Time) (int64, error) {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil || !atimeOf(&st).Before(cutoff) || !s.keys.tryLock(path) {
		return 0, nil
	}
	defer s.keys.unlock(path)
	if unix.Lstat(path, &st) != nil || !atimeOf(&st).Before(cutoff) {
		return 0, nil
	}
	if err := unix.Unlink(path); err != nil {
		return 0, classify(err)
	}
	n := onDisk(st.Size)
	s.space.release(n)
	s.evicted(n, atimeOf(&st))
	return n, nil
}
