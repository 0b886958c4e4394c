package bench_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	longrunningpb "cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/klauspost/compress/zstd"
	bspb "google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/digest"
)

// fakeServer is a small REAPI server that keeps everything in memory, checks
// what it is sent, and pretends to execute.
type fakeServer struct {
	repb.UnimplementedCapabilitiesServer
	repb.UnimplementedContentAddressableStorageServer
	repb.UnimplementedActionCacheServer
	repb.UnimplementedExecutionServer
	bspb.UnimplementedByteStreamServer

	fn       digest.Function
	caps     *repb.ServerCapabilities
	noBatch  bool
	exitCode int32
	failing  atomic.Bool // Execute answers UNAVAILABLE
	onExec   func()
	stdout   string // of every action
	instance string
	header   string // the authorization that is wanted

	batches, streams atomic.Int64
	platform         atomic.Value // of the last action that ran, a string

	mu      sync.Mutex // guards what follows
	blobs   map[string][]byte
	results map[string]*repb.ActionResult
}

func newFake() *fakeServer {
	return &fakeServer{
		fn: digest.SHA256,
		caps: &repb.ServerCapabilities{
			CacheCapabilities: &repb.CacheCapabilities{
				DigestFunctions:        []repb.DigestFunction_Value{repb.DigestFunction_SHA256, repb.DigestFunction_BLAKE3},
				MaxBatchTotalSizeBytes: 1 << 20,
				SupportedCompressors:   []repb.Compressor_Value{repb.Compressor_ZSTD},
			},
			ExecutionCapabilities: &repb.ExecutionCapabilities{ExecEnabled: true},
		},
		// As the actions of the subject sandboxed print.
		stdout: "user:[1]\nmnt:[2]\npid:[3]\n",
		blobs:  map[string][]byte{}, results: map[string]*repb.ActionResult{},
	}
}

// start serves f on loopback and returns its address.
func (f *fakeServer) start(t *testing.T) string {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		if got := metadata.ValueFromIncomingContext(ctx, "authorization"); f.header != "" && (len(got) != 1 || got[0] != f.header) {
			return nil, status.Errorf(codes.Unauthenticated, "authorization %q", got)
		}
		return h(ctx, req)
	}))
	repb.RegisterCapabilitiesServer(s, f)
	repb.RegisterContentAddressableStorageServer(s, f)
	repb.RegisterActionCacheServer(s, f)
	repb.RegisterExecutionServer(s, f)
	bspb.RegisterByteStreamServer(s, f)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Stop()
		<-ended
	})
	return "grpc://" + l.Addr().String()
}

func (f *fakeServer) put(d *repb.Digest, data []byte) error {
	if got := digest.Of(f.fn, data); got.Hash() != d.GetHash() || got.Size() != d.GetSizeBytes() {
		return status.Errorf(codes.InvalidArgument, "the bytes are not those of %v", d)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.blobs[d.GetHash()] = data
	return nil
}

func (f *fakeServer) get(hash string) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b, ok := f.blobs[hash]
	if !ok {
		return nil, status.Errorf(codes.NotFound, "no blob %s", hash)
	}
	return b, nil
}

func (f *fakeServer) GetCapabilities(_ context.Context, r *repb.GetCapabilitiesRequest) (*repb.ServerCapabilities, error) {
	if r.GetInstanceName() != f.instance {
		return nil, status.Errorf(codes.InvalidArgument, "no instance %q", r.GetInstanceName())
	}
	return f.caps, nil
}

func (f *fakeServer) FindMissingBlobs(_ context.Context, r *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
	resp := &repb.FindMissingBlobsResponse{}
	for _, d := range r.GetBlobDigests() {
		if _, err := f.get(d.GetHash()); err != nil {
			resp.MissingBlobDigests = append(resp.MissingBlobDigests, d)
		}
	}
	return resp, nil
}

