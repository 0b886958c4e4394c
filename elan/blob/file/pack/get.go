package pack

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/mettle-build/mettle/elan/blob"
)

// Get returns the value of key, which the caller owns, and records the use:
// pread. Where there is none, or it was damaged, the error wraps
// blob.ErrNotFound, and where it can't be read, blob.ErrUnavailable.
func (s *Store) Get(ctx context.Context, key []byte) ([]byte, error) {
	h := s.secret.hash(key)
	// A record that is moved while it is read is found at another place then.
	for range 100 {
		l, err := s.find(ctx, h)
		if err != nil {
			return nil, err
		}
		if !l.isRecord() {
			return nil, blob.ErrNotFound
		}
		raw, err := s.read(l)
		switch {
		case err == nil:
			if p, ok := s.secret.parse(raw); ok && !p.dead && string(p.Key) == string(key) {
				return p.Value, nil
			}
		case !errors.Is(err, errGone) && !isEnd(err):
			return nil, err
		}
		if s.withdraw(h, l, raw) {
			return nil, blob.ErrNotFound
		}
	}
	return nil, fmt.Errorf("%w: its record keeps moving", blob.ErrUnavailable)
}

// read returns what stands at l: pread. The errors are errGone,
// io.ErrUnexpectedEOF, or wrap blob.ErrUnavailable.
func (s *Store) read(l location) ([]byte, error) {
	seg := s.segs.all()[l.segment()]
	if seg == nil {
		return nil, errGone
	}
	fd, err := s.segs.acquire(seg)
	if err != nil {
		return nil, err
	}
	defer s.segs.release(seg)
	raw := make([]byte, l.bytes())
	switch err := preadFull(fd, raw, l.offset()); {
	case err == nil:
		return raw, nil
	case isEnd(err):
		return nil, err
	default:
		return nil, classify(err)
	}
}

// isEnd reports whether read found that the file ends too early.
func isEnd(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }

// withdraw forgets h, because what stands at l is not its record, and reports
// whether it did: not if h is elsewhere by now.
func (s *Store) withdraw(h hashed, l location, raw []byte) bool {
	if _, ok := s.index.remove(h, l); !ok {
		return false
	}
	s.log.Error("a record of the packs is damaged, and withdrawn", "segment", l.segment(), "offset", l.offset(), "size_bytes", l.bytes())
	s.damaged(raw)
	return true
}
