package rpc

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	assetpb "github.com/bazelbuild/remote-apis/build/bazel/remote/asset/v1"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/asset"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/resource"
	"github.com/mettle-build/mettle/elan/status"
)

// Assets is a remote asset service: an *asset.Service.
type Assets interface {
	FetchBlob(ctx context.Context, r asset.Request) (asset.Response, error)
	FetchDirectory(ctx context.Context, r asset.Request) (asset.Response, error)
	PushBlob(ctx context.Context, p asset.Push) error
	PushDirectory(ctx context.Context, p asset.Push) error
}

// registerAssets registers both services of the Remote Asset API.
func registerAssets(s grpc.ServiceRegistrar, a Assets) {
	assetpb.RegisterFetchServer(s, &fetchServer{a: a})
	assetpb.RegisterPushServer(s, &pushServer{a: a})
}

type fetchServer struct {
	assetpb.UnimplementedFetchServer
	a Assets
}

// FetchBlob answers with a file that is in the CAS, or with why the origin has none.
func (s *fetchServer) FetchBlob(ctx context.Context, req *assetpb.FetchBlobRequest) (*assetpb.FetchBlobResponse, error) {
	r, err := readFetch(req, req.Timeout, req.OldestContentAccepted)
	if err != nil {
		return nil, err
	}
	got, err := s.a.FetchBlob(ctx, r)
	inline, err := fetchStatus(ctx, req.Uris, err)
	if err != nil {
		return nil, err
	}
	if inline.status.Code != 0 {
		return &assetpb.FetchBlobResponse{Status: inline.status, Uri: inline.uri, DigestFunction: r.Function.Proto()}, nil
	}
	return &assetpb.FetchBlobResponse{
		Status: inline.status, Uri: got.URI, Qualifiers: writeQualifiers(got.Qualifiers), ExpiresAt: writeTime(got.ExpiresAt),
		BlobDigest: got.Digest.Proto(), DigestFunction: r.Function.Proto(),
	}, nil
}

// FetchDirectory is FetchBlob for a directory.
func (s *fetchServer) FetchDirectory(ctx context.Context, req *assetpb.FetchDirectoryRequest) (*assetpb.FetchDirectoryResponse, error) {
	r, err := readFetch(req, req.Timeout, req.OldestContentAccepted)
	if err != nil {
		return nil, err
	}
	got, err := s.a.FetchDirectory(ctx, r)
	inline, err := fetchStatus(ctx, req.Uris, err)
	if err != nil {
		return nil, err
	}
	if inline.status.Code != 0 {
		return &assetpb.FetchDirectoryResponse{Status: inline.status, Uri: inline.uri, DigestFunction: r.Function.Proto()}, nil
	}
	return &assetpb.FetchDirectoryResponse{
		Status: inline.status, Uri: got.URI, Qualifiers: writeQualifiers(got.Qualifiers), ExpiresAt: writeTime(got.ExpiresAt),
		RootDirectoryDigest: got.Digest.Proto(), DigestFunction: r.Function.Proto(),
	}, nil
}

// fetchRequest is what both requests have.
type fetchRequest interface {
	GetInstanceName() string
	GetUris() []string
	GetQualifiers() []*assetpb.Qualifier
	GetDigestFunction() repb.DigestFunction_Value
}

// readFetch reads a request. An absent digest function is SHA256.
func readFetch(req fetchRequest, timeout *durationpb.Duration, oldest *timestamppb.Timestamp) (asset.Request, error) {
	r := asset.Request{
		Instance: req.GetInstanceName(), URIs: req.GetUris(), Qualifiers: readQualifiers(req.GetQualifiers()), Function: digest.SHA256,
	}
	err := resource.CheckInstance(r.Instance)
	if err != nil {
		return r, status.From(err)
	}
	if fn := req.GetDigestFunction(); fn != repb.DigestFunction_UNKNOWN {
		if r.Function, err = digest.FunctionFromProto(fn, 0); err != nil {
			return r, status.From(err)
		}
	}
	if timeout != nil {
		if err := timeout.CheckValid(); err != nil {
			return r, gstatus.Errorf(codes.InvalidArgument, "timeout: %v", err)
		}
		// Clients that have no timeout of their own send zero.
		r.Timeout = timeout.AsDuration()
	}
	r.Oldest, err = readTime("oldest_content_accepted", oldest)
	return r, err
}

