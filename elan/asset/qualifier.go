package asset

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// The qualifiers that are understood. The first five are those of the API's
// qualifiers.md, the others are Bazel's.
const (
	qResourceType = "resource_type"
	qChecksum     = "checksum.sri"
	qDirectory    = "directory"
	qBranch       = "vcs.branch"
	qCommit       = "vcs.commit"

	// qCanonicalID names what a download is for: content that came for another one
	// does not count as known.
	qCanonicalID = "bazel.canonical_id"
	// qAuthHeaders is a JSON object, by URL, of objects of headers; Bazel 2 to 7.0.
	qAuthHeaders = "bazel.auth_headers"
	// qHeader and qHeaderURL are followed by a header's name, and by the index of a
	// URI, a colon and a header's name; Bazel 7.1 and 8.
	qHeader    = "http_header:"
	qHeaderURL = "http_header_url:"
)

// The bounds of requests: far more than clients send.
const (
	maxURIs           = 100
	maxURIBytes       = 8 << 10
	maxQualifiers     = 500
	maxQualifierBytes = 64 << 10 // of all together
)

// want is a checked request.
type want struct {
	kind     kind
	instance string
	store    blob.Store // of the instance; set by the Service
	fn       digest.Function
	uris     []string
	// known are the qualifiers that say which content is meant, sorted: the part of
	// the request that an entry is found by, and that responses repeat.
	known []Qualifier
	// secret are those that say how it is got, and what they say.
	secret  []Qualifier
	headers headers
	// unsupported are the names of those that no fetcher understands. They may yet
	// be those of something that was pushed.
	unsupported []string

	sums                                             checksums
	resourceType, directory, branch, commit, canonID string

	timeout time.Duration
	oldest  time.Time
}

// newWant checks r. The errors wrap ErrInvalid.
func newWant(k kind, r Request) (*want, error) {
	w := &want{
		kind: k, instance: r.Instance, fn: r.Function, uris: r.URIs, timeout: r.Timeout, oldest: r.Oldest,
		headers: headers{byURI: map[string]http.Header{}, byIndex: map[int]http.Header{}, all: http.Header{}},
	}
	if w.fn == 0 {
		w.fn = digest.SHA256
	}
	if !w.fn.Valid() {
		return nil, fmt.Errorf("%w: unknown digest function", ErrInvalid)
	}
	if r.Timeout < 0 {
		return nil, fmt.Errorf("%w: the timeout %v is negative", ErrInvalid, r.Timeout)
	}
	if err := checkURIs(r.URIs); err != nil {
		return nil, err
	}
	return w, w.read(r.Qualifiers)
}

func checkURIs(uris []string) error {
	if len(uris) == 0 || len(uris) > maxURIs {
		return fmt.Errorf("%w: %d URIs, want 1 to %d", ErrInvalid, len(uris), maxURIs)
	}
	for _, u := range uris {
		if u == "" || len(u) > maxURIBytes || !utf8.ValidString(u) {
			return fmt.Errorf("%w: a URI has %d bytes, want 1 to %d, in UTF-8", ErrInvalid, len(u), maxURIBytes)
		}
	}
	return nil
}

// read takes in the qualifiers.
func (w *want) read(qs []Qualifier) error {
	total := 0
	seen := map[string]bool{}
	if len(qs) > maxQualifiers {
		return fmt.Errorf("%w: %d qualifiers, at most %d are taken", ErrInvalid, len(qs), maxQualifiers)
	}
	for _, q := range qs {
		if total += len(q.Name) + len(q.Value); total > maxQualifierBytes {
			return fmt.Errorf("%w: the qualifiers have more than %d bytes", ErrInvalid, maxQualifierBytes)
		}
		if q.Name == "" {
			return fmt.Errorf("%w: a qualifier has no name", ErrInvalid)
		}
		// Bazel repeats the name for each value of a header.
		if seen[q.Name] && !strings.HasPrefix(q.Name, qHeaderURL) {
			return fmt.Errorf("%w: qualifier %.200q is there twice", ErrInvalid, q.Name)
		}
		seen[q.Name] = true
		if err := w.readOne(q); err != nil {
			return err
		}
	}
	byName := func(a, b Qualifier) int { return strings.Compare(a.Name, b.Name) }
	slices.SortFunc(w.known, byName)
	slices.SortStableFunc(w.secret, byName)
	slices.Sort(w.unsupported)
	if w.branch != "" && w.kind == blobs {
		w.unsupported = append(w.unsupported, qBranch)
	}
	if w.commit != "" && w.kind == blobs {
		w.unsupported = append(w.unsupported, qCommit)
	}
	if w.directory != "" && w.kind == blobs {
		w.unsupported = append(w.unsupported, qDirectory)
	}
	return nil
}

func (w *want) readOne(q Qualifier) (err error) {
	known := true
	switch {
	case q.Name == qResourceType:
		w.resourceType = q.Value
	case q.Name == qChecksum:
		if w.sums, err = parseSRI(q.Value); err != nil {
			return err
		}
		q.Value = w.sums.String()
	case q.Name == qDirectory:
		if w.directory, err = readDirectory(q.Value); err != nil {
			return err
		}
	case q.Name == qBranch:
		w.branch, err = q.Value, checkRef(q)
	case q.Name == qCommit:
		w.commit, err = q.Value, checkRef(q)
	case q.Name == qCanonicalID:
		w.canonID = q.Value
	case q.Name == qAuthHeaders:
		known, err = false, w.headers.readJSON(q.Value)
	case strings.HasPrefix(q.Name, qHeaderURL), strings.HasPrefix(q.Name, qHeader):
		known, err = false, w.headers.read(q, len(w.uris))
	default:
		w.unsupported = append(w.unsupported, q.Name)
	}
	if errors.Is(err, errHeader) {
		// It may not be sent, as if nobody knew it.
		w.unsupported = append(w.unsupported, q.Name)
		err = nil
	}
	if known {
		w.known = append(w.known, q)
	} else {
		w.secret = append(w.secret, q)
	}
	return err
}

