package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/inventory"
	"github.com/mettle-build/mettle/elan/status"
	storepb "github.com/mettle-build/mettle/proto/store"
)

const (
	// listPortion is how many blobs or entries go into one message of a List:
	// some 60 KiB, unless instances have long names.
	listPortion = 500
	// maxNames bounds the names in a request of the administration, as its
	// description says.
	maxNames = 10_000
	// maxAdminCalls is how many of its calls that may read the whole store are
	// served at once. A person needs one.
	maxAdminCalls = 4
)

// AdminOptions are those of RegisterAdmin.
type AdminOptions struct {
	// Inventory is that of the server's store.
	Inventory inventory.Inventory
	// Addr is where the server listens. Who can reach it can take out of the
	// store what others need, and so the calls are served on loopback, and
	// elsewhere refused.
	Addr net.Addr
	// Anywhere says that they are served wherever the server listens.
	Anywhere bool
}

// RegisterAdmin registers mettle.store.v1.Store with s: listing, removing,
// adding up and verifying, for `elan ls` and its like. Where the options do not
// let it be served, each call is answered with PERMISSION_DENIED, and why.
func RegisterAdmin(s grpc.ServiceRegistrar, o AdminOptions) {
	if tcp, ok := o.Addr.(*net.TCPAddr); o.Anywhere || ok && tcp.IP.IsLoopback() {
		storepb.RegisterStoreServer(s, &adminServer{inv: o.Inventory, calls: make(chan struct{}, maxAdminCalls)})
		return
	}
	storepb.RegisterStoreServer(s, refusingAdmin{err: gstatus.Errorf(codes.PermissionDenied,
		"the server listens on %v, where others than its operator may reach it, and so it lets nobody look after its store, unless one starts it with --admin", o.Addr)})
}

type adminServer struct {
	storepb.UnimplementedStoreServer
	inv   inventory.Inventory
	calls chan struct{} // holds a token for each call that may take long
}

// begin takes a token for a call that may take long. The caller calls end.
func (s *adminServer) begin() (end func(), err error) {
	select {
	case s.calls <- struct{}{}:
		return func() { <-s.calls }, nil
	default:
		return nil, gstatus.Errorf(codes.Unavailable, "%d calls that look at the whole store are under way; try again when one of them has ended", maxAdminCalls)
	}
}

// adminStatus is err as an error with a status.
func adminStatus(err error) error {
	if errors.Is(err, inventory.ErrUnsupported) {
		return gstatus.Error(codes.Unimplemented, err.Error())
	}
	return status.FromRead(err)
}

// List streams what the request asks for, in portions.
func (s *adminServer) List(req *storepb.ListRequest, stream grpc.ServerStreamingServer[storepb.ListResponse]) error {
	f, err := filterFrom(req)
	if err != nil {
		return err
	}
	end, err := s.begin()
	if err != nil {
		return err
	}
	defer end()
	resp := &storepb.ListResponse{}
	send := func(atLeast int) error {
		if len(resp.Blobs)+len(resp.Entries) < atLeast {
			return nil
		}
		err := stream.Send(resp)
		resp = &storepb.ListResponse{}
		return err //nolint:wrapcheck // a status already
	}
	if req.What == storepb.ListRequest_ENTRIES {
		for i, err := range s.inv.Entries(stream.Context(), f) {
			if err != nil {
				return adminStatus(err)
			}
			resp.Entries = append(resp.Entries, entryProto(i))
			if err := send(listPortion); err != nil {
				return err
			}
		}
		return send(1)
	}
	for i, err := range s.inv.Blobs(stream.Context(), f) {
		if err != nil {
			return adminStatus(err)
		}
		resp.Blobs = append(resp.Blobs, blobProto(i))
		if err := send(listPortion); err != nil {
			return err
		}
	}
	return send(1)
}

func filterFrom(req *storepb.ListRequest) (inventory.Filter, error) {
	f := inventory.Filter{MinBytes: req.MinBytes, MaxBytes: req.MaxBytes, Instance: req.InstanceName}
	if req.DigestFunction != "" {
		fn, ok := digest.FunctionNamed(req.DigestFunction)
		if !ok {
			return f, gstatus.Errorf(codes.InvalidArgument, "digest_function is %q, want one of %v", req.DigestFunction, digest.Functions())
		}
		f.Function = fn
	}
	if req.UsedBefore != nil {
		f.UsedBefore = req.UsedBefore.AsTime()
	}
	if req.UsedSince != nil {
		f.UsedSince = req.UsedSince.AsTime()
	}
	return f, nil
}

func blobProto(i blob.Info) *storepb.Blob {
	return &storepb.Blob{Digest: i.Digest.String(), StoredBytes: i.StoredBytes, LastUse: timeProto(i.LastUse)}
}

func entryProto(i blob.EntryInfo) *storepb.Entry {
	return &storepb.Entry{Key: keyProto(i.Key), Bytes: i.Bytes, LastUse: timeProto(i.LastUse)}
}

func keyProto(k blob.EntryKey) *storepb.EntryKey {
	return &storepb.EntryKey{InstanceName: k.Instance, ActionDigest: k.Action.String()}
}

