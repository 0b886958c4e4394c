package compressed

import (
	"context"
	"fmt"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/compress"
	"github.com/mettle-build/mettle/elan/digest"
)

// Create implements blob.Creator. A MiB at a time is compressed, if the first
// bytes of the blob say that it pays.
func (s *Store) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	w, err := s.Store.Create(ctx, d)
	if err != nil {
		return nil, err //nolint:wrapcheck // the store's own
	}
	if d.IsEmpty() {
		return w, nil
	}
	return &writer{s: s, d: d, inside: w, cancelled: ctx.Err}, nil
}

// writer puts a blob into a container.
type writer struct {
	s         *Store
	d         digest.Digest
	inside    blob.Writer
	cancelled func() error // the Err of the context that bounds the writing
	form      form
	begun     bool   // the form is chosen, and the header written
	n         int64  // bytes of the blob
	stored    int64  // bytes of the container
	pending   []byte // of the blob, and not yet written
	frame     []byte // room for what they are compressed to
	framed    bool   // frame is all that is pending
	tried     int    // bytes that begin compressed
	err       error  // after which nothing comes of the blob
}

// Write implements io.Writer.
func (w *writer) Write(p []byte) (int, error) {
	if w.err == nil {
		w.err = w.cancelled()
	}
	if w.err == nil && int64(len(p)) > w.d.Size()-w.n {
		w.err = fmt.Errorf("%w: more than the %d bytes of %s", blob.ErrCorrupt, w.d.Size(), w.d)
	}
	if w.err != nil {
		return 0, w.err
	}
	w.n += int64(len(p))
	total := len(p)
	for len(p) > 0 && w.err == nil {
		if w.begun && w.form == raw {
			w.err = w.put(p)
			break
		}
		n := min(len(p), compress.FrameBytes-len(w.pending))
		w.grow(n)
		w.pending = append(w.pending, p[:n]...)
		p = p[n:]
		if len(w.pending) == compress.FrameBytes {
			w.err = w.flush()
		}
	}
	if w.err != nil {
		return 0, w.err
	}
	return total, nil
}

// grow makes room for n bytes more: as much as the blob needs, where that is no
// more than it has brought so far.
func (w *writer) grow(n int) {
	if need := len(w.pending) + n; need > cap(w.pending) {
		grown := make([]byte, len(w.pending), min(max(2*cap(w.pending), need), compress.FrameBytes))
		copy(grown, w.pending)
		w.pending = grown
	}
}

// flush writes what is pending.
func (w *writer) flush() error {
	if len(w.pending) == 0 && w.begun {
		return nil
	}
	if !w.begun {
		if err := w.begin(); err != nil {
			return err
		}
	}
	out := w.pending
	if w.form == zstdForm {
		if !w.framed {
			w.frame = w.s.codec.Append(w.frame[:0], w.pending)
		}
		out = w.frame
	}
	err := w.put(out)
	w.pending, w.framed = w.pending[:0], false
	return err
}

// begin chooses the form by what is pending: all of a small blob, or the first
// MiB.
func (w *writer) begin() error {
	w.begun = true
	if w.d.Size() >= w.s.minBytes && w.try(min(len(w.pending), sampleBytes)) && w.try(len(w.pending)) {
		w.form, w.framed = zstdForm, true
	}
	return w.put(appendHeader(nil, w.form, w.d.Size()))
}

// try compresses the first n bytes that are pending, and reports whether that
// pays.
func (w *writer) try(n int) bool {
	if w.tried != n {
		w.tried = n
		w.frame = w.s.codec.Append(w.frame[:0], w.pending[:n])
	}
	return w.s.pays(int64(n), int64(len(w.frame)))
}

func (w *writer) put(p []byte) error {
	n, err := w.inside.Write(p)
	w.stored += int64(n)
	return err //nolint:wrapcheck // the store's own
}

// Commit implements blob.Writer.
func (w *writer) Commit() error {
	if w.err == nil && w.n != w.d.Size() {
		w.err = fmt.Errorf("%w: %d bytes of %s were written", blob.ErrCorrupt, w.n, w.d)
	}
	if w.err == nil {
		w.err = w.flush()
	}
	if w.err != nil {
		return w.err
	}
	if err := w.inside.Commit(); err != nil {
		w.err = err
		return err //nolint:wrapcheck // the store's own
	}
	w.s.metrics.wrote([...]string{raw: "raw", zstdForm: "zstd"}[w.form], w.n, w.stored)
	return nil
}

// Close implements blob.Writer.
func (w *writer) Close() error {
	if w.err == nil {
		w.err = fmt.Errorf("write blob %s: the writer is closed", w.d)
	}
	w.pending, w.frame = nil, nil
	return w.inside.Close() //nolint:wrapcheck // the store's own
}
