package pack

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
)

// Survey calls visit with each record's last use, rounded up to a second, and its
// bytes, in no order. It must be quick: it is called under a lock that finders wait for. It
// is some 20 ns for each record.
func (s *Store) Survey(done <-chan struct{}, visit func(lastUse time.Time, bytes int64)) error {
	for n := range s.index.shard {
		if err := s.going(done); err != nil {
			return err
		}
		sh := &s.index.shard[n]
		sh.mu.RLock()
		for i := range sh.t.length() {
			if l := sh.t.location(i); l.isRecord() && s.segs.holds(l) {
				visit(lastUse(sh.t.use(i)), l.bytes())
			}
		}
		sh.mu.RUnlock()
	}
	return nil
}

// going is what long work asks between its steps.
func (s *Store) going(done <-chan struct{}) error {
	if stopped(done) || stopped(s.closing) {
		return ErrStopped
	}
	return nil
}

// lastUse is the end of the second that the index recorded.
func lastUse(seconds uint32) time.Time { return time.Unix(int64(seconds)+1, 0) }

// Count finds out what lives in each segment, if that is not known yet. Clean
// and the live bytes of Bytes need it.
func (s *Store) Count(done <-chan struct{}) error {
	if err := s.waitRebuilt(done); err != nil {
		return err
	}
	return s.index.count(done)
}

// Evict forgets records that were last used before cutoff, until they are so
// many bytes, and calls evicted, if it is not nil, with each as Survey does. That frees no space: see Clean.
func (s *Store) Evict(done <-chan struct{}, cutoff time.Time, maxBytes int64, evicted func(lastUse time.Time, bytes int64)) (records int, bytes int64, err error) {
	for n := range s.index.shard {
		if err := s.going(done); err != nil || bytes >= maxBytes {
			return records, bytes, err
		}
		sh := &s.index.shard[n]
		sh.mu.Lock()
		for i := range sh.t.length() {
			l := sh.t.location(i)
			if !l.isRecord() || !lastUse(sh.t.use(i)).Before(cutoff) {
				continue
			}
			if evicted != nil {
				evicted(lastUse(sh.t.use(i)), l.bytes())
			}
			sh.drop(&s.segs, i)
			records++
			if bytes += l.bytes(); bytes >= maxBytes {
				break
			}
		}
		sh.mu.Unlock()
	}
	return records, bytes, nil
}

// Clean frees need bytes, or as many as it can, by removing segments, those with
// the least living bytes first, and after it moved what lives in them to the end
// of another: for a while the files are larger by up to a segment than before.
// Segments of which more than maxLive, from 0 to 1, lives are left alone, and
// each is looked at once; one that can't be read stays, does not keep the others
// from being cleaned, and is the error in the end. It returns how many bytes fewer
// the segments have, and how many were moved. What was moved is on the disk before
// what it was moved from is removed: fdatasync. Where the disk has no room for what
// is to be moved, segments of which all records were last used before expendable
// are removed with them; the zero time spares all.
func (s *Store) Clean(done <-chan struct{}, need int64, maxLive float64, expendable time.Time) (freed, moved int64, err error) {
	if err := s.Count(done); err != nil {
		return 0, 0, err
	}
	s.cleaning.Lock()
	defer s.cleaning.Unlock()
	for _, seg := range s.sealed() {
		if err := s.going(done); err != nil {
			return freed, moved, err
		}
		live, size := seg.live.Load(), seg.size.Load()
		if freed >= need || float64(live) > maxLive*float64(size) {
			break
		}
		// Less than a fiftieth is not worth writing all the rest again.
		if size-live-firstRecord < size/50 {
			continue
		}
		n, e := s.empty(seg)
		moved += n
		freed -= n
		if errors.Is(e, blob.ErrFull) && !expendable.IsZero() {
			e = s.expend(seg, expendable)
		}
		switch {
		case errors.Is(e, errYoung):
		case e == nil:
			freed += size
		case !errors.Is(e, errUnread):
			return freed, moved, errors.Join(err, e)
		case err == nil:
			err = e
		}
	}
	return freed, moved, err
}

// errYoung says that a segment has records that must not go.
var errYoung = errors.New("some were used lately")

// expend removes seg with all that lives in it, if that was last used before
// then.
func (s *Store) expend(seg *segment, then time.Time) error {
	old := func(l location, p *parsed, _ []byte) error {
		if use, ok := s.index.at(s.secret.hash(p.Key), l); ok && !lastUse(use).Before(then) {
			return errYoung
		}
		return nil
	}
	if err := s.scan(seg, old); err != nil {
		return err
	}
	err := s.scan(seg, func(l location, p *parsed, _ []byte) error {
		if !s.index.removeOld(s.secret.hash(p.Key), l, then) {
			return errYoung // in this moment
		}
		return nil
	})
	if err == nil {
		err = s.syncMoved() // a part was moved before there was no room
	}
	if err != nil {
		return err
	}
	return s.drop(seg)
}

