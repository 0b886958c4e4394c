package asset

import (
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"

	"github.com/mettle-build/mettle/elan/blob"
)

// ErrInvalid is wrapped by the errors about malformed requests.
var ErrInvalid = errors.New("invalid asset request")

// UnsupportedError names the qualifiers that a fetch can't heed. It matches
// ErrInvalid.
type UnsupportedError struct {
	// Names are at least one.
	Names []string
}

// Error implements error.
func (e *UnsupportedError) Error() string {
	quoted := make([]string, len(e.Names))
	for i, n := range e.Names {
		quoted[i] = strconv.Quote(n)
	}
	return "qualifiers not supported: " + strings.Join(quoted, ", ")
}

// Is makes errors.Is(e, ErrInvalid) true.
func (e *UnsupportedError) Is(target error) bool { return target == ErrInvalid }

// Reason is the class of a FetchError.
type Reason uint8

// The reasons for which fetches fail.
const (
	NotFound Reason = iota + 1 // the origin has no such asset, or nobody knows it
	Denied                     // the origin refused, or it may not be asked
	Aborted                    // the origin broke off, or gave something else
	TooLarge                   // it is over a limit of this server
	Busy                       // the origin or this server is asked too much
	TimedOut                   // it took longer than it may
)

// FetchError is a failure that is not this server's: it is reported within the
// response, not as the failure of the call.
type FetchError struct {
	Reason Reason
	// URI is the one of the request that this is about.
	URI string
	// Err says what happened, without the URI, which may hold secrets.
	Err error
}

// Error implements error. It shows no more of the URI than where it leads.
func (e *FetchError) Error() string { return fmt.Sprintf("fetch from %s: %v", origin(e.URI), e.Err) }

// Unwrap returns e.Err.
func (e *FetchError) Unwrap() error { return e.Err }

// failed makes a FetchError whose URI the caller fills in.
func failed(r Reason, format string, args ...any) error {
	return &FetchError{Reason: r, Err: fmt.Errorf(format, args...)}
}

var (
	// errClosed is why fetches end that Close found.
	errClosed = fmt.Errorf("the server is shutting down: %w", blob.ErrUnavailable)
	// errAbandoned is why a fetch ends that nobody waits for.
	errAbandoned = errors.New("nobody waits for the fetch any more")
	// errTimeout is why a fetch ends that took too long.
	errTimeout = errors.New("it took longer than the request or the server allows")
	// errStalled is why an attempt ends in which the origin fell silent.
	errStalled = errors.New("the origin sent nothing for too long")
)

// origin is as much of a URI as may be shown and logged: scheme and host, without
// user, path and query. Of what is no URL, it is the scheme.
func origin(uri string) string {
	u, err := url.Parse(uri)
	switch {
	case err != nil, u.Scheme == "":
		return "an invalid URI"
	case u.Host == "":
		return fmt.Sprintf("%.50s:...", u.Scheme)
	}
	return fmt.Sprintf("%.50s://%.200s", u.Scheme, u.Host)
}
