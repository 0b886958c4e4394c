package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/inventory"
	storepb "github.com/mettle-build/mettle/proto/store"
)

// adminNames is how many names go into one request of the administration, fewer
// than the server's limit, for the sake of long instance names.
const adminNames = 1000

// Admin is the Inventory of a server's store, over mettle.store.v1.Store, which
// elan and mettle dual serve. Where the server has no such service, or does not
// let its callers use it, errors wrap inventory.ErrUnsupported and say which. It
// is safe for concurrent use.
type Admin struct{ store storepb.StoreClient }

var _ inventory.Inventory = (*Admin)(nil)

// NewAdmin returns the Admin over a connection, which the caller closes.
func NewAdmin(conn grpc.ClientConnInterface) *Admin {
	return &Admin{store: storepb.NewStoreClient(conn)}
}

// adminError is fromStatus with words for a server that has no such service.
func adminError(err error) error {
	s, ok := status.FromError(err)
	switch {
	case ok && s.Code() == codes.Unimplemented && s.Message() == "unknown service "+storepb.Store_ServiceDesc.ServiceName:
		return fmt.Errorf("%w: the server offers no administration of its store; Elan and mettle dual do", inventory.ErrUnsupported)
	case ok && s.Code() == codes.Unimplemented, ok && s.Code() == codes.PermissionDenied:
		return fmt.Errorf("%w (server: %s: %s)", inventory.ErrUnsupported, s.Code(), s.Message())
	}
	return fromStatus(err)
}

// Blobs implements inventory.Lister.
func (a *Admin) Blobs(ctx context.Context, f inventory.Filter) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		err := a.list(ctx, listRequest(storepb.ListRequest_BLOBS, f), func(r *storepb.ListResponse) error {
			for _, m := range r.Blobs {
				i, err := blobInfo(m)
				if err != nil {
					return err
				}
				if !yield(i, nil) {
					return errEnough
				}
			}
			return nil
		})
		if err != nil {
			yield(blob.Info{}, fmt.Errorf("list blobs: %w", err))
		}
	}
}

// Entries implements inventory.Lister.
func (a *Admin) Entries(ctx context.Context, f inventory.Filter) iter.Seq2[blob.EntryInfo, error] {
	return func(yield func(blob.EntryInfo, error) bool) {
		err := a.list(ctx, listRequest(storepb.ListRequest_ENTRIES, f), func(r *storepb.ListResponse) error {
			for _, m := range r.Entries {
				i, err := entryInfo(m)
				if err != nil {
					return err
				}
				if !yield(i, nil) {
					return errEnough
				}
			}
			return nil
		})
		if err != nil {
			yield(blob.EntryInfo{}, fmt.Errorf("list entries: %w", err))
		}
	}
}

// errEnough says that nobody wants to hear more.
var errEnough = errors.New("enough")

// list calls visit with each portion. That it returns errEnough is no error.
func (a *Admin) list(ctx context.Context, req *storepb.ListRequest, visit func(*storepb.ListResponse) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the call where visit ends the listing
	stream, err := a.store.List(ctx, req)
	if err != nil {
		return adminError(err)
	}
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return adminError(err)
		}
		if err := visit(resp); err != nil {
			if errors.Is(err, errEnough) {
				return nil
			}
			return err
		}
	}
}

func listRequest(what storepb.ListRequest_What, f inventory.Filter) *storepb.ListRequest {
	req := &storepb.ListRequest{What: what, MinBytes: f.MinBytes, MaxBytes: f.MaxBytes, InstanceName: f.Instance}
	if f.Function != 0 {
		req.DigestFunction = f.Function.String()
	}
	if !f.UsedBefore.IsZero() {
		req.UsedBefore = timestamppb.New(f.UsedBefore)
	}
	if !f.UsedSince.IsZero() {
		req.UsedSince = timestamppb.New(f.UsedSince)
	}
	return req
}

func blobInfo(m *storepb.Blob) (blob.Info, error) {
	d, err := digest.Parse(m.GetDigest())
	if err != nil {
		return blob.Info{}, fmt.Errorf("the server's answer: %w", err)
	}
	return blob.Info{Digest: d, StoredBytes: m.StoredBytes, LastUse: timeOf(m.LastUse)}, nil
}

func entryInfo(m *storepb.Entry) (blob.EntryInfo, error) {
	k, err := entryKey(m.GetKey())
	if err != nil {
		return blob.EntryInfo{}, err
	}
	return blob.EntryInfo{Key: k, Bytes: m.Bytes, LastUse: timeOf(m.LastUse)}, nil
}

func entryKey(m *storepb.EntryKey) (blob.EntryKey, error) {
	d, err := digest.Parse(m.GetActionDigest())
	if err != nil {
		return blob.EntryKey{}, fmt.Errorf("the server's answer: %w", err)
	}
	return blob.EntryKey{Instance: m.GetInstanceName(), Action: d}, nil
}

func timeOf(m *timestamppb.Timestamp) time.Time {
	if m == nil {
		return time.Time{}
	}
	return m.AsTime()
}

// all makes call with portions of all, and gathers what it returns.
func all[T, R any](of []T, call func(portion []T) ([]R, error)) ([]R, error) {
	var rs []R
	for len(of) > 0 {
		n := min(len(of), adminNames)
		r, err := call(of[:n])
		if err != nil {
			return rs, err
		}
		rs = append(rs, r...)
		of = of[n:]
	}
	return rs, nil
}

// each converts a list.
func each[T, R any](of []T, convert func(T) (R, error)) ([]R, error) {
	rs := make([]R, 0, len(of))
	for _, t := range of {
		r, err := convert(t)
		if err != nil {
			return nil, err
		}
		rs = append(rs, r)
	}
	return rs, nil
}

