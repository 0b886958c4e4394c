package file

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
)

var _ blob.PiecesWriter = (*writer)(nil)

// maxPieces is how many pieces one writev takes (IOV_MAX).
const maxPieces = 1024

// WritePieces implements blob.PiecesWriter: writev. A MiB in the pieces of 16 KiB
// that gRPC receives takes a third less time than by as many writes.
func (w *writer) WritePieces(pieces [][]byte) (int, error) {
	if w.tmp == "" || w.fd < 0 {
		return w.writeEach(pieces)
	}
	if err := w.ctxErr(); err != nil {
		return 0, err
	}
	total := int64(0)
	for _, p := range pieces {
		total += int64(len(p))
	}
	if total > w.d.Size()-w.n {
		w.n = w.d.Size() + 1 // so that it can't be committed any more
		return 0, fmt.Errorf("%w: more than the %d bytes of %s", blob.ErrCorrupt, w.d.Size(), w.d)
	}
	if err := writevAll(w.fd, pieces); err != nil {
		return 0, classify(err)
	}
	w.n += total
	return int(total), nil
}

// writeEach is WritePieces where there is no file to write to.
func (w *writer) writeEach(pieces [][]byte) (total int, err error) {
	for _, p := range pieces {
		n, err := w.Write(p)
		total += n
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// writevAll writes all of the pieces. It does not change the slice.
func writevAll(fd int, pieces [][]byte) error {
	for len(pieces) > 0 {
		now := pieces[:min(len(pieces), maxPieces)]
		n, err := unix.Writev(fd, now)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		}
		// What was written in part, which hardly ever happens, is ended by itself.
		for len(now) > 0 && n >= len(now[0]) {
			n -= len(now[0])
			now, pieces = now[1:], pieces[1:]
		}
		if len(now) == 0 {
			continue
		}
		if err := writeAll(fd, now[0][n:]); err != nil {
			return err
		}
		pieces = pieces[1:]
	}
	return nil
}