// readTime reads a time; none is zero.
func readTime(field string, t *timestamppb.Timestamp) (time.Time, error) {
	if t == nil {
		return time.Time{}, nil
	}
	if err := t.CheckValid(); err != nil {
		return time.Time{}, gstatus.Errorf(codes.InvalidArgument, "%s: %v", field, err)
	}
	return t.AsTime(), nil
}

func writeTime(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func readQualifiers(qs []*assetpb.Qualifier) []asset.Qualifier {
	read := make([]asset.Qualifier, len(qs))
	for i, q := range qs {
		read[i] = asset.Qualifier{Name: q.GetName(), Value: q.GetValue()}
	}
	return read
}

func writeQualifiers(qs []asset.Qualifier) []*assetpb.Qualifier {
	written := make([]*assetpb.Qualifier, len(qs))
	for i, q := range qs {
		written[i] = &assetpb.Qualifier{Name: q.Name, Value: q.Value}
	}
	return written
}

// inlined is the part of a response that says how the fetch ended.
type inlined struct {
	status *spb.Status
	uri    string
}

// fetchStatus tells failures of origins, which stand within the response, from
// those of the call.
func fetchStatus(ctx context.Context, uris []string, err error) (inlined, error) {
	f, ok := errors.AsType[*asset.FetchError](err)
	if !ok {
		return inlined{status: &spb.Status{}}, assetStatus(err)
	}
	code := reasonCode(f.Reason)
	if !overlooksStatus(ctx) && !ofBuildStream(uris) {
		return inlined{status: gstatus.New(code, cutMessage(f.Error())).Proto(), uri: f.URI}, nil
	}
	if code == codes.Aborted {
		code = codes.FailedPrecondition // which is not tried again at once, five times
	}
	return inlined{}, gstatus.Error(code, cutMessage(f.Error()))
}

// overlooksStatus tells whether the client takes a response with an error in it for
// the empty file, as Bazel did before 8.2: without a checksum nobody would notice. A
// Bazel that does not tell its version, as Debian's, may be any.
func overlooksStatus(ctx context.Context) bool {
	values := metadata.ValueFromIncomingContext(ctx, "build.bazel.remote.execution.v2.requestmetadata-bin")
	m := &repb.RequestMetadata{}
	if len(values) == 0 || proto.Unmarshal([]byte(values[0]), m) != nil || m.GetToolDetails().GetToolName() != "bazel" {
		return false
	}
	var major, minor int
	n, err := fmt.Sscanf(m.ToolDetails.ToolVersion, "%d.%d", &major, &minor)
	return err != nil || n != 2 || major < 8 || (major == 8 && minor < 2)
}

// ofBuildStream tells whether the asset is one of BuildStream's, of which version 1 looks
// at the call's status alone and takes the digest of any response for the artifact's;
// version 2 takes NOT_FOUND from either place.
func ofBuildStream(uris []string) bool {
	return len(uris) != 0 && strings.HasPrefix(uris[0], "urn:fdc:buildstream.build:")
}

// maxReasonBytes bounds what is told of a failed fetch.
const maxReasonBytes = 4 << 10

func cutMessage(s string) string {
	if len(s) > maxReasonBytes {
		s = s[:maxReasonBytes] + "..."
	}
	return string([]rune(s)) // UTF-8, without which the status could not be marshalled
}

// reasonCode is what FetchBlobResponse.status in remote_asset.proto says.
func reasonCode(r asset.Reason) codes.Code {
	switch r {
	case asset.NotFound:
		return codes.NotFound
	case asset.Denied:
		return codes.PermissionDenied
	case asset.TooLarge, asset.Busy:
		return codes.ResourceExhausted
	case asset.TimedOut:
		return codes.DeadlineExceeded
	case asset.Aborted:
	}
	return codes.Aborted
}

// assetStatus is the status of a call.
func assetStatus(err error) error {
	if u, ok := errors.AsType[*asset.UnsupportedError](err); ok {
		return unsupported(u)
	}
	if errors.Is(err, asset.ErrInvalid) {
		return gstatus.Error(codes.InvalidArgument, cutMessage(err.Error()))
	}
	return status.From(err)
}

// unsupported names the qualifiers in the way that Fetch.FetchBlob in
// remote_asset.proto describes.
func unsupported(u *asset.UnsupportedError) error {
	s := gstatus.New(codes.InvalidArgument, cutMessage(u.Error()))
	detail := &errdetails.BadRequest{}
	for _, name := range u.Names {
		detail.FieldViolations = append(detail.FieldViolations, &errdetails.BadRequest_FieldViolation{
			Field: "qualifiers.name", Description: strconv.Quote(name) + " not supported",
		})
	}
	if with, err := s.WithDetails(detail); err == nil {
		s = with
	}
	return s.Err()
}

type pushServer struct {
	assetpb.UnimplementedPushServer
	a Assets
}

// PushBlob remembers a file that is in the CAS.
func (s *pushServer) PushBlob(ctx context.Context, req *assetpb.PushBlobRequest) (*assetpb.PushBlobResponse, error) {
	p, err := readPush(req, req.BlobDigest)
	if err == nil {
		err = assetStatus(s.a.PushBlob(ctx, p))
	}
	if err != nil {
		return nil, err
	}
	return &assetpb.PushBlobResponse{}, nil
}

// PushDirectory remembers a directory that is in the CAS.
func (s *pushServer) PushDirectory(ctx context.Context, req *assetpb.PushDirectoryRequest) (*assetpb.PushDirectoryResponse, error) {
	p, err := readPush(req, req.RootDirectoryDigest)
	if err == nil {
		err = assetStatus(s.a.PushDirectory(ctx, p))
	}
	if err != nil {
		return nil, err
	}
	return &assetpb.PushDirectoryResponse{}, nil
}

// pushRequest is what both requests have.
type pushRequest interface {
	fetchRequest
	GetExpireAt() *timestamppb.Timestamp
	GetReferencesBlobs() []*repb.Digest
	GetReferencesDirectories() []*repb.Digest
}

// readPush reads a request about d. Where it names no digest function, the length of
// d's hash tells it for all.
func readPush(req pushRequest, d *repb.Digest) (asset.Push, error) {
	p := asset.Push{Instance: req.GetInstanceName(), URIs: req.GetUris(), Qualifiers: readQualifiers(req.GetQualifiers())}
	err := resource.CheckInstance(p.Instance)
	if err != nil {
		return p, status.From(err)
	}
	if p.Digest, err = readDigest(req.GetDigestFunction(), d); err != nil {
		return p, status.From(err)
	}
	if p.ExpireAt, err = readTime("expire_at", req.GetExpireAt()); err != nil {
		return p, err
	}
	read := func(ms []*repb.Digest) ([]digest.Digest, error) {
		ds := make([]digest.Digest, len(ms))
		for i, m := range ms {
			if ds[i], err = digest.FromProto(p.Digest.Function(), m); err != nil {
				return nil, status.From(err)
			}
		}
		return ds, nil
	}
	if p.Blobs, err = read(req.GetReferencesBlobs()); err != nil {
		return p, err
	}
	p.Directories, err = read(req.GetReferencesDirectories())
	return p, err
}
