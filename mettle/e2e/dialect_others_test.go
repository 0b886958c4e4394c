package e2e_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	assetpb "github.com/bazelbuild/remote-apis/build/bazel/remote/asset/v1"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/elan/digest"
)

// open begins to read a blob, and returns the error of the first message.
func (d *dialect) open(m *repb.Digest) ([]byte, error) {
	d.t.Helper()
	name := d.resourceOf(m)
	stream, err := bytestream.NewByteStreamClient(d.conn).Read(d.ctx(), &bytestream.ReadRequest{ResourceName: name})
	if err != nil {
		return nil, err
	}
	resp, err := stream.Recv()
	return resp.GetData(), err
}

// download is BatchReadBlobs with the compressors that the client takes.
func (d *dialect) download(compressors []repb.Compressor_Value, all ...*repb.Digest) map[string][]byte {
	d.t.Helper()
	resp, err := repb.NewContentAddressableStorageClient(d.conn).BatchReadBlobs(d.ctx(), &repb.BatchReadBlobsRequest{
		InstanceName: d.instance, Digests: all, AcceptableCompressors: compressors, DigestFunction: d.function(),
	})
	if err != nil {
		d.t.Fatalf("BatchReadBlobs: %v", err)
	}
	got := map[string][]byte{}
	for _, r := range resp.Responses {
		data := r.Data
		if r.Compressor == repb.Compressor_ZSTD {
			data = decompress(d.t, data)
		}
		if r.Status.GetCode() != 0 || !proto.Equal(r.Digest, d.digest(data)) {
			d.t.Errorf("BatchReadBlobs: %v of %d bytes", r.Digest, len(data))
		}
		got[r.Digest.GetHash()] = data
	}
	if len(got) != len(all) {
		d.t.Errorf("BatchReadBlobs has %d of %d blobs", len(got), len(all))
	}
	return got
}

// script is an action that runs a shell's script with an input, and no more.
func (d *dialect) script(b *blobs, command *repb.Command, action *repb.Action, script string) *repb.Digest {
	root := &repb.Directory{Files: []*repb.FileNode{{Name: "in", Digest: b.add(large(d.t.Name()))}}}
	command.Arguments = []string{"/bin/sh", "-c", script}
	action.CommandDigest, action.InputRootDigest = b.addMessage(command), b.addMessage(root)
	return b.addMessage(action)
}

// buck2 is remote_execution/oss/re_grpc/src/client.rs of facebook/buck2 at 0122a0f: batches
// of less than max_batch_total_size_bytes, larger blobs by messages of as much that are all
// named, FindMissing of 100 at a time, the platform in the Command alone, and a result
// without execution_metadata is an error. Before it uploads what it ran itself it tries
// whether it may (empty_action_result.rs).
func buck2(t *testing.T, conn *grpc.ClientConn) {
	d := &dialect{t: t, conn: conn, instance: "buck2", fn: digest.SHA256, tool: "buck2", version: "2026-10-01"}
	caps := d.capabilities(3)
	if !caps.GetExecutionCapabilities().GetExecEnabled() {
		t.Error(`it says "Server has remote execution disabled."`)
	}
	limit := caps.GetCacheCapabilities().GetMaxBatchTotalSizeBytes()
	if limit == 0 {
		limit = 4 << 20
	}
	b := &blobs{d: d}
	action := d.script(b, &repb.Command{
		OutputFiles: []string{"buck-out/v2/out"}, OutputDirectories: []string{"buck-out/v2/dir"},
		Platform: &repb.Platform{Properties: []*repb.Platform_Property{{Name: "OSFamily", Value: "linux"}}},
	}, &repb.Action{Timeout: durationpb.New(time.Hour)}, "cp in buck-out/v2/out; mkdir buck-out/v2/dir; echo x > buck-out/v2/dir/x; echo said >&2")
	small := [][]byte{}
	for _, data := range d.missing(b) {
		if int64(len(data)) < limit {
			small = append(small, data)
			continue
		}
		if n := d.write(written{chunk: int(limit), eachNamed: true}, data); n != int64(len(data)) {
			t.Errorf("committed %d of %d, which it takes for a failure", n, len(data))
		}
	}
	d.batch(repb.Compressor_IDENTITY, small...)
	if res := d.result(&repb.GetActionResultRequest{ActionDigest: action}); res != nil {
		t.Fatalf("it is in the cache: %v", res)
	}
	resp := d.execute(&repb.ExecuteRequest{ActionDigest: action, ResultsCachePolicy: &repb.ResultsCachePolicy{}})
	for what, res := range map[string]*repb.ActionResult{"Execute": resp.GetResult(), "the cache": d.result(&repb.GetActionResultRequest{ActionDigest: action})} {
		if m := res.GetExecutionMetadata(); m == nil || m.Worker == "" || m.ExecutionStartTimestamp == nil || m.OutputUploadCompletedTimestamp == nil {
			t.Errorf("metadata by %s: %v", what, m)
		}
		if len(res.GetOutputFiles()) != 1 || len(res.GetOutputDirectories()) != 1 {
			t.Fatalf("result by %s: %v", what, res)
		}
		tree := &repb.Tree{}
		m := res.OutputDirectories[0].TreeDigest
		if err := proto.Unmarshal(d.download([]repb.Compressor_Value{repb.Compressor_IDENTITY}, m)[m.Hash], tree); err != nil || len(tree.GetRoot().GetFiles()) != 1 {
			t.Errorf("the Tree by %s: %v, %v", what, tree, err)
		}
	}
	d.read(resp.Result.OutputFiles[0].Digest, false)

	probe := &blobs{d: d}
	mine := probe.addMessage(&repb.Action{CommandDigest: probe.addMessage(&repb.Command{Arguments: []string{"/command", "-to", "check", "permission"}})})
	d.batch(repb.Compressor_IDENTITY, probe.data...)
	if _, err := repb.NewActionCacheClient(conn).UpdateActionResult(d.ctx(), &repb.UpdateActionResultRequest{
		InstanceName: d.instance, ActionDigest: mine, ActionResult: &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{}},
	}); err != nil {
		t.Errorf("it takes itself for one who may not write: %v", err)
	}
	if res := d.result(&repb.GetActionResultRequest{ActionDigest: mine}); res.GetExecutionMetadata() == nil {
		t.Errorf("the result that it tried with: %v", res)
	}
}

