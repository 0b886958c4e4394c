package asset

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// maxReferences bounds what a pushed asset may refer to by itself.
const maxReferences = 10_000

// push remembers an asset.
func (s *Service) push(ctx context.Context, k kind, p Push) error {
	// Clients' own qualifiers are taken: only who asks with the same ones gets it.
	w, err := newWant(k, Request{Instance: p.Instance, URIs: p.URIs, Qualifiers: p.Qualifiers, Function: p.Digest.Function()})
	if err != nil {
		return err
	}
	if k == directories && len(w.sums) > 0 {
		// It is that of an archive, which is not here. Who asks with it would take what
		// anybody pushed for what has the checksum.
		return &UnsupportedError{Names: []string{qChecksum}}
	}
	w.store = s.o.Stores(p.Instance)
	if p.Digest.IsZero() {
		return fmt.Errorf("%w: the digest is absent", ErrInvalid)
	}
	if n := len(p.Blobs) + len(p.Directories); n > maxReferences {
		return fmt.Errorf("%w: %d references, at most %d are taken", ErrInvalid, n, maxReferences)
	}
	files, dirs := p.Blobs, p.Directories
	if k == blobs {
		files = append(slices.Clip(files), p.Digest)
	} else {
		dirs = append(slices.Clip(dirs), p.Digest)
	}
	gone, err := missing(ctx, w.store, files, dirs)
	if err != nil {
		return err
	}
	if len(gone) > 0 {
		return fmt.Errorf("push asset %s: %w", p.Digest, &blob.MissingError{Digests: gone})
	}
	e := &entry{Digest: named(p.Digest), Since: time.Now().UTC(), ExpireAt: p.ExpireAt, Qualifiers: w.known}
	for _, d := range p.Blobs {
		e.Blobs = append(e.Blobs, named(d))
	}
	for _, d := range p.Directories {
		e.Directories = append(e.Directories, named(d))
	}
	var sum checksum
	if k == blobs && len(w.sums) > 0 {
		if sum, err = verify(ctx, w.store, p.Digest, w.sums); err != nil {
			return err
		}
	}
	for _, uri := range w.uris {
		if err := s.remember(ctx, uriKey(w, uri), e); err != nil {
			return err
		}
	}
	if sum.alg == "" || len(w.unsupported) > 0 {
		return nil
	}
	return s.rememberSums(ctx, w, e, sum)
}

// verify makes sure that the blob d has one of the checksums, so that a checksum
// never stands for bytes that nobody has compared with it.
func verify(ctx context.Context, o blob.Opener, d digest.Digest, sums checksums) (checksum, error) {
	if c, ok := checksumOf(d); ok && slices.Contains(sums, c) {
		return c, nil
	}
	h := newHashes(sums)
	r, err := o.Open(ctx, d, 0)
	if err != nil {
		return checksum{}, fmt.Errorf("asset %s: %w", d, err)
	}
	defer r.Close() //nolint:errcheck // opened for reading
	if _, err := io.Copy(h, r); err != nil {
		return checksum{}, fmt.Errorf("asset %s: %w", d, err)
	}
	c, err := h.check(sums)
	if err != nil {
		return checksum{}, fmt.Errorf("%w: asset %s: %w", ErrInvalid, d, err)
	}
	return c, nil
}

// rememberSums stores e by checksum, for those who ask for the same bytes under
// other URIs: by the one that was compared, and by that which the digest is itself.
func (s *Service) rememberSums(ctx context.Context, w *want, e *entry, matched checksum) error {
	d, err := digest.Parse(e.Digest)
	if err != nil {
		return fmt.Errorf("asset: %w", err)
	}
	keys := map[blob.EntryKey]struct{}{}
	add := func(c checksum) {
		keys[sumKey(w, c, "")] = struct{}{}
		keys[sumKey(w, c, w.canonID)] = struct{}{}
	}
	if matched.alg != "" {
		add(matched)
	}
	if c, ok := checksumOf(d); ok {
		add(c)
	}
	for k := range keys {
		if err := s.remember(ctx, k, e); err != nil {
			return err
		}
	}
	return nil
}

// named is d with its function, as entries have it.
func named(d digest.Digest) string {
	if d.Function().Named() {
		return d.String()
	}
	return d.Function().String() + "/" + d.String()
}
