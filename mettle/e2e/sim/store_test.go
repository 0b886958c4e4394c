//go:build linux

package sim_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
)

// A storage is Elan: blobs and results, which survive everything.
type storage struct {
	service
	blobs   *mem.Store
	actions *action.Cache
}

func newStorage() (*storage, error) {
	blobs, err := mem.New(mem.Options{})
	if err != nil {
		return nil, err
	}
	actions, err := action.New(action.Options{Store: blobs, Entries: blobs})
	return &storage{service: service{name: "store"}, blobs: blobs, actions: actions}, err
}

// A cable is what one process has of the storage: Elan's client.
type cable struct {
	s *storage
	p *process
}

var (
	_ blob.Store    = (*cable)(nil)
	_ action.Getter = (*cable)(nil)
	_ action.Putter = (*cable)(nil)
)

// fetch calls the storage.
func fetch[T any](ctx context.Context, c *cable, what string, f func(context.Context) (T, error)) (T, error) {
	v, err := call(ctx, c.p, &c.s.service, what, func() (T, error) { return f(context.WithoutCancel(ctx)) })
	if errors.Is(err, errNet) || errors.Is(err, errGone) {
		c.p.w.excuse(c.p.node, "a call of the store failed")
		err = fmt.Errorf("%w: %w", blob.ErrUnavailable, err)
	}
	return v, err
}

// FindMissing implements blob.Finder.
func (c *cable) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	what := "find"
	for _, d := range ds {
		what += " " + d.Hash()[:8]
	}
	return fetch(ctx, c, what, func(ctx context.Context) ([]digest.Digest, error) { return c.s.blobs.FindMissing(ctx, ds) })
}

// Open implements blob.Opener.
func (c *cable) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	return fetch(ctx, c, "read "+d.Hash()[:8], func(ctx context.Context) (io.ReadCloser, error) { return c.s.blobs.Open(ctx, d, offset) })
}

// Create implements blob.Creator.
func (c *cable) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	return &upload{ctx: ctx, c: c, d: d}, nil
}

// An upload is one blob that is sent when it is whole.
type upload struct {
	ctx context.Context //nolint:containedctx // blob.Creator says that it bounds the writing too
	c   *cable
	d   digest.Digest
	buf bytes.Buffer
}

// Write implements io.Writer.
func (u *upload) Write(p []byte) (int, error) { return u.buf.Write(p) }

// Commit implements blob.Writer.
func (u *upload) Commit() error {
	_, err := fetch(u.ctx, u.c, "write "+u.d.Hash()[:8], func(ctx context.Context) (nothing, error) {
		w, err := u.c.s.blobs.Create(ctx, u.d)
		if err != nil {
			return nothing{}, err
		}
		defer w.Close()
		if _, err := w.Write(u.buf.Bytes()); err != nil {
			return nothing{}, err
		}
		return nothing{}, w.Commit()
	})
	return err
}

// Close implements blob.Writer.
func (u *upload) Close() error { return nil }

// Get implements action.Getter.
func (c *cable) Get(ctx context.Context, k blob.EntryKey) (*repb.ActionResult, error) {
	return fetch(ctx, c, "get "+k.Action.Hash()[:8], func(ctx context.Context) (*repb.ActionResult, error) { return c.s.actions.Get(ctx, k) })
}

// Put implements action.Putter.
func (c *cable) Put(ctx context.Context, k blob.EntryKey, r *repb.ActionResult) error {
	_, err := fetch(ctx, c, "put "+k.Action.Hash()[:8], func(ctx context.Context) (nothing, error) { return nothing{}, c.s.actions.Put(ctx, k, r) })
	return err
}
