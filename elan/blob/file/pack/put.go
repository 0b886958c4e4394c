package pack

import (
	"errors"
	"time"
)

// Put makes the records visible, and returns how many bytes the segments grew:
// pwrite, one for many records, and after each segment that is full openat and
// pwrite. What is there already and not mutable is not replaced, but takes
// space until Clean; ask Find before. Where Put fails, some of the records may
// be there. The error wraps blob.ErrFull or blob.ErrUnavailable.
func (s *Store) Put(records ...Record) (int64, error) {
	pooled := smallBuffers.Get().(*[]byte)
	defer smallBuffers.Put(pooled)
	var grew int64
	for len(records) > 0 {
		n, bytes := 0, int64(0)
		buf := (*pooled)[:0]
		now := time.Now()
		for n < len(records) && (n == 0 || bytes+recordBytes(&records[n]) <= bufferBytes/4) {
			if err := records[n].fits(); err != nil {
				return grew, err
			}
			bytes += recordBytes(&records[n])
			buf = s.secret.appendRecord(buf, &records[n], now.UnixNano())
			n++
		}
		if err := s.put(records[:n], buf); err != nil {
			return grew, err
		}
		grew += bytes
		*pooled = buf
		records = records[n:]
	}
	return grew, nil
}

func recordBytes(r *Record) int64 { return RecordBytes(len(r.Key), len(r.Value)) }

// put writes buf, which has the records one after the other, and tells the
// index of each.
func (s *Store) put(records []Record, buf []byte) error {
	seg, off, err := s.write(&s.hot, buf)
	if err != nil {
		return err
	}
	defer seg.writers.Add(-1)
	now := nowSeconds()
	for i := range records {
		r := &records[i]
		n := recordBytes(r)
		at := locate(seg.id, off, n)
		old, placed, err := s.index.put(s.secret.hash(r.Key), at, now, !r.Mutable)
		if err == nil && !placed {
			old = at // it was there already
		}
		if err == nil && old.isRecord() {
			err = s.bury(old)
		}
		if err != nil {
			return err
		}
		off += n
	}
	return nil
}

// write appends buf at h. The caller lets go of the segment's writers after it
// told the index, so that the segment is not cleaned before.
func (s *Store) write(h *head, buf []byte) (*segment, int64, error) {
	n := int64(len(buf))
	seg, off, err := s.segs.reserve(h, n, max(s.segmentBytes, firstRecord+n))
	if err != nil {
		return nil, 0, err
	}
	fd, err := s.segs.acquire(seg)
	if err == nil {
		if err = pwriteFull(fd, buf, off); err != nil {
			err = classify(err)
		}
		s.segs.release(seg)
	}
	if errors.Is(err, errGone) {
		err = errClosed // heads are not removed otherwise
	}
	if err != nil {
		s.segs.giveBack(h, seg, off, n)
		seg.writers.Add(-1)
		return nil, 0, err
	}
	return seg, off, nil
}
