package file

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"
)

var _ io.ReaderAt = (*writer)(nil)

// ReadAt implements io.ReaderAt, for what is written so far: a tier that is
// being filled lets readers have it (elan/blob/tiered). It may be called beside
// Write, but not beside Commit and Close. What has no file of its own, since the
// blob is there already, can't be read so.
func (w *writer) ReadAt(p []byte, off int64) (int, error) {
	if w.fd < 0 {
		return 0, errors.New("read of a blob that is not being written")
	}
	got := 0
	for got < len(p) {
		n, err := pread(w.fd, p[got:], off+int64(got))
		if err != nil {
			return got, classify(err)
		}
		if n == 0 {
			return got, io.EOF
		}
		got += n
	}
	return got, nil
}

// writerFlags are those of the file of a blob that is being written.
const writerFlags = unix.O_CREAT | unix.O_EXCL | unix.O_RDWR