func (f *fakeServer) BatchUpdateBlobs(_ context.Context, r *repb.BatchUpdateBlobsRequest) (*repb.BatchUpdateBlobsResponse, error) {
	if f.noBatch {
		return nil, status.Error(codes.Unimplemented, "no batches here")
	}
	f.batches.Add(1)
	if limit := f.caps.GetCacheCapabilities().GetMaxBatchTotalSizeBytes(); limit > 0 && int64(proto.Size(r)) > limit {
		return nil, status.Errorf(codes.InvalidArgument, "a batch of %d bytes", proto.Size(r))
	}
	resp := &repb.BatchUpdateBlobsResponse{}
	for _, b := range r.GetRequests() {
		resp.Responses = append(resp.Responses, &repb.BatchUpdateBlobsResponse_Response{
			Digest: b.GetDigest(), Status: status.Convert(f.put(b.GetDigest(), b.GetData())).Proto(),
		})
	}
	return resp, nil
}

func (f *fakeServer) BatchReadBlobs(_ context.Context, r *repb.BatchReadBlobsRequest) (*repb.BatchReadBlobsResponse, error) {
	resp := &repb.BatchReadBlobsResponse{}
	for _, d := range r.GetDigests() {
		data, err := f.get(d.GetHash())
		resp.Responses = append(resp.Responses, &repb.BatchReadBlobsResponse_Response{
			Digest: d, Data: data, Status: status.Convert(err).Proto(),
		})
	}
	return resp, nil
}

func (f *fakeServer) GetActionResult(_ context.Context, r *repb.GetActionResultRequest) (*repb.ActionResult, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if a, ok := f.results[r.GetActionDigest().GetHash()]; ok {
		return a, nil
	}
	return nil, status.Error(codes.NotFound, "no result")
}

func (f *fakeServer) UpdateActionResult(_ context.Context, r *repb.UpdateActionResultRequest) (*repb.ActionResult, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.results[r.GetActionDigest().GetHash()] = r.GetActionResult()
	return r.GetActionResult(), nil
}

func (f *fakeServer) Execute(r *repb.ExecuteRequest, s grpc.ServerStreamingServer[longrunningpb.Operation]) error {
	if f.onExec != nil {
		f.onExec()
	}
	if f.failing.Load() {
		return status.Error(codes.Unavailable, "no worker today")
	}
	if err := s.Send(&longrunningpb.Operation{Name: "op"}); err != nil {
		return err
	}
	hash := r.GetActionDigest().GetHash()
	f.mu.Lock()
	result, cached := f.results[hash]
	f.mu.Unlock()
	if !cached {
		action, command := &repb.Action{}, &repb.Command{}
		if err := errors.Join(f.message(hash, action), f.message(action.GetCommandDigest().GetHash(), command)); err != nil {
			return err
		}
		if _, err := f.get(action.GetInputRootDigest().GetHash()); err != nil {
			return err
		}
		if !proto.Equal(action.GetPlatform(), command.GetPlatform()) {
			return status.Errorf(codes.InvalidArgument, "platforms differ: %v and %v", action.GetPlatform(), command.GetPlatform())
		}
		var platform []string
		for _, p := range action.GetPlatform().GetProperties() {
			platform = append(platform, p.GetName()+"="+p.GetValue())
		}
		f.platform.Store(strings.Join(platform, " "))
		result = &repb.ActionResult{ExitCode: f.exitCode, StdoutRaw: []byte(f.stdout), StderrRaw: []byte("it broke"), ExecutionMetadata: &repb.ExecutedActionMetadata{
			QueuedTimestamp: &timestamppb.Timestamp{Seconds: 1}, WorkerStartTimestamp: &timestamppb.Timestamp{Seconds: 3},
			ExecutionStartTimestamp: &timestamppb.Timestamp{Seconds: 4}, ExecutionCompletedTimestamp: &timestamppb.Timestamp{Seconds: 6, Nanos: 500_000_000},
			WorkerCompletedTimestamp: &timestamppb.Timestamp{Seconds: 7},
		}}
		for _, o := range command.GetOutputPaths() {
			result.OutputFiles = append(result.OutputFiles, &repb.OutputFile{Path: o})
		}
		f.mu.Lock()
		f.results[hash] = result
		f.mu.Unlock()
	}
	resp, err := anypb.New(&repb.ExecuteResponse{Result: result, CachedResult: cached})
	if err != nil {
		return err
	}
	return s.Send(&longrunningpb.Operation{Name: "op", Done: true, Result: &longrunningpb.Operation_Response{Response: resp}})
}

