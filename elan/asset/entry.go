package asset

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// instancePrefix keeps the entries of assets apart from the results of actions.
	// No client's instance name begins like that: it may have no segment "blobs".
	instancePrefix = "blobs/assets/"
	// entryMagic begins a stored entry. A message can't, since no field has number 0,
	// so that no ActionResult reads as an asset even where somebody chose its key.
	entryMagic = "\x00asset 1\n"
	// maxEntryBytes bounds one, and with it the references in it.
	maxEntryBytes = 4 << 20
)

// entry is what is remembered of an asset. It is stored as JSON.
type entry struct {
	Digest string `json:"digest"`
	// Since is when the fetch began, or when the asset was pushed.
	Since time.Time `json:"since"`
	// Asked is the Oldest of the request that the fetch was for. Clients that take
	// nothing old name a time in the future, an hour from now, in case clocks differ;
	// trying again, they name the same one.
	Asked       time.Time   `json:"asked,omitzero"`
	ExpireAt    time.Time   `json:"expire_at,omitzero"`
	Qualifiers  []Qualifier `json:"qualifiers,omitempty"`
	Blobs       []string    `json:"blobs,omitempty"`
	Directories []string    `json:"directories,omitempty"`
}

// key is under which name an asset is remembered.
func key(w *want, kind, uri string, qs []Qualifier) blob.EntryKey {
	b := append([]byte("mettle asset 1\n"), byte(w.fn))
	add := func(s string) { b = append(binary.AppendUvarint(b, uint64(len(s))), s...) }
	add(kind)
	add(uri)
	for _, q := range qs {
		add(q.Name)
		add(q.Value)
	}
	return blob.EntryKey{Instance: instancePrefix + w.instance, Action: digest.Of(digest.SHA256, b)}
}

// uriKey is that of an asset under one of its URIs.
func uriKey(w *want, uri string) blob.EntryKey { return key(w, string(w.kind), uri, w.identity()) }

// sumKey is that of a file by its checksum alone, or by it and what it is for.
func sumKey(w *want, c checksum, canonID string) blob.EntryKey {
	return key(w, "checksum", c.String(), []Qualifier{{qCanonicalID, canonID}})
}

// recall reads an entry. What can't be read as one is not there.
func (s *Service) recall(ctx context.Context, k blob.EntryKey) (*entry, error) {
	value, err := s.o.Entries.Entry(ctx, k)
	if err != nil {
		return nil, fmt.Errorf("asset: %w", err)
	}
	e := &entry{}
	text, ok := strings.CutPrefix(string(value), entryMagic)
	if !ok || json.Unmarshal([]byte(text), e) != nil {
		return nil, fmt.Errorf("asset: %w: the entry is malformed", blob.ErrNotFound)
	}
	return e, nil
}

// remember stores an entry.
func (s *Service) remember(ctx context.Context, k blob.EntryKey, e *entry) error {
	text, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("asset: %w", err)
	}
	if len(entryMagic)+len(text) > maxEntryBytes {
		return fmt.Errorf("%w: an entry of %d bytes, at most %d are kept: the asset refers to too much", ErrInvalid, len(text), maxEntryBytes)
	}
	if err := s.o.Entries.PutEntry(ctx, k, append([]byte(entryMagic), text...)); err != nil {
		return fmt.Errorf("asset: %w", err)
	}
	return nil
}

// known looks for the asset among what was fetched and pushed, under each of the
// URIs and then by its checksum.
func (s *Service) known(ctx context.Context, w *want) (Response, bool, error) {
	type candidate struct {
		key blob.EntryKey
		uri string
	}
	var candidates []candidate
	for _, u := range w.uris {
		candidates = append(candidates, candidate{uriKey(w, u), u})
	}
	// A file whose bytes are known needs no URI. It does where something beside the
	// checksum says what is meant.
	if w.kind == blobs && len(w.unsupported) == 0 {
		for _, c := range w.sums {
			candidates = append(candidates, candidate{sumKey(w, c, w.canonID), ""})
		}
	}
	now := time.Now()
	for _, c := range candidates {
		e, err := s.recall(ctx, c.key)
		if errors.Is(err, blob.ErrNotFound) {
			continue
		}
		if err != nil {
			return Response{}, false, err
		}
		if !e.serves(w, now) {
			continue
		}
		d, ok, err := whole(ctx, w, e)
		if err != nil {
			return Response{}, false, err
		}
		if ok {
			qs := e.Qualifiers
			if c.uri == "" {
				qs = w.known // those of e were another request's
			}
			return Response{Digest: d, URI: c.uri, Qualifiers: qs, ExpiresAt: s.expiry(now, e.ExpireAt)}, true, nil
		}
	}
	return Response{}, false, nil
}

// serves tells whether the age of e is right.
func (e *entry) serves(w *want, now time.Time) bool {
	if !e.ExpireAt.IsZero() && !now.Before(e.ExpireAt) {
		return false
	}
	return w.oldest.IsZero() || !e.Since.Before(w.oldest) || e.Asked.Equal(w.oldest)
}

// expiry is what clients are told of how long an asset stays at least.
func (s *Service) expiry(now, expireAt time.Time) time.Time {
	if s.o.MinLifetime == 0 {
		return time.Time{}
	}
	until := now.Add(s.o.MinLifetime)
	if !expireAt.IsZero() && expireAt.Before(until) {
		return expireAt
	}
	return until
}

// whole tells whether all that e refers to is in the store, and starts the
// lifetimes of it anew.
func whole(ctx context.Context, w *want, e *entry) (digest.Digest, bool, error) {
	read := func(texts []string) ([]digest.Digest, bool) {
		ds := make([]digest.Digest, len(texts))
		for i, text := range texts {
			var err error
			if ds[i], err = digest.Parse(text); err != nil {
				return nil, false
			}
		}
		return ds, true
	}
	d, err := digest.Parse(e.Digest)
	files, fok := read(e.Blobs)
	dirs, dok := read(e.Directories)
	if err != nil || !fok || !dok || d.Function() != w.fn {
		return digest.Digest{}, false, nil //nolint:nilerr // an entry that can't be read is none
	}
	if w.kind == directories {
		dirs = append(dirs, d)
	} else {
		files = append(files, d)
	}
	gone, err := missing(ctx, w.store, files, dirs)
	return d, err == nil && len(gone) == 0, err
}