// timeProto is t as a message, absent where t is not known.
func timeProto(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// names reads what a request names.
func names(digests []string, entries []*storepb.EntryKey) ([]digest.Digest, []blob.EntryKey, error) {
	if n := len(digests) + len(entries); n > maxNames {
		return nil, nil, gstatus.Errorf(codes.InvalidArgument, "the request has %d names, at most %d are taken at once", n, maxNames)
	}
	ds := make([]digest.Digest, 0, len(digests))
	for _, text := range digests {
		d, err := digest.Parse(text)
		if err != nil {
			return nil, nil, status.From(err)
		}
		ds = append(ds, d)
	}
	ks := make([]blob.EntryKey, 0, len(entries))
	for _, e := range entries {
		d, err := digest.Parse(e.GetActionDigest())
		if err != nil {
			return nil, nil, status.From(err)
		}
		ks = append(ks, blob.EntryKey{Instance: e.GetInstanceName(), Action: d})
	}
	return ds, ks, nil
}

// Stat tells of what the request names, as far as it is there.
func (s *adminServer) Stat(ctx context.Context, req *storepb.StatRequest) (*storepb.StatResponse, error) {
	ds, ks, err := names(req.Digests, req.Entries)
	if err != nil {
		return nil, err
	}
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	resp := &storepb.StatResponse{}
	if len(ds) > 0 {
		infos, err := s.inv.Stat(ctx, ds)
		if err != nil {
			return nil, adminStatus(err)
		}
		for _, i := range infos {
			resp.Blobs = append(resp.Blobs, blobProto(i))
		}
	}
	if len(ks) > 0 {
		infos, err := s.inv.StatEntries(ctx, ks)
		if err != nil {
			return nil, adminStatus(err)
		}
		for _, i := range infos {
			resp.Entries = append(resp.Entries, entryProto(i))
		}
	}
	return resp, nil
}

// Remove removes what the request names.
func (s *adminServer) Remove(ctx context.Context, req *storepb.RemoveRequest) (*storepb.RemoveResponse, error) {
	ds, ks, err := names(req.Digests, req.Entries)
	if err != nil {
		return nil, err
	}
	resp := &storepb.RemoveResponse{}
	// Entries first: one without its blobs is of no use to anybody.
	if len(ks) > 0 {
		absent, err := s.inv.RemoveEntries(ctx, ks)
		if err != nil {
			return nil, adminStatus(err)
		}
		for _, k := range absent {
			resp.AbsentEntries = append(resp.AbsentEntries, keyProto(k))
		}
	}
	if len(ds) > 0 {
		absent, err := s.inv.Remove(ctx, ds)
		if err != nil {
			return nil, adminStatus(err)
		}
		for _, d := range absent {
			resp.AbsentDigests = append(resp.AbsentDigests, d.String())
		}
	}
	return resp, nil
}

// Usage adds up what is in the store.
func (s *adminServer) Usage(ctx context.Context, _ *storepb.UsageRequest) (*storepb.UsageResponse, error) {
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	u, err := s.inv.Usage(ctx)
	if err != nil {
		return nil, adminStatus(err)
	}
	resp := &storepb.UsageResponse{}
	for _, r := range u.By(func(c inventory.Class) inventory.Class { return c }) {
		class := &storepb.UsageResponse_Class{
			Entries: r.Entries, DigestFunction: r.Function.String(), FromBytes: r.FromBytes,
			Count: r.Count, Bytes: r.Bytes, StoredBytes: r.StoredBytes,
		}
		if r.FromAge != inventory.AgeUnknown {
			class.FromAge = durationpb.New(r.FromAge)
		}
		resp.Classes = append(resp.Classes, class)
	}
	return resp, nil
}

// Verify streams what is found, and the progress.
func (s *adminServer) Verify(req *storepb.VerifyRequest, stream grpc.ServerStreamingServer[storepb.VerifyResponse]) error {
	ds, _, err := names(req.Digests, nil)
	if err != nil {
		return err
	}
	if req.BytesPerSecond < 0 {
		return gstatus.Errorf(codes.InvalidArgument, "bytes_per_second is %d, want 0 for the default, or more", req.BytesPerSecond)
	}
	end, err := s.begin()
	if err != nil {
		return err
	}
	defer end()
	for p, err := range s.inv.Verify(stream.Context(), inventory.VerifyOptions{Digests: ds, BytesPerSecond: req.BytesPerSecond}) {
		if err != nil {
			return adminStatus(fmt.Errorf("after %d blobs: %w", p.Blobs, err))
		}
		if err := stream.Send(progressProto(p)); err != nil {
			return err //nolint:wrapcheck // a status already
		}
	}
	return nil
}

func progressProto(p inventory.Progress) *storepb.VerifyResponse {
	resp := &storepb.VerifyResponse{Blobs: p.Blobs, Bytes: p.Bytes}
	if p.Finding == nil {
		return resp
	}
	what := storepb.VerifyResponse_Finding_UNREADABLE
	switch {
	case errors.Is(p.Finding.Err, blob.ErrCorrupt):
		what = storepb.VerifyResponse_Finding_CORRUPT
	case errors.Is(p.Finding.Err, blob.ErrNotFound):
		what = storepb.VerifyResponse_Finding_MISSING
	}
	resp.Finding = &storepb.VerifyResponse_Finding{
		Digest: p.Finding.Digest.String(), What: what, Message: status.Proto(p.Finding.Err).Message,
	}
	return resp
}

// refusingAdmin answers every call with one error.
type refusingAdmin struct {
	storepb.UnimplementedStoreServer
	err error
}

func (r refusingAdmin) List(*storepb.ListRequest, grpc.ServerStreamingServer[storepb.ListResponse]) error {
	return r.err
}

func (r refusingAdmin) Stat(context.Context, *storepb.StatRequest) (*storepb.StatResponse, error) {
	return nil, r.err
}

func (r refusingAdmin) Remove(context.Context, *storepb.RemoveRequest) (*storepb.RemoveResponse, error) {
	return nil, r.err
}

func (r refusingAdmin) Usage(context.Context, *storepb.UsageRequest) (*storepb.UsageResponse, error) {
	return nil, r.err
}

func (r refusingAdmin) Verify(*storepb.VerifyRequest, grpc.ServerStreamingServer[storepb.VerifyResponse]) error {
	return r.err
}