// pants is remote_provider_reapi/src/byte_store.rs of pantsbuild/pants at 0557a0c and
// process_execution/remote/src/remote.rs at 0e585b2: one blob a batch, files as streams, no
// digest_function, CancelOperation of what nobody wants, WaitExecution where a stream ends.
func pants(t *testing.T, conn *grpc.ClientConn) {
	d := &dialect{t: t, conn: conn, instance: "main", fn: digest.SHA256}
	caps := d.capabilities(0)
	limit := int(caps.GetCacheCapabilities().GetMaxBatchTotalSizeBytes())
	b := &blobs{d: d}
	platform := &repb.Platform{Properties: []*repb.Platform_Property{{Name: "OSFamily", Value: "linux"}}}
	action := d.script(b, &repb.Command{OutputFiles: []string{"out"}, OutputDirectories: []string{"dist"}, Platform: platform},
		&repb.Action{Timeout: durationpb.New(time.Minute), Platform: platform}, "cp in out; mkdir dist; echo wheel > dist/x.whl")
	for _, data := range append(d.missing(b), []byte{}) {
		if len(data) <= 4<<20 && (limit == 0 || len(data) < limit) && len(data) > 0 {
			d.batch(repb.Compressor_IDENTITY, data)
			continue
		}
		if n := d.write(written{chunk: 1 << 20, eachNamed: true}, data); n != int64(len(data)) {
			t.Errorf("committed %d of %d, which it takes for a failure", n, len(data))
		}
	}
	resp := d.execute(&repb.ExecuteRequest{ActionDigest: action})
	if len(resp.GetResult().GetOutputFiles()) != 1 || len(resp.Result.OutputDirectories) != 1 {
		t.Fatalf("Execute: %v", resp)
	}
	d.read(resp.Result.OutputFiles[0].Digest, false)
	// The local run of another action, cached.
	other := &blobs{d: d}
	local := d.script(other, &repb.Command{OutputFiles: []string{"out"}}, &repb.Action{}, "cp in out # here")
	for _, data := range d.missing(other) {
		d.batch(repb.Compressor_IDENTITY, data)
	}
	if _, err := repb.NewActionCacheClient(conn).UpdateActionResult(d.ctx(), &repb.UpdateActionResultRequest{
		InstanceName: d.instance, ActionDigest: local, ActionResult: resp.Result,
	}); err != nil {
		t.Errorf("UpdateActionResult: %v", err)
	}
	if d.result(&repb.GetActionResultRequest{ActionDigest: local}) == nil {
		t.Error("what it put into the cache is not there")
	}
	// Ctrl-C.
	sleeper := &blobs{d: d}
	long := d.script(sleeper, &repb.Command{}, &repb.Action{}, "sleep 1000")
	d.batch(repb.Compressor_IDENTITY, smallOf(d.missing(sleeper))...)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := repb.NewExecutionClient(conn).Execute(ctx, &repb.ExecuteRequest{InstanceName: d.instance, ActionDigest: long})
	if err != nil {
		t.Fatal(err)
	}
	op, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := longrunningpb.NewOperationsClient(conn).CancelOperation(t.Context(), &longrunningpb.CancelOperationRequest{Name: op.Name}); err != nil {
		t.Errorf("CancelOperation: %v", err)
	}
	if res := (&begun{stream: stream}).end(t); codes.Code(res.GetStatus().GetCode()) != codes.Canceled { //nolint:gosec // a status code
		t.Errorf("what was cancelled: %v", res)
	}
}

func smallOf(all [][]byte) [][]byte {
	return slices.DeleteFunc(all, func(data []byte) bool { return len(data) > 1<<20 })
}

