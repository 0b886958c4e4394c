package tiered

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// askFirst is from which size on Adopt asks the authority whether it has a blob,
// rather than send it: a round trip against so many bytes.
const askFirst = 64 << 10

// local is what a tier on the local disk adds: files.
type local struct {
	s *Store
	t *Tier // nil: the authority
	blob.Auditor
	linker  blob.Linker
	adopter blob.SpaceAdopter
}

var (
	_ blob.Linker       = local{}
	_ blob.Adopter      = local{}
	_ blob.SpaceAdopter = local{}
	_ blob.Auditor      = local{}
	_ blob.Fetcher      = local{}
	_ blob.LateAdopter  = local{}
	_ blob.TreeFetcher  = local{}
)

// local finds the first tier that has files.
func (s *Store) local() (local, bool) {
	for i := range s.uppers {
		if l, ok := abilities(s.uppers[i].Store); ok {
			l.s, l.t = s, &s.uppers[i]
			return l, true
		}
	}
	l, ok := abilities(s.authority)
	l.s = s
	return l, ok
}

func abilities(s blob.Store) (l local, ok bool) {
	var links, adopts, audits bool
	l.linker, links = blob.As[blob.Linker](s)
	l.adopter, adopts = blob.As[blob.SpaceAdopter](s)
	l.Auditor, audits = blob.As[blob.Auditor](s)
	return l, links && adopts && audits
}

// Link implements blob.Linker. A blob that the tier does not have is fetched
// into it; where the tier has no room for it, or takes no such blob, dst is a
// copy.
func (l local) Link(ctx context.Context, d digest.Digest, dst string, mode blob.LinkMode) error {
	err := l.linker.Link(ctx, d, dst, mode)
	if err == nil && l.t != nil {
		l.s.hit(l.t.Name, d)
	}
	if l.t == nil || !errors.Is(err, blob.ErrNotFound) {
		return err //nolint:wrapcheck // the store's own
	}
	r, err := l.s.Open(ctx, d, 0)
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // opened for reading
	// Reading all of it puts it into the tier, if the tier takes it.
	if l.t.takes(d) {
		if err := l.fill(ctx, d, r); err == nil {
			if err := l.linker.Link(ctx, d, dst, mode); !errors.Is(err, blob.ErrNotFound) {
				return err //nolint:wrapcheck // the store's own
			}
		}
		_ = r.Close() // it was read to its end, or failed
		if r, err = l.s.Open(ctx, d, 0); err != nil {
			return err
		}
	}
	return copyTo(dst, r, mode)
}

// fill makes sure that the tier has what r brings.
func (l local) fill(ctx context.Context, d digest.Digest, r io.Reader) error {
	if d.Size() > WholeBytes {
		_, err := io.Copy(io.Discard, r)
		return err //nolint:wrapcheck // it is looked at for being there
	}
	// A flight fills behind its readers' backs, so that here we do it again.
	return blob.Receive(ctx, l.t.Store, d, r) //nolint:wrapcheck // it is looked at for being there
}

// copyTo makes dst, which must not exist, a file of what r brings.
func copyTo(dst string, r io.Reader, mode blob.LinkMode) error {
	perm := os.FileMode(0o444)
	if mode == blob.LinkExecutable {
		perm = 0o555
	}
	f, err := os.OpenFile(dst, os.O_CREATE|os.O_EXCL|os.O_WRONLY, perm)
	if err != nil {
		return err //nolint:wrapcheck // it names the file
	}
	_, err = io.Copy(f, r)
	if err = errors.Join(err, f.Chmod(perm), f.Close()); err != nil {
		return errors.Join(err, os.Remove(dst))
	}
	return nil
}

// Adopt implements blob.Adopter. When it returns, the authority has the blob too.
func (l local) Adopt(ctx context.Context, fn digest.Function, f *os.File) (digest.Digest, error) {
	return l.AdoptIn(ctx, digest.Space{}, fn, f)
}

// AdoptIn implements blob.SpaceAdopter.
func (l local) AdoptIn(ctx context.Context, space digest.Space, fn digest.Function, f *os.File) (digest.Digest, error) {
	d, err := l.adopter.AdoptIn(ctx, space, fn, f)
	if err != nil || l.t == nil || d.IsEmpty() {
		return d, err //nolint:wrapcheck // the store's own
	}
	if err := l.pass(ctx, d); err != nil {
		return digest.Digest{}, fmt.Errorf("adopt blob %s: %w", d, err)
	}
	return d, nil
}

// pass puts into the authority what the tier has.
func (l local) pass(ctx context.Context, d digest.Digest) error {
	if d.Size() >= askFirst {
		missing, err := l.s.authority.FindMissing(ctx, []digest.Digest{d})
		if err != nil || len(missing) == 0 {
			return err //nolint:wrapcheck // the store's own
		}
	}
	err := l.send(ctx, d)
	if err == nil {
		l.s.touches.told(d)
	}
	return err
}

// send sends the authority what the tier has.
func (l local) send(ctx context.Context, d digest.Digest) error {
	return blob.Repeat(ctx, l.s.authority, func(ctx context.Context) error {
		r, err := l.t.Store.Open(ctx, d, 0)
		if err != nil {
			return err //nolint:wrapcheck // the store's own
		}
		defer r.Close() //nolint:errcheck // opened for reading
		return blob.Receive(ctx, l.s.authority, d, r)
	})
}
