package rpc_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	assetpb "github.com/bazelbuild/remote-apis/build/bazel/remote/asset/v1"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/asset"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/rpc"
)

// fakeAssets notes what it is asked, and answers what it is told to.
type fakeAssets struct {
	req  asset.Request
	push asset.Push
	resp asset.Response
	err  error
}

func (f *fakeAssets) FetchBlob(_ context.Context, r asset.Request) (asset.Response, error) {
	f.req = r
	return f.resp, f.err
}

func (f *fakeAssets) FetchDirectory(ctx context.Context, r asset.Request) (asset.Response, error) {
	return f.FetchBlob(ctx, r)
}

func (f *fakeAssets) PushBlob(_ context.Context, p asset.Push) error {
	f.push = p
	return f.err
}

func (f *fakeAssets) PushDirectory(ctx context.Context, p asset.Push) error {
	return f.PushBlob(ctx, p)
}

func startAssets(t *testing.T, a rpc.Assets) (assetpb.FetchClient, assetpb.PushClient) {
	t.Helper()
	s := start(t, rpc.Options{Assets: a})
	return assetpb.NewFetchClient(s.conn), assetpb.NewPushClient(s.conn)
}

func TestFetch(t *testing.T) {
	now := time.Now().UTC()
	d := digest.Of(digest.BLAKE3, []byte("hello"))
	f := &fakeAssets{resp: asset.Response{
		Digest: d, URI: "https://a", Qualifiers: []asset.Qualifier{{Name: "n", Value: "v"}}, ExpiresAt: now.Add(time.Hour),
	}}
	fetch, _ := startAssets(t, f)
	qs := []*assetpb.Qualifier{{Name: "resource_type", Value: "x"}}
	uris := []string{"https://a", "https://b"}
	want := asset.Request{
		Instance: "i", URIs: uris, Qualifiers: []asset.Qualifier{{Name: "resource_type", Value: "x"}},
		Function: digest.BLAKE3, Timeout: time.Minute, Oldest: now,
	}
	blobResp, err := fetch.FetchBlob(t.Context(), &assetpb.FetchBlobRequest{
		InstanceName: "i", Timeout: durationpb.New(time.Minute), OldestContentAccepted: timestamppb.New(now), Uris: uris, Qualifiers: qs,
		DigestFunction: repb.DigestFunction_BLAKE3,
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, f.req); diff != "" {
		t.Errorf("request, -want +got:\n%s", diff)
	}
	if diff := cmp.Diff(&assetpb.FetchBlobResponse{
		Status: &spb.Status{}, Uri: "https://a", Qualifiers: []*assetpb.Qualifier{{Name: "n", Value: "v"}}, ExpiresAt: timestamppb.New(now.Add(time.Hour)),
		BlobDigest: d.Proto(), DigestFunction: repb.DigestFunction_BLAKE3,
	}, blobResp, protocmp.Transform()); diff != "" {
		t.Errorf("response, -want +got:\n%s", diff)
	}
	dirResp, err := fetch.FetchDirectory(t.Context(), &assetpb.FetchDirectoryRequest{
		InstanceName: "i", Timeout: durationpb.New(time.Minute), OldestContentAccepted: timestamppb.New(now), Uris: uris, Qualifiers: qs,
		DigestFunction: repb.DigestFunction_BLAKE3,
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, f.req); diff != "" {
		t.Errorf("request, -want +got:\n%s", diff)
	}
	if diff := cmp.Diff(&assetpb.FetchDirectoryResponse{
		Status: &spb.Status{}, Uri: "https://a", Qualifiers: []*assetpb.Qualifier{{Name: "n", Value: "v"}}, ExpiresAt: timestamppb.New(now.Add(time.Hour)),
		RootDirectoryDigest: d.Proto(), DigestFunction: repb.DigestFunction_BLAKE3,
	}, dirResp, protocmp.Transform()); diff != "" {
		t.Errorf("response, -want +got:\n%s", diff)
	}
	// What is not said is the default.
	f.resp.ExpiresAt = time.Time{}
	blobResp, err = fetch.FetchBlob(t.Context(), &assetpb.FetchBlobRequest{Uris: uris})
	if err != nil || blobResp.ExpiresAt != nil || blobResp.DigestFunction != repb.DigestFunction_SHA256 || f.req.Function != digest.SHA256 || !f.req.Oldest.IsZero() {
		t.Errorf("%v, %v; of %+v", blobResp, err, f.req)
	}
}

func TestFetch_refuses(t *testing.T) {
	fetch, _ := startAssets(t, &fakeAssets{})
	for name, req := range map[string]*assetpb.FetchBlobRequest{
		"instance":        {InstanceName: "a/blobs/b"},
		"digest function": {DigestFunction: repb.DigestFunction_MD5},
		"timeout":         {Timeout: &durationpb.Duration{Seconds: 1, Nanos: -1}},
		"oldest":          {OldestContentAccepted: &timestamppb.Timestamp{Nanos: -1}},
	} {
		_, err := fetch.FetchBlob(t.Context(), req)
		wantCode(t, name, err, codes.InvalidArgument)
	}
}

// bazel is the context of a call by that version of Bazel.
func bazel(t *testing.T, tool, version string) context.Context {
	t.Helper()
	data, err := proto.Marshal(&repb.RequestMetadata{ToolDetails: &repb.ToolDetails{ToolName: tool, ToolVersion: version}})
	if err != nil {
		t.Fatal(err)
	}
	return metadata.AppendToOutgoingContext(t.Context(), "build.bazel.remote.execution.v2.requestmetadata-bin", string(data))
}

// TestFetch_failures: what is an origin's fault stands in the response, except for
// clients that do not look there.
func TestFetch_failures(t *testing.T) {
	f := &fakeAssets{}
	fetch, _ := startAssets(t, f)
	req := &assetpb.FetchBlobRequest{Uris: []string{"https://a/x"}}
	for reason, want := range map[asset.Reason]codes.Code{
		asset.NotFound: codes.NotFound,
		asset.Denied:   codes.PermissionDenied,
		asset.Aborted:  codes.Aborted,
		asset.TooLarge: codes.ResourceExhausted,
		asset.Busy:     codes.ResourceExhausted,
		asset.TimedOut: codes.DeadlineExceeded,
	} {
		f.err = fmt.Errorf("wrapped: %w", &asset.FetchError{Reason: reason, URI: "https://a/x", Err: errors.New("the words \xff")})
		for name, ctx := range map[string]context.Context{
			"anybody": t.Context(), "a new Bazel": bazel(t, "bazel", "8.2.0"), "a newer one": bazel(t, "bazel", "10.0.0-pre.1"), "another tool": bazel(t, "buck2", "1.0"),
		} {
			got, err := fetch.FetchBlob(ctx, req)
			if err != nil {
				t.Fatalf("%v to %s: %v", reason, name, err)
			}
			if codes.Code(got.Status.Code) != want || !strings.Contains(got.Status.Message, "the words") || got.Uri != "https://a/x" || got.BlobDigest != nil {
				t.Errorf("%v to %s: %v, want %v", reason, name, got, want)
			}
			dir, err := fetch.FetchDirectory(ctx, &assetpb.FetchDirectoryRequest{Uris: req.Uris})
			if err != nil || codes.Code(dir.Status.Code) != want || dir.RootDirectoryDigest != nil {
				t.Errorf("%v to %s: %v, %v, want %v", reason, name, dir, err, want)
			}
		}
		if want == codes.Aborted {
			want = codes.FailedPrecondition
		}
		for _, version := range []string{"4.2.3- (@non-git)", "8.1.1", "7.6.0", "no_version", ""} {
			_, err := fetch.FetchBlob(bazel(t, "bazel", version), req)
			wantCode(t, fmt.Sprintf("%v to Bazel %q", reason, version), err, want)
		}
	}
}

// TestFetch_unknownToBuildStream: BuildStream 1.6 sends no metadata, and pulls the digest
// of whatever response it gets.
func TestFetch_unknownToBuildStream(t *testing.T) {
	const urn = "urn:fdc:buildstream.build:2020:v1:project/element/0123abcd"
	fetch, _ := startAssets(t, &fakeAssets{err: &asset.FetchError{Reason: asset.NotFound, URI: urn, Err: errors.New("nobody pushed it")}})
	_, err := fetch.FetchDirectory(t.Context(), &assetpb.FetchDirectoryRequest{Uris: []string{urn}})
	wantCode(t, "FetchDirectory", err, codes.NotFound)
	_, err = fetch.FetchBlob(t.Context(), &assetpb.FetchBlobRequest{Uris: []string{urn}})
	wantCode(t, "FetchBlob", err, codes.NotFound)
}

func TestAsset_errors(t *testing.T) {
	f := &fakeAssets{}
	fetch, push := startAssets(t, f)
	d := of([]byte("x")).Proto()
	for _, tc := range []struct {
		err  error
		want codes.Code
	}{
		{fmt.Errorf("x: %w", asset.ErrInvalid), codes.InvalidArgument},
		{&asset.UnsupportedError{Names: []string{"a", "b"}}, codes.InvalidArgument},
		{&blob.MissingError{Digests: []digest.Digest{of([]byte("y"))}}, codes.FailedPrecondition},
		{blob.ErrFull, codes.ResourceExhausted},
		{blob.ErrUnavailable, codes.Unavailable},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{errors.New("x"), codes.Internal},
	} {
		f.err = tc.err
		_, err := fetch.FetchBlob(t.Context(), &assetpb.FetchBlobRequest{Uris: []string{"x"}})
		wantCode(t, "FetchBlob", err, tc.want)
		_, err = fetch.FetchDirectory(t.Context(), &assetpb.FetchDirectoryRequest{Uris: []string{"x"}})
		wantCode(t, "FetchDirectory", err, tc.want)
		_, err = push.PushBlob(t.Context(), &assetpb.PushBlobRequest{Uris: []string{"x"}, BlobDigest: d})
		wantCode(t, "PushBlob", err, tc.want)
		_, err = push.PushDirectory(t.Context(), &assetpb.PushDirectoryRequest{Uris: []string{"x"}, RootDirectoryDigest: d})
		wantCode(t, "PushDirectory", err, tc.want)
	}
	f.err = &asset.UnsupportedError{Names: []string{"a", "b"}}
	_, err := fetch.FetchBlob(t.Context(), &assetpb.FetchBlobRequest{Uris: []string{"x"}})
	want := &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
		{Field: "qualifiers.name", Description: `"a" not supported`},
		{Field: "qualifiers.name", Description: `"b" not supported`},
	}}
	details := gstatus.Convert(err).Details()
	if len(details) != 1 {
		t.Fatalf("details %v, want one", details)
	}
	if diff := cmp.Diff(want, details[0], protocmp.Transform()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestPush(t *testing.T) {
	f := &fakeAssets{}
	_, push := startAssets(t, f)
	a, b, c := digest.Of(digest.SHA1, []byte("a")), digest.Of(digest.SHA1, []byte("b")), digest.Of(digest.SHA1, []byte("c"))
	at := time.Now().UTC()
	want := asset.Push{
		Instance: "i", URIs: []string{"urn:x"}, Qualifiers: []asset.Qualifier{{Name: "n", Value: "v"}}, Digest: a, ExpireAt: at,
		Blobs: []digest.Digest{b}, Directories: []digest.Digest{c},
	}
	if _, err := push.PushBlob(t.Context(), &assetpb.PushBlobRequest{
		InstanceName: "i", Uris: want.URIs, Qualifiers: []*assetpb.Qualifier{{Name: "n", Value: "v"}}, ExpireAt: timestamppb.New(at),
		BlobDigest: a.Proto(), ReferencesBlobs: []*repb.Digest{b.Proto()}, ReferencesDirectories: []*repb.Digest{c.Proto()},
	}); err != nil {
		t.Fatal(err)
	}
	opt := cmp.Comparer(func(x, y digest.Digest) bool { return x == y })
	if diff := cmp.Diff(want, f.push, opt); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	f.push = asset.Push{}
	if _, err := push.PushDirectory(t.Context(), &assetpb.PushDirectoryRequest{
		InstanceName: "i", Uris: want.URIs, Qualifiers: []*assetpb.Qualifier{{Name: "n", Value: "v"}}, ExpireAt: timestamppb.New(at),
		RootDirectoryDigest: a.Proto(), ReferencesBlobs: []*repb.Digest{b.Proto()}, ReferencesDirectories: []*repb.Digest{c.Proto()},
	}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, f.push, opt); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	for name, req := range map[string]*assetpb.PushBlobRequest{
		"no digest":        {},
		"instance":         {InstanceName: "blobs", BlobDigest: a.Proto()},
		"a bad digest":     {BlobDigest: &repb.Digest{Hash: "x"}},
		"a bad reference":  {BlobDigest: a.Proto(), ReferencesBlobs: []*repb.Digest{{}}},
		"another function": {BlobDigest: a.Proto(), ReferencesDirectories: []*repb.Digest{of([]byte("x")).Proto()}},
		"a bad time":       {BlobDigest: a.Proto(), ExpireAt: &timestamppb.Timestamp{Nanos: -1}},
	} {
		_, err := push.PushBlob(t.Context(), req)
		wantCode(t, name, err, codes.InvalidArgument)
	}
}

// TestAsset_service drives the service itself over the wire.
func TestAsset_service(t *testing.T) {
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("hello")) }))
	t.Cleanup(origin.Close)
	store, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	assets, err := asset.New(asset.Options{Store: store, Entries: store, AllowPrivate: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := assets.Close(); err != nil {
			t.Error(err)
		}
	})
	fetch, push := startAssets(t, assets)
	got, err := fetch.FetchBlob(t.Context(), &assetpb.FetchBlobRequest{Uris: []string{origin.URL}})
	if err != nil || !proto.Equal(got.BlobDigest, of([]byte("hello")).Proto()) {
		t.Fatalf("%v, %v", got, err)
	}
	_, err = fetch.FetchBlob(t.Context(), &assetpb.FetchBlobRequest{Uris: []string{origin.URL}, Qualifiers: []*assetpb.Qualifier{{Name: "x"}}})
	wantCode(t, "an unknown qualifier", err, codes.InvalidArgument)
	if _, err := push.PushBlob(t.Context(), &assetpb.PushBlobRequest{Uris: []string{"urn:x"}, BlobDigest: got.BlobDigest}); err != nil {
		t.Fatal(err)
	}
	pushed, err := fetch.FetchBlob(t.Context(), &assetpb.FetchBlobRequest{Uris: []string{"urn:x"}})
	if err != nil || !proto.Equal(pushed.BlobDigest, got.BlobDigest) || pushed.Uri != "urn:x" {
		t.Errorf("%v, %v", pushed, err)
	}
	none, err := fetch.FetchDirectory(t.Context(), &assetpb.FetchDirectoryRequest{Uris: []string{"urn:x"}})
	if err != nil || codes.Code(none.Status.Code) != codes.NotFound {
		t.Errorf("%v, %v; want NOT_FOUND within", none, err)
	}
}