// WaitExecution is for operations that are done.
func (f *fakeServer) WaitExecution(r *repb.WaitExecutionRequest, s grpc.ServerStreamingServer[longrunningpb.Operation]) error {
	if r.GetName() != "op" {
		return status.Errorf(codes.NotFound, "no operation %q", r.GetName())
	}
	return s.Send(&longrunningpb.Operation{Name: "op", Done: true})
}

func (f *fakeServer) message(hash string, m proto.Message) error {
	b, err := f.get(hash)
	if err != nil {
		return err
	}
	return proto.Unmarshal(b, m)
}

func (f *fakeServer) Read(r *bspb.ReadRequest, s bspb.ByteStream_ReadServer) error {
	parts := strings.Split(r.GetResourceName(), "/")
	data, err := f.get(parts[len(parts)-2])
	if err != nil {
		return err
	}
	if strings.Contains(r.GetResourceName(), "/zstd/") {
		if data, err = squeeze(data); err != nil {
			return err
		}
	}
	for len(data) > 0 {
		n := min(len(data), 1<<20)
		if err := s.Send(&bspb.ReadResponse{Data: data[:n]}); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

func (f *fakeServer) Write(s bspb.ByteStream_WriteServer) error {
	f.streams.Add(1)
	var data []byte
	name, finished := "", false
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if name == "" {
			name = m.GetResourceName()
		}
		if m.GetWriteOffset() != int64(len(data)) || finished {
			return status.Errorf(codes.InvalidArgument, "offset %d after %d bytes, finished: %v", m.GetWriteOffset(), len(data), finished)
		}
		data = append(data, m.GetData()...)
		finished = m.GetFinishWrite()
	}
	parts := strings.Split(name, "/")
	if len(parts) < 5 || !finished {
		return status.Errorf(codes.InvalidArgument, "resource name %q, finished: %v", name, finished)
	}
	received := int64(len(data))
	if strings.Contains(name, "/zstd/") {
		var err error
		if data, err = expand(data); err != nil {
			return err
		}
	}
	if err := f.put(&repb.Digest{Hash: parts[len(parts)-2], SizeBytes: int64(len(data))}, data); err != nil {
		return err
	}
	return s.SendAndClose(&bspb.WriteResponse{CommittedSize: received})
}

// squeeze is data as zstd.
func squeeze(data []byte) ([]byte, error) {
	w, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	return w.EncodeAll(data, nil), w.Close()
}

// expand is the opposite of squeeze.
func expand(data []byte) ([]byte, error) {
	r, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return r.DecodeAll(data, nil)
}

// GetTree sends a page a directory of the root.
func (f *fakeServer) GetTree(r *repb.GetTreeRequest, s grpc.ServerStreamingServer[repb.GetTreeResponse]) error {
	root := &repb.Directory{}
	if err := f.message(r.GetRootDigest().GetHash(), root); err != nil {
		return err
	}
	if err := s.Send(&repb.GetTreeResponse{Directories: []*repb.Directory{root}}); err != nil {
		return err
	}
	for _, folder := range root.GetDirectories() {
		dir := &repb.Directory{}
		if err := f.message(folder.GetDigest().GetHash(), dir); err != nil {
			return err
		}
		page := &repb.GetTreeResponse{Directories: []*repb.Directory{dir}}
		for _, leaf := range dir.GetDirectories() {
			d := &repb.Directory{}
			if err := f.message(leaf.GetDigest().GetHash(), d); err != nil {
				return err
			}
			page.Directories = append(page.Directories, d)
		}
		if err := s.Send(page); err != nil {
			return err
		}
	}
	return nil
}
