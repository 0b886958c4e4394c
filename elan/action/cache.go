// Package action is the ActionCache: it keeps the results of actions beside the
// blobs that they refer to, and gives one out only while all of those are there.
//
// Both ways the closure of a result is checked: its output files, its Trees and
// what is in them, its stdout and stderr. Get answers "not found" for a result
// of which anything is missing, because a client that builds without the bytes
// would fail much later; Put refuses it. Looking a blob up starts its lifetime
// anew, so that what Get returned can be fetched.
//
// Results of commands that failed are never taken, nor given out. Failures keeps
// them apart, for people to look at. UpdatePolicy says who may call Put from
// outside; the edges ask it.
//
// Results are stored without inline contents, which become blobs; elan/rpc
// inlines again what a client asks for. elan/rpc, mettle/api and mettle/worker
// call this package; elan/client offers the same two methods over gRPC.
package action

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/blob"
)

// Getter looks results up.
type Getter interface {
	// Get returns the result of an action, which the caller owns. Where there
	// is none, or a blob that it refers to is not in the store, the error wraps
	// blob.ErrNotFound. Other errors say that it is not known.
	Get(ctx context.Context, k blob.EntryKey) (*repb.ActionResult, error)
}

// Putter takes results in.
type Putter interface {
	// Put sets the result of an action. Where blobs that it refers to are not
	// in the store, the error is a *blob.MissingError. One about a malformed
	// result wraps ErrInvalid, and one about a failed command's ErrNotCacheable.
	// It neither changes nor keeps r.
	Put(ctx context.Context, k blob.EntryKey, r *repb.ActionResult) error
}

// Options are those of New.
type Options struct {
	// Store holds the blobs that results refer to.
	Store blob.Store
	// Stores gives the blobs of an instance, where each has its own: see
	// elan/blob/instances. nil: Store, for all of them.
	Stores func(instance string) blob.Store
	// Entries holds the results.
	Entries blob.Entries
	// MaxTreeBytes bounds a Tree, which is held in memory while it is checked;
	// 0 means 64 MiB, some half a million files. All that are checked at once have
	// four times as much; others wait.
	MaxTreeBytes int64
	// MaxBlobs bounds the blobs that a result refers to, which are held in memory
	// too; 0 means two million, some 200 MB.
	MaxBlobs int
	// MaxResultBytes bounds a stored result; 0 means what a gRPC message of
	// the usual limit, 4 MiB, holds.
	MaxResultBytes int
	// Logger gets what is dropped; nil discards it.
	Logger *slog.Logger
	// Registerer takes the metrics. nil: they are counted for nobody.
	Registerer prometheus.Registerer
}

// Cache is the ActionCache over a store. It is safe for concurrent use.
type Cache struct {
	o     Options
	gets  *gets
	trees *semaphore.Weighted // has the bytes of the Trees that are being checked
}

var (
	_ Getter = (*Cache)(nil)
	_ Putter = (*Cache)(nil)
)

