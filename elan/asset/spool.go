package asset

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// spoolMemory is how much of a file stays in memory; most files are smaller than
// that, and never see the disk but in the store.
const spoolMemory = 1 << 20

// spool takes in a file of which neither size nor digest is known before its end:
// in memory at first, and then in a temporary file. It hashes on the way. It is
// used by one goroutine at a time.
type spool struct {
	dir  *scratch
	to   blob.Store
	fn   digest.Function
	max  int64
	mem  bytes.Buffer
	f    *os.File // nil while all is in mem
	h    hash.Hash
	n    int64
	sums hashes
	err  error // of our own disk, rather than of what is read
}

// newSpool returns an empty spool of what is to be in a store, which the caller
// closes. It becomes ready with reset.
func (s *Service) newSpool(to blob.Store) *spool {
	return &spool{dir: s.dir, to: to, max: s.o.MaxBytes}
}

// reset empties the spool, for a new attempt.
func (sp *spool) reset(fn digest.Function, sums checksums) error {
	sp.fn, sp.h, sp.n, sp.sums, sp.err = fn, nil, 0, newHashes(sums), nil
	if fn != digest.GITSHA1 { // which begins with the size
		sp.h = fn.New(0)
	}
	sp.mem.Reset()
	return sp.Close()
}

// Write implements io.Writer. Over the limit it fails with a FetchError.
func (sp *spool) Write(p []byte) (int, error) {
	if int64(len(p)) > sp.max-sp.n {
		return 0, failed(TooLarge, "it has more than the %d bytes that are taken", sp.max)
	}
	if sp.f == nil && sp.mem.Len()+len(p) > spoolMemory {
		if sp.err = sp.spill(); sp.err != nil {
			return 0, sp.err
		}
	}
	if sp.f == nil {
		sp.mem.Write(p)
	} else if _, err := sp.f.Write(p); err != nil {
		sp.err = fmt.Errorf("spool: %w", err)
		return 0, sp.err
	}
	if sp.h != nil {
		sp.h.Write(p)
	}
	if _, err := sp.sums.Write(p); err != nil {
		return 0, err
	}
	sp.n += int64(len(p))
	return len(p), nil
}

// spill goes on in a file.
func (sp *spool) spill() error {
	dir, err := sp.dir.get()
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	f, err := os.CreateTemp(dir, "file-")
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	sp.f = f
	if _, err := f.Write(sp.mem.Bytes()); err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	sp.mem = bytes.Buffer{}
	return nil
}

// digest is that of what was written.
func (sp *spool) digest() (digest.Digest, error) {
	if sp.h == nil {
		sp.h = sp.fn.New(sp.n)
		if _, err := io.Copy(sp.h, io.NewSectionReader(sp.reader(), 0, sp.n)); err != nil {
			return digest.Digest{}, fmt.Errorf("spool: %w", err)
		}
	}
	return digest.FromHash(sp.fn, sp.h, sp.n), nil
}

// reader reads what was written, at any place. It is good until the spool is
// stored, reset or closed.
func (sp *spool) reader() io.ReaderAt {
	if sp.f == nil {
		return bytes.NewReader(sp.mem.Bytes())
	}
	return sp.f
}

// store puts what was written into the store.
func (sp *spool) store(ctx context.Context) (digest.Digest, error) {
	d, err := sp.digest()
	if err != nil {
		return d, err
	}
	if missing, err := sp.to.FindMissing(ctx, []digest.Digest{d}); err != nil || len(missing) == 0 {
		return d, err
	}
	if sp.f == nil {
		_, err := blob.PutBytes(ctx, sp.to, sp.fn, sp.mem.Bytes())
		return d, err
	}
	// The store takes over a file that nobody can write to.
	name := sp.f.Name()
	if err := sp.f.Close(); err != nil {
		return d, fmt.Errorf("spool: %w", err)
	}
	f, err := os.Open(name) //nolint:gosec // a name of our own
	if err != nil {
		return d, fmt.Errorf("spool: %w", err)
	}
	sp.f = f
	adopter, ok := blob.As[blob.Adopter](sp.to)
	if !ok {
		return d, blob.Receive(ctx, sp.to, d, f)
	}
	got, err := adopter.Adopt(ctx, sp.fn, f)
	if err == nil && got != d {
		err = fmt.Errorf("spool: the file changed on the disk: it was %s, and is %s", d, got)
	}
	return d, err
}

// Close removes the file, if there is one.
func (sp *spool) Close() error {
	if sp.f == nil {
		return nil
	}
	f := sp.f
	sp.f = nil
	err := f.Close()
	if errors.Is(err, os.ErrClosed) {
		err = nil
	}
	return errors.Join(err, os.Remove(f.Name()))
}