// recc is recc and buildbox-common's buildboxcommon_{client,remoteexecutionclient}.cpp: an
// Action from a working directory deep in the tree, outputs below and beside it, a result
// that is looked for first, and properties of nodes; by RECC_REAPI_VERSION 2.0 and 2.1.
func recc(t *testing.T, conn *grpc.ClientConn) {
	d := &dialect{t: t, conn: conn, fn: digest.SHA256, tool: "recc", version: "1.3.0"}
	d.capabilities(0)
	outputs := []string{"../beside.d", "hello.o"}
	for name, command := range map[string]*repb.Command{"2.0": {OutputFiles: outputs}, "2.1": {OutputPaths: outputs}} {
		b := &blobs{d: d}
		root := &repb.Directory{
			Directories: []*repb.DirectoryNode{{Name: "build", Digest: b.addMessage(&repb.Directory{})}},
			Files:       []*repb.FileNode{{Name: "hello.c", Digest: b.add([]byte("int main() {} // " + t.Name() + name))}},
			Symlinks:    []*repb.SymlinkNode{{Name: "link.c", Target: "hello.c"}},
		}
		command.Arguments = []string{"/bin/sh", "-c", "cp ../link.c hello.o; cp hello.o ../beside.d"}
		command.WorkingDirectory, command.OutputNodeProperties = "build", []string{"mtime", "unix_mode"}
		action := b.addMessage(&repb.Action{CommandDigest: b.addMessage(command), InputRootDigest: b.addMessage(root)})
		if res := d.result(&repb.GetActionResultRequest{ActionDigest: action}); res != nil {
			t.Fatalf("%s is in the cache: %v", name, res)
		}
		d.batch(repb.Compressor_IDENTITY, d.missing(b)...)
		resp := d.execute(&repb.ExecuteRequest{ActionDigest: action})
		var paths []string
		for _, f := range resp.GetResult().GetOutputFiles() {
			paths = append(paths, f.Path)
			if f.NodeProperties.GetMtime() == nil || f.NodeProperties.GetUnixMode().GetValue() == 0 {
				t.Errorf("%s: properties of %s: %v", name, f.Path, f.NodeProperties)
			}
		}
		slices.Sort(paths)
		if !slices.Equal(paths, outputs) {
			t.Errorf("Execute by %s: %v", name, resp)
		}
	}
}

// buildStream2 is src/buildstream/_assetcache.py of apache/buildstream at 0038c13: it tries
// both services with empty requests, and an artifact is a blob and a directory that are
// pushed under a URN, and NOT_FOUND for as long as nobody has done so.
func buildStream2(t *testing.T, conn *grpc.ClientConn) {
	d := &dialect{t: t, conn: conn, instance: "main", fn: digest.SHA256}
	fetch, push := assetpb.NewFetchClient(conn), assetpb.NewPushClient(conn)
	if _, err := fetch.FetchBlob(d.ctx(), &assetpb.FetchBlobRequest{InstanceName: d.instance}); gstatus.Code(err) != codes.InvalidArgument {
		t.Errorf("FetchBlob of nothing: %v, want INVALID_ARGUMENT", err)
	}
	if _, err := push.PushBlob(d.ctx(), &assetpb.PushBlobRequest{InstanceName: d.instance}); gstatus.Code(err) != codes.InvalidArgument {
		t.Errorf("PushBlob of nothing: %v, want INVALID_ARGUMENT", err)
	}
	uris := []string{"urn:fdc:buildstream.build:2020:artifact:" + t.Name()}
	known := func() bool {
		resp, err := fetch.FetchBlob(d.ctx(), &assetpb.FetchBlobRequest{InstanceName: d.instance, Uris: uris})
		if code := gstatus.Code(err); code != codes.OK && code != codes.NotFound {
			t.Fatalf("FetchBlob: %v", err)
		}
		return err == nil && resp.Status.GetCode() == 0 && resp.BlobDigest != nil
	}
	if known() {
		t.Fatal("the artifact is there already")
	}
	b := &blobs{d: d}
	artifact := b.add([]byte("the artifact's message, of " + t.Name()))
	root := b.addMessage(&repb.Directory{Files: []*repb.FileNode{{Name: "file", Digest: b.add(large(t.Name()))}}})
	sdkUpload(d, b, 8<<20) // as buildbox-casd does
	if _, err := push.PushBlob(d.ctx(), &assetpb.PushBlobRequest{
		InstanceName: d.instance, Uris: uris, BlobDigest: artifact, ReferencesDirectories: []*repb.Digest{root},
	}); err != nil {
		t.Fatalf("PushBlob: %v", err)
	}
	if !known() {
		t.Error("the artifact that was pushed is not there")
	}
	if _, err := push.PushDirectory(d.ctx(), &assetpb.PushDirectoryRequest{InstanceName: d.instance, Uris: uris, RootDirectoryDigest: root}); err != nil {
		t.Fatalf("PushDirectory: %v", err)
	}
	resp, err := fetch.FetchDirectory(d.ctx(), &assetpb.FetchDirectoryRequest{InstanceName: d.instance, Uris: uris})
	if err != nil || !proto.Equal(resp.RootDirectoryDigest, root) {
		t.Errorf("FetchDirectory: %v, %v", resp, err)
	}
}