// New checks the options and returns a Cache, which needs no closing.
func New(o Options) (*Cache, error) {
	if o.Store == nil || o.Entries == nil {
		return nil, errors.New("action cache: Options need a Store and Entries")
	}
	if o.Stores == nil {
		shared := o.Store
		o.Stores = func(string) blob.Store { return shared }
	}
	if o.MaxTreeBytes == 0 {
		o.MaxTreeBytes = 64 << 20
	}
	if o.MaxBlobs == 0 {
		o.MaxBlobs = 2 << 20
	}
	if o.MaxResultBytes == 0 {
		o.MaxResultBytes = 4<<20 - 64<<10
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	gets, err := newGets(o.Registerer)
	if err != nil {
		return nil, fmt.Errorf("action cache: %w", err)
	}
	return &Cache{o: o, gets: gets, trees: semaphore.NewWeighted(4 * o.MaxTreeBytes)}, nil
}

// Get implements Getter. An entry that can't be read as a result, that is of a
// failed command, or of which a blob is missing for sure, is dropped.
func (c *Cache) Get(ctx context.Context, k blob.EntryKey) (*repb.ActionResult, error) {
	r, err := c.get(ctx, k)
	c.gets.count(err)
	return r, err
}

func (c *Cache) get(ctx context.Context, k blob.EntryKey) (*repb.ActionResult, error) {
	if reserved(k.Instance) {
		return nil, fmt.Errorf("result of action %s: %w: instance %q is for failed actions", k.Action, blob.ErrNotFound, k.Instance)
	}
	value, err := c.o.Entries.Entry(ctx, k)
	if err != nil {
		return nil, fmt.Errorf("result of action %s: %w", k.Action, err)
	}
	r := &repb.ActionResult{}
	if err := proto.Unmarshal(value, r); err != nil {
		return nil, c.drop(ctx, k, value, fmt.Errorf("the entry is no ActionResult: %w", err))
	}
	if r.ExitCode != 0 {
		return nil, c.drop(ctx, k, value, fmt.Errorf("%w: exit code %d", ErrNotCacheable, r.ExitCode))
	}
	missing, err := c.missing(ctx, k, r)
	switch {
	case errors.Is(err, ErrInvalid):
		return nil, c.drop(ctx, k, value, err)
	case err != nil:
		return nil, fmt.Errorf("result of action %s: %w", k.Action, err)
	case len(missing) > 0:
		return nil, c.drop(ctx, k, value, &blob.MissingError{Digests: missing})
	}
	return r, nil
}

// drop removes the entry with the given value, for a reason, and returns the
// error of a result that is not there. It leaves alone an entry that was
// replaced in the meantime, as far as that can be seen.
func (c *Cache) drop(ctx context.Context, k blob.EntryKey, value []byte, reason error) error {
	now, err := c.o.Entries.Entry(ctx, k)
	if err == nil && bytes.Equal(now, value) {
		err = c.o.Entries.DeleteEntry(ctx, k)
	}
	if err != nil && !errors.Is(err, blob.ErrNotFound) {
		// It is found out again at the next Get; the answer to this one is known.
		c.o.Logger.WarnContext(ctx, "could not drop an action result", "digest", k.Action, "instance", k.Instance, "error", err)
	}
	c.o.Logger.DebugContext(ctx, "dropped an action result", "digest", k.Action, "instance", k.Instance, "reason", reason)
	c.gets.dropped.Inc()
	return fmt.Errorf("result of action %s: %w: %v", k.Action, blob.ErrNotFound, reason) //nolint:errorlint // the reason is no class of this error
}

// Put implements Putter. Inline contents that r carries become blobs.
func (c *Cache) Put(ctx context.Context, k blob.EntryKey, r *repb.ActionResult) error {
	if reserved(k.Instance) {
		return fmt.Errorf("result of action %s: %w: instance %q is for failed actions", k.Action, ErrInvalid, k.Instance)
	}
	if r == nil {
		return fmt.Errorf("result of action %s: %w: the message is absent", k.Action, ErrInvalid)
	}
	if r.ExitCode != 0 {
		return fmt.Errorf("result of action %s: %w: exit code %d, want 0", k.Action, ErrNotCacheable, r.ExitCode)
	}
	r, inline, err := outline(k.Action.Function(), r)
	if err == nil {
		err = c.complete(ctx, k, r, inline)
	}
	if err != nil {
		return fmt.Errorf("result of action %s: %w", k.Action, err)
	}
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(r)
	if err != nil {
		return fmt.Errorf("result of action %s: %w: %w", k.Action, ErrInvalid, err)
	}
	if len(value) > c.o.MaxResultBytes {
		return fmt.Errorf("result of action %s: %w: %d bytes, at most %d are kept", k.Action, blob.ErrTooLarge, len(value), c.o.MaxResultBytes)
	}
	if err := c.o.Entries.PutEntry(ctx, k, value); err != nil {
		return fmt.Errorf("result of action %s: %w", k.Action, err)
	}
	return nil
}

// reserved reports whether the entries of an instance are those of Failures.
func reserved(instance string) bool { return strings.HasPrefix(instance, "actions/") }