func digestStrings(ds []digest.Digest) []string {
	texts := make([]string, len(ds))
	for i, d := range ds {
		texts[i] = d.String()
	}
	return texts
}

func keyProtos(ks []blob.EntryKey) []*storepb.EntryKey {
	protos := make([]*storepb.EntryKey, len(ks))
	for i, k := range ks {
		protos[i] = &storepb.EntryKey{InstanceName: k.Instance, ActionDigest: k.Action.String()}
	}
	return protos
}

// Stat implements inventory.Statter.
func (a *Admin) Stat(ctx context.Context, ds []digest.Digest) ([]blob.Info, error) {
	return all(ds, func(ds []digest.Digest) ([]blob.Info, error) {
		resp, err := a.store.Stat(ctx, &storepb.StatRequest{Digests: digestStrings(ds)})
		if err != nil {
			return nil, adminError(err)
		}
		return each(resp.Blobs, blobInfo)
	})
}

// StatEntries implements inventory.Statter.
func (a *Admin) StatEntries(ctx context.Context, ks []blob.EntryKey) ([]blob.EntryInfo, error) {
	return all(ks, func(ks []blob.EntryKey) ([]blob.EntryInfo, error) {
		resp, err := a.store.Stat(ctx, &storepb.StatRequest{Entries: keyProtos(ks)})
		if err != nil {
			return nil, adminError(err)
		}
		return each(resp.Entries, entryInfo)
	})
}

// Remove implements inventory.Remover.
func (a *Admin) Remove(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	return all(ds, func(ds []digest.Digest) ([]digest.Digest, error) {
		resp, err := a.store.Remove(ctx, &storepb.RemoveRequest{Digests: digestStrings(ds)})
		if err != nil {
			return nil, adminError(err)
		}
		return each(resp.AbsentDigests, digest.Parse)
	})
}

// RemoveEntries implements inventory.Remover.
func (a *Admin) RemoveEntries(ctx context.Context, ks []blob.EntryKey) ([]blob.EntryKey, error) {
	return all(ks, func(ks []blob.EntryKey) ([]blob.EntryKey, error) {
		resp, err := a.store.Remove(ctx, &storepb.RemoveRequest{Entries: keyProtos(ks)})
		if err != nil {
			return nil, adminError(err)
		}
		return each(resp.AbsentEntries, entryKey)
	})
}

// Usage implements inventory.Surveyor.
func (a *Admin) Usage(ctx context.Context) (inventory.Usage, error) {
	resp, err := a.store.Usage(ctx, &storepb.UsageRequest{})
	if err != nil {
		return nil, adminError(err)
	}
	u := inventory.Usage{}
	for _, m := range resp.Classes {
		c := inventory.Class{Entries: m.Entries, FromBytes: m.FromBytes, FromAge: inventory.AgeUnknown}
		if m.FromAge != nil {
			c.FromAge = m.FromAge.AsDuration()
		}
		// One that a newer server knows has no name here.
		c.Function, _ = digest.FunctionNamed(m.DigestFunction)
		s := u[c]
		u[c] = inventory.Sum{Count: s.Count + m.Count, Bytes: s.Bytes + m.Bytes, StoredBytes: s.StoredBytes + m.StoredBytes}
	}
	return u, nil
}

// Verify implements inventory.Surveyor.
func (a *Admin) Verify(ctx context.Context, o inventory.VerifyOptions) iter.Seq2[inventory.Progress, error] {
	return func(yield func(inventory.Progress, error) bool) {
		var before inventory.Progress // of earlier portions
		for rest := o.Digests; ; {
			n := min(len(rest), adminNames)
			req := &storepb.VerifyRequest{Digests: digestStrings(rest[:n]), BytesPerSecond: o.BytesPerSecond}
			rest = rest[n:]
			last := before
			err := a.verify(ctx, req, func(p inventory.Progress) bool {
				p.Blobs, p.Bytes = p.Blobs+before.Blobs, p.Bytes+before.Bytes
				last = inventory.Progress{Blobs: p.Blobs, Bytes: p.Bytes}
				return yield(p, nil)
			})
			switch {
			case errors.Is(err, errEnough):
				return
			case err != nil:
				yield(last, fmt.Errorf("verify: %w", err))
				return
			case len(rest) == 0:
				return
			}
			before = last
		}
	}
}

func (a *Admin) verify(ctx context.Context, req *storepb.VerifyRequest, more func(inventory.Progress) bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := a.store.Verify(ctx, req)
	if err != nil {
		return adminError(err)
	}
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return adminError(err)
		}
		p := inventory.Progress{Blobs: resp.Blobs, Bytes: resp.Bytes}
		if resp.Finding != nil {
			if p.Finding, err = finding(resp.Finding); err != nil {
				return err
			}
		}
		if !more(p) {
			return errEnough
		}
	}
}

func finding(m *storepb.VerifyResponse_Finding) (*inventory.Finding, error) {
	d, err := digest.Parse(m.Digest)
	if err != nil {
		return nil, fmt.Errorf("the server's answer: %w", err)
	}
	f := &inventory.Finding{Digest: d}
	switch m.What {
	case storepb.VerifyResponse_Finding_CORRUPT:
		f.Err = fmt.Errorf("%w (server: %s)", blob.ErrCorrupt, m.Message)
	case storepb.VerifyResponse_Finding_MISSING:
		f.Err = fmt.Errorf("%w (server: %s)", blob.ErrNotFound, m.Message)
	case storepb.VerifyResponse_Finding_UNKNOWN, storepb.VerifyResponse_Finding_UNREADABLE:
		f.Err = fmt.Errorf("server: %s", m.Message)
	default: // of a newer server
		f.Err = fmt.Errorf("server: %s", m.Message)
	}
	return f, nil
}
