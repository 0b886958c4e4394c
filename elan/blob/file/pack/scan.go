package pack

import (
	"encoding/binary"
	"errors"
	"io"

	"golang.org/x/sys/unix"
)

// scan calls visit with each whole record of seg, in their order, dead ones too,
// until visit fails: fstat, pread64 of 1 MiB each. Where there is none, it looks
// for the next one at every multiple of 8. The slices that visit is given are
// its own only until it returns. The error is errGone where the segment is
// removed, ErrStopped when the store is closed, wraps blob.ErrUnavailable, or is
// that of visit.
func (s *Store) scan(seg *segment, visit func(l location, p *parsed, raw []byte) error) error {
	fd, err := s.segs.acquire(seg)
	if err != nil {
		return err
	}
	defer s.segs.release(seg)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return classify(err)
	}
	pooled := buffers.Get().(*[]byte)
	defer buffers.Put(pooled)
	var buf []byte // what was read and not yet looked at
	for off, size := firstRecord, min(seg.size.Load(), st.Size); off < size; {
		if int64(len(buf)) < min(MaxRecordBytes, size-off) {
			if stopped(s.closing) {
				return ErrStopped
			}
			buf = (*pooled)[:min(bufferBytes, size-off)]
			if err := preadFull(fd, buf, off); errors.Is(err, io.ErrUnexpectedEOF) {
				return nil // somebody cut it meanwhile
			} else if err != nil {
				return classify(err)
			}
		}
		n := int64(0)
		if p, ok := s.secret.parse(buf); ok {
			n = p.bytes
			if err := visit(locate(seg.id, off, n), &p, buf[:n]); err != nil {
				return err
			}
		} else {
			n = s.secret.skip(buf)
		}
		buf, off = buf[n:], off+n
	}
	return nil
}

// skip is how far the next place in b is where a record may begin.
func (s *secret) skip(b []byte) int64 {
	for i := recordAlign; i+4 <= len(b); i += recordAlign {
		if magic := binary.LittleEndian.Uint32(b[i:]); magic == s.liveMagic || magic == ^s.liveMagic {
			return int64(i)
		}
	}
	return int64(len(b))
}
