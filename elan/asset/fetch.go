package asset

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/mettle-build/mettle/elan/digest"
)

// fetch answers from what is known, or has it fetched.
func (s *Service) fetch(ctx context.Context, k kind, r Request) (resp Response, err error) {
	began := time.Now()
	hit := false
	defer func() { s.metrics.fetched(k, hit, err, time.Since(began)) }()
	w, err := newWant(k, r)
	if err != nil {
		return Response{}, err
	}
	w.store = s.o.Stores(r.Instance)
	if resp, hit, err = s.known(ctx, w); hit || err != nil {
		return resp, err
	}
	sources, err := w.sources()
	if err != nil {
		return Response{}, err
	}
	return s.fly(ctx, w, func(ctx context.Context) (Response, error) { return s.fetchAny(ctx, w, sources) })
}

// source is a URI that can be fetched.
type source struct {
	index int
	uri   string
	url   *url.URL
	git   bool
}

// sources are the URIs of w that can be fetched, in their order. Where there are
// none, the asset is one that somebody has to push.
func (w *want) sources() ([]source, error) {
	var found []source
	var err error
	for i, uri := range w.uris {
		src, e := w.source(i, uri)
		if e != nil {
			err = &FetchError{Reason: e.Reason, URI: uri, Err: e.Err}
			continue
		}
		found = append(found, src)
	}
	if len(found) == 0 {
		return nil, err
	}
	unsupported := slices.Clone(w.unsupported)
	if w.kind == directories && w.needsGit() && len(w.sums) > 0 {
		unsupported = append(unsupported, qChecksum)
	}
	if w.kind == blobs && w.resourceType == typeGit {
		unsupported = append(unsupported, qResourceType)
	}
	if len(unsupported) > 0 {
		return nil, &UnsupportedError{Names: slices.Compact(slices.Sorted(slices.Values(unsupported)))}
	}
	return found, nil
}

// typeGit is the resource_type of git repositories (qualifiers.md).
const typeGit = "application/x-git"

// needsGit tells whether the qualifiers say that the asset is in a repository.
func (w *want) needsGit() bool {
	return w.resourceType == typeGit || w.branch != "" || w.commit != ""
}

func (w *want) source(i int, uri string) (source, *FetchError) {
	u, err := url.Parse(uri)
	if err != nil {
		// Its error would repeat the URI.
		return source{}, &FetchError{Reason: NotFound, Err: errors.New("it was not pushed, and is no URL")}
	}
	switch u.Scheme {
	case "http", "https":
	case "file", "ssh", "git", "git+ssh", "ftp", "ftps", "gopher", "data":
		return source{}, &FetchError{Reason: Denied, Err: fmt.Errorf("it was not pushed, and nothing is fetched by %s, only by http and https", u.Scheme)}
	default:
		return source{}, &FetchError{Reason: NotFound, Err: fmt.Errorf("it was not pushed, and %.50q is no scheme to fetch by", u.Scheme)}
	}
	if u.Hostname() == "" || u.Opaque != "" {
		return source{}, &FetchError{Reason: NotFound, Err: errors.New("it was not pushed, and the URL names no host")}
	}
	u.Fragment, u.RawFragment = "", ""
	git := w.kind == directories && (w.needsGit() || (w.resourceType == "" && strings.HasSuffix(u.Path, ".git")))
	return source{index: i, uri: uri, url: u, git: git}, nil
}

// fetched is what a fetcher brings.
type fetched struct {
	digest     digest.Digest
	sum        checksum    // the one of those wanted that the bytes have
	qualifiers []Qualifier // what is known beside those of the request
}

// fetchAny tries one source after the other, and remembers what one brought.
func (s *Service) fetchAny(ctx context.Context, w *want, sources []source) (Response, error) {
	began := time.Now().UTC()
	var failures []string
	var last *FetchError
	for _, src := range sources {
		got, err := s.fetchOne(ctx, w, src)
		if err == nil {
			return s.keep(ctx, w, src, got, began)
		}
		if ctx.Err() != nil {
			return Response{}, &FetchError{Reason: Aborted, URI: src.uri, Err: ctx.Err()}
		}
		f, ok := errors.AsType[*FetchError](err)
		if !ok {
			return Response{}, fmt.Errorf("fetch from %s: %w", origin(src.uri), err)
		}
		last = &FetchError{Reason: f.Reason, URI: src.uri, Err: f.Err}
		if len(failures) < 10 {
			failures = append(failures, last.Error())
		}
	}
	if len(sources) > 1 {
		last.Err = fmt.Errorf("%w (of %d URIs: %s)", last.Err, len(sources), strings.Join(failures, "; "))
	}
	return Response{}, last
}

// fetchOne fetches from one source.
func (s *Service) fetchOne(ctx context.Context, w *want, src source) (fetched, error) {
	switch {
	case src.git:
		return s.git.fetch(ctx, w, src)
	case w.kind == directories:
		return s.fetchArchive(ctx, w, src)
	}
	sp := s.newSpool(w.store)
	defer sp.Close() //nolint:errcheck // nothing of it is kept
	sum, err := s.http.fetch(ctx, w, src, sp)
	if err != nil {
		return fetched{}, err
	}
	d, err := sp.store(ctx)
	return fetched{digest: d, sum: sum}, err
}

// keep remembers what was fetched, and makes the response of it.
func (s *Service) keep(ctx context.Context, w *want, src source, got fetched, began time.Time) (Response, error) {
	e := &entry{Digest: named(got.digest), Since: began, Asked: w.oldest, Qualifiers: merge(w.known, got.qualifiers)}
	if err := s.remember(ctx, uriKey(w, src.uri), e); err != nil {
		return Response{}, err
	}
	if w.kind == blobs && (len(w.sums) == 0 || got.sum.alg != "") {
		if err := s.rememberSums(ctx, w, e, got.sum); err != nil {
			return Response{}, err
		}
	}
	return Response{Digest: got.digest, URI: src.uri, Qualifiers: e.Qualifiers, ExpiresAt: s.expiry(time.Now(), time.Time{})}, nil
}

// merge returns qs with those of more, which win.
func merge(qs, more []Qualifier) []Qualifier {
	merged := slices.Clone(more)
	for _, q := range qs {
		if !slices.ContainsFunc(more, func(m Qualifier) bool { return m.Name == q.Name }) {
			merged = append(merged, q)
		}
	}
	slices.SortFunc(merged, func(a, b Qualifier) int { return strings.Compare(a.Name, b.Name) })
	return merged
}
