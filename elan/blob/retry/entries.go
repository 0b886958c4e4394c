package retry

import (
	"context"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/blob"
)

// Entries are entries whose calls are tried again. They are safe for concurrent
// use.
type Entries struct {
	inside blob.Entries
	r      *Retrier
}

var _ blob.Entries = (*Entries)(nil)

// Entries tries again what is asked of e.
func (r *Retrier) Entries(e blob.Entries) *Entries { return &Entries{inside: e, r: r} }

// Entry implements blob.Entries.
func (e *Entries) Entry(ctx context.Context, k blob.EntryKey) (value []byte, err error) {
	err = e.r.try(ctx, func() (err error) {
		value, err = e.inside.Entry(ctx, k)
		return err //nolint:wrapcheck // the store's own
	})
	return value, err
}

// PutEntry implements blob.Entries.
func (e *Entries) PutEntry(ctx context.Context, k blob.EntryKey, value []byte) error {
	return e.r.try(ctx, func() error { return e.inside.PutEntry(ctx, k, value) })
}

// DeleteEntry implements blob.Entries.
func (e *Entries) DeleteEntry(ctx context.Context, k blob.EntryKey) error {
	return e.r.try(ctx, func() error { return e.inside.DeleteEntry(ctx, k) })
}

// ActionCache is an action.Getter and an action.Putter.
type ActionCache interface {
	Get(ctx context.Context, k blob.EntryKey) (*repb.ActionResult, error)
	Put(ctx context.Context, k blob.EntryKey, r *repb.ActionResult) error
}

// Actions is an ActionCache whose calls are tried again. It is safe for
// concurrent use.
type Actions struct {
	inside ActionCache
	r      *Retrier
}

var _ ActionCache = (*Actions)(nil)

// Actions tries again what is asked of c.
func (r *Retrier) Actions(c ActionCache) *Actions { return &Actions{inside: c, r: r} }

// Get implements action.Getter.
func (a *Actions) Get(ctx context.Context, k blob.EntryKey) (result *repb.ActionResult, err error) {
	err = a.r.try(ctx, func() (err error) {
		result, err = a.inside.Get(ctx, k)
		return err //nolint:wrapcheck // the cache's own
	})
	return result, err
}

// Put implements action.Putter. To set a result twice is to set it once.
func (a *Actions) Put(ctx context.Context, k blob.EntryKey, result *repb.ActionResult) error {
	return a.r.try(ctx, func() error { return a.inside.Put(ctx, k, result) })
}
