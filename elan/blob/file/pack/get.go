package pack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
)

// Get returns the value of key, which the caller owns, and records the use:
// pread. Where there is none, or it was damaged, the error wraps
// blob.ErrNotFound, and where it can't be read, blob.ErrUnavailable.
func (s *Store) Get(ctx context.Context, key []byte) ([]byte, error) {
	h := s.secret.hash(key)
	value, err := s.get(func() (location, error) { return s.find(ctx, h) }, h, key, makeBytes)
	if errors.Is(err, blob.ErrCorrupt) {
		err = fmt.Errorf("%w: %w", blob.ErrNotFound, err)
	}
	return value, err
}

// Read is Get into value, whose length must be that of the value.
func (s *Store) Read(ctx context.Context, key, value []byte) error {
	pooled := smallBuffers.Get().(*[]byte)
	defer smallBuffers.Put(pooled)
	h := s.secret.hash(key)
	got, err := s.get(func() (location, error) { return s.find(ctx, h) }, h, key, func(n int64) []byte {
		*pooled = slices.Grow((*pooled)[:0], int(n))
		return (*pooled)[:n]
	})
	if errors.Is(err, blob.ErrCorrupt) {
		return fmt.Errorf("%w: %w", blob.ErrNotFound, err)
	}
	if err != nil {
		return err
	}
	if len(got) != len(value) {
		return fmt.Errorf("%w: a value of %d bytes, want %d", blob.ErrCorrupt, len(got), len(value))
	}
	copy(value, got)
	return nil
}

// Peek tells of the record of key what All does, without the value, and returns
// the value. It is no use. A record that is damaged is withdrawn, and the error
// wraps blob.ErrCorrupt then.
func (s *Store) Peek(ctx context.Context, key []byte) (Info, error) {
	if err := s.waitRebuiltFor(ctx); err != nil {
		return Info{}, err
	}
	h := s.secret.hash(key)
	i := Info{Key: key}
	var err error
	i.Value, err = s.get(func() (location, error) {
		l, use, err := s.index.peek(h)
		i.Bytes, i.LastUse = l.bytes(), time.Unix(int64(use), 0)
		return l, err
	}, h, key, makeBytes)
	return i, err
}

func makeBytes(n int64) []byte { return make([]byte, n) }

// get returns the value of key, of which h is the hash, in a slice of what buf
// makes. Where is asked where its record is.
func (s *Store) get(where func() (location, error), h hashed, key []byte, buf func(n int64) []byte) ([]byte, error) {
	// A record that is moved while it is read is found at another place then.
	for range 100 {
		l, err := where()
		if err != nil {
			return nil, err
		}
		if !l.isRecord() {
			return nil, blob.ErrNotFound
		}
		raw := buf(l.bytes())
		switch err := s.read(l, raw); {
		case err == nil:
			if p, ok := s.secret.parse(raw); ok && !p.dead && string(p.Key) == string(key) {
				return p.Value, nil
			}
		case !errors.Is(err, errGone) && !isEnd(err):
			return nil, err
		}
		if s.withdraw(h, l, raw) {
			return nil, fmt.Errorf("%w: its record is damaged", blob.ErrCorrupt)
		}
	}
	return nil, fmt.Errorf("%w: its record keeps moving", blob.ErrUnavailable)
}

// read fills raw with what stands at l: pread. The errors are errGone, one of
// isEnd, or wrap blob.ErrUnavailable.
func (s *Store) read(l location, raw []byte) error {
	seg := s.segs.all()[l.segment()]
	if seg == nil {
		return errGone
	}
	fd, err := s.segs.acquire(seg)
	if err != nil {
		return err
	}
	defer s.segs.release(seg)
	if err := preadFull(fd, raw, l.offset()); err != nil && !isEnd(err) {
		return classify(err)
	} else if err != nil {
		return err
	}
	return nil
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
	s.damaged(slices.Clone(raw))
	return true
}

// Has reports whether there is a record of key, as far as is known, and is no
// use of it.
func (s *Store) Has(key []byte) bool {
	l, _, err := s.index.peek(s.secret.hash(key))
	return err == nil && l.isRecord()
}