// sealed are the segments that are not written to and are known, first those of which the
// smallest part lives, and of equals the older ones.
func (s *Store) sealed() []*segment {
	type ranked struct {
		seg  *segment
		part float64
	}
	var all []ranked
	for _, seg := range s.segs.all() {
		if !s.hot.is(seg) && !s.cold.is(seg) && seg.writers.Load() == 0 && !seg.unread.Load() {
			all = append(all, ranked{seg: seg, part: float64(seg.live.Load()) / float64(seg.size.Load())})
		}
	}
	slices.SortFunc(all, func(a, b ranked) int {
		return cmp.Or(cmp.Compare(a.part, b.part), cmp.Compare(a.seg.id, b.seg.id))
	})
	segs := make([]*segment, len(all))
	for i := range all {
		segs[i] = all[i].seg
	}
	return segs
}

// empty moves what lives in seg and removes it. It returns how many bytes were
// moved.
func (s *Store) empty(seg *segment) (int64, error) {
	m := mover{s: s}
	var err error
	if seg.live.Load() > 0 {
		if err = s.scan(seg, m.add); err != nil && m.err == nil && !errors.Is(err, ErrStopped) {
			err = fmt.Errorf("%w: %w", errUnread, err)
		}
		if err == nil {
			err = m.flush()
		}
	}
	if err == nil {
		err = s.syncMoved()
	}
	if err != nil {
		return m.bytes, fmt.Errorf("empty segment %d: %w", seg.id, err)
	}
	return m.bytes, s.drop(seg)
}

// drop removes seg, of which nothing lives any more.
func (s *Store) drop(seg *segment) error {
	if err := s.segs.remove(seg); err != nil {
		return fmt.Errorf("remove segment %d: %w", seg.id, err)
	}
	s.grew(-seg.size.Load())
	// What is still said to live there could not be read.
	if lost := seg.live.Load(); lost > 0 {
		s.log.Error("records of a segment of the packs were damaged, and are lost", "segment", seg.id, "size_bytes", lost)
		s.damaged(nil)
	}
	return nil
}

// errUnread says that a segment could not be read.
var errUnread = errors.New("it can't be read")

// mover appends living records to the cold segment.
type mover struct {
	s     *Store
	buf   []byte
	queue []moving
	bytes int64
	err   error // of writing
}

type moving struct {
	h    hashed
	from location
}

func (m *mover) add(l location, p *parsed, raw []byte) error {
	h := m.s.secret.hash(p.Key)
	if _, ok := m.s.index.at(h, l); !ok || p.dead {
		return nil
	}
	if len(m.buf)+len(raw) > bufferBytes || int64(len(m.buf)+len(raw)) > m.s.segmentBytes-firstRecord {
		if m.err = m.flush(); m.err != nil {
			return m.err
		}
	}
	m.buf = append(m.buf, raw...)
	m.queue = append(m.queue, moving{h: h, from: l})
	return nil
}

// flush writes what was added, and points the index to it.
func (m *mover) flush() error {
	if len(m.queue) == 0 {
		return nil
	}
	s := m.s
	seg, off, err := s.write(&s.cold, m.buf)
	if err != nil {
		return err
	}
	defer seg.writers.Add(-1)
	if !slices.Contains(s.unsynced, seg) {
		s.unsynced = append(s.unsynced, seg)
	}
	s.grew(int64(len(m.buf)))
	m.bytes += int64(len(m.buf))
	for _, q := range m.queue {
		to := locate(seg.id, off, q.from.bytes())
		if !s.index.move(q.h, q.from, to) {
			// Replaced or deleted meanwhile: the copy must not bring it back.
			if err := s.bury(to); err != nil {
				return err
			}
		}
		off += q.from.bytes()
	}
	m.buf, m.queue = m.buf[:0], m.queue[:0]
	return nil
}

// syncMoved makes durable what was moved, also by an attempt that failed:
// fdatasync. Before that no segment is removed, not even one in which nothing lives
// any more. The caller holds the lock of cleaning.
func (s *Store) syncMoved() error {
	for len(s.unsynced) > 0 {
		fd, err := s.segs.acquire(s.unsynced[0])
		if err == nil {
			err = s.fdatasync(fd)
			s.segs.release(s.unsynced[0])
		}
		if err != nil && !errors.Is(err, errGone) {
			return classify(err)
		}
		s.unsynced = s.unsynced[1:]
	}
	return nil
}