// readDirectory checks the path of a directory within an asset.
func readDirectory(p string) (string, error) {
	if p == "" || len(p) > maxPathBytes || path.IsAbs(p) || path.Clean(p) != p || p == ".." || strings.HasPrefix(p, "../") ||
		strings.ContainsRune(p, 0) || !utf8.ValidString(p) {
		return "", fmt.Errorf("%w: directory %.200q, want a relative path below the asset's root, without a slash at its end", ErrInvalid, p)
	}
	if p == "." {
		p = ""
	}
	return p, nil
}

// checkRef makes sure that the name of a branch or commit is nothing else to git:
// no option, no refspec, no expression.
func checkRef(q Qualifier) error {
	bad := q.Value == "" || len(q.Value) > 500 || q.Value == "@" || strings.HasPrefix(q.Value, "-") || strings.HasPrefix(q.Value, "/") ||
		strings.Contains(q.Value, "..") || strings.Contains(q.Value, "//") || strings.Contains(q.Value, "@{") ||
		strings.HasSuffix(q.Value, "/") || strings.HasSuffix(q.Value, ".lock") || strings.HasSuffix(q.Value, ".") ||
		strings.ContainsAny(q.Value, "+:^~?*[\\ \x7f") || strings.ContainsFunc(q.Value, func(r rune) bool { return r < ' ' }) || !utf8.ValidString(q.Value)
	if bad {
		return fmt.Errorf("%w: %s %.200q is no name that git has for one", ErrInvalid, q.Name, q.Value)
	}
	return nil
}

// identity is what an entry is found by, beside a URI. Where a checksum says which
// bytes are meant, it does not matter who may ask the origin for them; without one
// each has what the origin gave to the same headers.
func (w *want) identity() []Qualifier {
	if len(w.sums) > 0 {
		return w.known
	}
	return slices.Concat(w.known, w.secret)
}

// headers are those that the qualifiers ask for.
type headers struct {
	all     http.Header
	byIndex map[int]http.Header
	byURI   map[string]http.Header // by URI, or by host
}

// errHeader is of a header that may not be set.
var errHeader = errors.New("header may not be set")

// readJSON takes in bazel.auth_headers.
func (h *headers) readJSON(value string) error {
	var byURI map[string]map[string]string
	if err := json.Unmarshal([]byte(value), &byURI); err != nil {
		return fmt.Errorf("%w: %s is not a JSON object of objects of headers", ErrInvalid, qAuthHeaders)
	}
	for uri, hs := range byURI {
		for name, v := range hs {
			if !validHeader(name, v) {
				return errHeader
			}
			if h.byURI[uri] == nil {
				h.byURI[uri] = http.Header{}
			}
			h.byURI[uri].Set(name, v)
		}
	}
	return nil
}

// read takes in http_header: and http_header_url:.
func (h *headers) read(q Qualifier, uris int) error {
	if name, ok := strings.CutPrefix(q.Name, qHeader); ok {
		if !validHeader(name, q.Value) {
			return errHeader
		}
		h.all.Add(name, q.Value)
		return nil
	}
	index, name, ok := strings.Cut(strings.TrimPrefix(q.Name, qHeaderURL), ":")
	i, err := strconv.Atoi(index)
	if !ok || err != nil || i < 0 || i >= uris {
		return fmt.Errorf("%w: qualifier %.200q, want %sN:NAME with N below the number of URIs, %d", ErrInvalid, q.Name, qHeaderURL, uris)
	}
	if !validHeader(name, q.Value) {
		return errHeader
	}
	if h.byIndex[i] == nil {
		h.byIndex[i] = http.Header{}
	}
	h.byIndex[i].Add(name, q.Value)
	return nil
}

// of are the headers for the URI with the given index. The closer one wins.
func (h *headers) of(i int, u *url.URL, uri string) http.Header {
	hs := h.all.Clone()
	maps.Copy(hs, h.byURI[u.Host])
	maps.Copy(hs, h.byURI[uri])
	maps.Copy(hs, h.byIndex[i])
	return hs
}

// validHeader tells whether a client may set a header. Those of the connection
// are ours; with a range or a condition the answer would not be the whole file, and
// be remembered as if it were.
func validHeader(name, value string) bool {
	if name == "" || strings.ContainsFunc(name, func(r rune) bool { return !isToken(r) }) ||
		strings.ContainsFunc(value, func(r rune) bool { return (r < ' ' && r != '\t') || r == 0x7f }) {
		return false
	}
	switch name = http.CanonicalHeaderKey(name); name {
	case "Host", "Range", "Accept-Encoding", "Connection", "Content-Length", "Transfer-Encoding", "Te", "Trailer", "Upgrade",
		"Expect", "Keep-Alive", "Referer", "Content-Encoding", "Http2-Settings":
		return false
	}
	return !strings.HasPrefix(name, "If-") && !strings.HasPrefix(name, "Proxy-")
}

// isToken tells the characters of which names of headers are (RFC 9110, 5.6.2).
func isToken(r rune) bool {
	return '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || strings.ContainsRune("!#$%&'*+-.^_`|~", r)
}
