package file

import (
	"errors"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file/pack"
)

const (
	// packsFill is the part of the segments that is to live when eviction is
	// over. The less, the emptier the segments that cleaning finds, and the less
	// is written again; the more, the more blobs the same disk holds. README.md
	// has what was measured.
	packsFill = 0.85
	// maxLiveCleaned is how much of a segment may live for it to be cleaned before
	// anybody waits for room, and maxLiveUrgent when somebody does.
	maxLiveCleaned = 0.9
	maxLiveUrgent  = 0.97
)

func (s *Store) packsBytes() (segments, live, index int64) {
	if s.packed.store == nil {
		return 0, 0, 0
	}
	return s.packed.store.Bytes()
}

func (s *Store) packedRecords() int64 {
	if s.packed.store == nil {
		return 0
	}
	return s.packed.store.Records()
}

func (s *Store) hasPackedEntry(k blob.EntryKey) bool {
	if s.packed.store == nil {
		return false
	}
	var buf keyBuffer
	return s.packed.store.Has(appendEntryKey(buf[:0], k))
}

// surveyPacks adds the records of the packs to the survey, and returns what the
// packs take. It is some 20 ns for each record, and no system call.
func (s *Store) surveyPacks(sv *survey, now time.Time) (int64, error) {
	if s.packed.store == nil {
		return 0, nil
	}
	err := s.packed.store.Count(s.closing)
	if err == nil {
		err = s.packed.store.Survey(s.closing, func(lastUse time.Time, bytes int64) {
			if lastUse.Before(sv.oldest) {
				sv.oldest = lastUse
			}
			if s.evictable(lastUse, now) {
				sv.packed[sv.class(lastUse, s.touchEvery)] += bytes
			}
		})
	}
	if errors.Is(err, pack.ErrStopped) {
		err = errGivenUp
	}
	size, live, index := s.packed.store.Bytes()
	sv.packsSize, sv.packsLive = size, live
	return size + index, err
}

// reclaimable is what cleaning the packs frees after so many bytes in them were
// evicted, if packsFill of what is left shall live.
func (sv *survey) reclaimable(evicted int64) int64 {
	return max(0, sv.packsSize-int64(float64(sv.packsLive-evicted)/packsFill))
}

// reapPacks evicts from the packs what was last used before cutoff, until
// cleaning them can free need bytes, and cleans them. Where somebody waits for
// the room it is done at any cost.
func (s *Store) reapPacks(sv *survey, cutoff time.Time, need int64, waited bool) (freed int64, err error) {
	store := s.packed.store
	if store == nil || need <= 0 {
		return 0, nil
	}
	size, live, _ := store.Bytes()
	if excess := live - int64(float64(size-need)*packsFill); excess > 0 && !cutoff.IsZero() {
		_, _, err = store.Evict(s.closing, cutoff, excess, func(lastUse time.Time, bytes int64) { s.evicted(bytes, lastUse) })
	}
	maxLive := maxLiveCleaned
	if waited {
		maxLive = maxLiveUrgent
	}
	if err == nil {
		var moved int64
		freed, moved, err = store.Clean(s.closing, need, maxLive, sv.from)
		s.metrics.packsMoved.Add(float64(moved))
	}
	if errors.Is(err, pack.ErrStopped) {
		err = errGivenUp
	}
	return freed, err
}
