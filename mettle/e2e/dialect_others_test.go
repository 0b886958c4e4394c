package e2e_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
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

// sdkUpload is how the Go SDK of remote-apis-sdks uploads: go/pkg/client/cas.go, with
// batches and with the compression of all that is not smaller than a threshold.
func sdkUpload(d *dialect, b *blobs, threshold int) {
	d.t.Helper()
	for _, data := range d.missing(b) {
		switch {
		case len(data) >= threshold || len(data) > 1<<20:
			zstd := len(data) >= threshold
			if n := d.write(written{chunk: 1 << 20, zstd: zstd, eachNamed: true, lastEmpty: zstd}, data); n != int64(len(data)) && n != -1 && !zstd {
				d.t.Errorf("committed %d of %d", n, len(data))
			}
		default:
			d.batch(repb.Compressor_IDENTITY, data)
		}
	}
	if left := d.missing(b); len(left) != 0 {
		d.t.Errorf("%d blobs are missing after they were written", len(left))
	}
}

// sdkSymlinks checks the only fields in which the SDK looks for symlinks.
func sdkSymlinks(d *dialect, res *repb.ActionResult) {
	d.t.Helper()
	if len(res.OutputFileSymlinks)+len(res.OutputDirectorySymlinks) == 0 {
		d.t.Errorf("no symlinks where the SDK looks: %v", res)
	}
}

// please is src/remote/{remote,action}.go of thought-machine/please at 00ec919, over the
// SDK: the digest function must be the one of both capabilities, actions run a shell with
// _BINARY set for executable outputs, and it writes stamped results under another digest.
func please(t *testing.T, conn *grpc.ClientConn) {
	d := &dialect{t: t, conn: conn, instance: "plz", fn: digest.SHA256, tool: "please", version: "17.8.0"}
	caps := d.capabilities(0)
	if !slices.Contains(caps.GetCacheCapabilities().GetDigestFunctions(), repb.DigestFunction_SHA256) ||
		caps.GetExecutionCapabilities().GetDigestFunction() != repb.DigestFunction_SHA256 || !caps.GetExecutionCapabilities().GetExecEnabled() {
		t.Errorf("it finds no acceptable hash function in %v", caps)
	}
	b := &blobs{d: d}
	command := &repb.Command{
		OutputPaths: []string{"tool", "link"},
		EnvironmentVariables: []*repb.Command_EnvironmentVariable{
			{Name: "SANDBOX", Value: "true"}, {Name: "_BINARY", Value: "true"}, {Name: "TMP_DIR", Value: "."}, {Name: "PATH", Value: "/bin:/usr/bin"},
		},
		Platform: &repb.Platform{Properties: []*repb.Platform_Property{{Name: "OSFamily", Value: "linux"}}},
	}
	action := d.script(b, command, &repb.Action{Timeout: durationpb.New(10 * time.Minute)}, "cp in tool; ln -s tool link; echo $_BINARY; chmod +x tool")
	sdkUpload(d, b, 8<<20)
	resp := d.execute(&repb.ExecuteRequest{ActionDigest: action})
	res := resp.GetResult()
	if len(res.GetOutputFiles()) != 1 || !res.OutputFiles[0].IsExecutable || string(res.StdoutRaw) != "true\n" {
		t.Fatalf("Execute: %v", resp)
	}
	sdkSymlinks(d, res)
	unstamped := d.digest([]byte("the digest of " + t.Name() + " without its stamp"))
	if _, err := repb.NewActionCacheClient(conn).UpdateActionResult(d.ctx(), &repb.UpdateActionResultRequest{
		InstanceName: d.instance, ActionDigest: unstamped, ActionResult: res,
	}); err != nil {
		t.Errorf("UpdateActionResult: %v", err)
	}
	if got := d.result(&repb.GetActionResultRequest{ActionDigest: unstamped, InlineStdout: true}); string(got.GetStdoutRaw()) != "true\n" {
		t.Errorf("the unstamped result: %v", got)
	}
}

// reclient is bazelbuild/reclient with go/pkg/rexec of the SDK: a look into the cache, and
// Execute that skips it; downloads in compressed batches; labels that pools must declare.
func reclient(t *testing.T, conn *grpc.ClientConn) {
	d := &dialect{t: t, conn: conn, instance: "default_instance", fn: digest.SHA256, tool: "re-client", version: "0.185.0"}
	caps := d.capabilities(0)
	if caps.GetCacheCapabilities().GetMaxBatchTotalSizeBytes() <= 0 {
		t.Error("max_batch_total_size_bytes is not given: it writes each blob by itself")
	}
	platform := &repb.Platform{Properties: []*repb.Platform_Property{{Name: "OSFamily", Value: "Linux"}, {Name: "label:action_default", Value: "1"}}}
	b := &blobs{d: d}
	action := d.script(b, &repb.Command{OutputPaths: []string{"obj", "dir", "link"}, WorkingDirectory: "", Platform: platform},
		&repb.Action{Timeout: durationpb.New(time.Hour), Platform: platform}, "head -c 1000 in > obj; mkdir -p dir/sub; echo y > dir/sub/y; ln -s obj link; echo warning >&2")
	if res := d.result(&repb.GetActionResultRequest{ActionDigest: action, InlineStdout: true, InlineStderr: true}); res != nil {
		t.Fatalf("it is in the cache: %v", res)
	}
	sdkUpload(d, b, 0)
	resp := d.execute(&repb.ExecuteRequest{ActionDigest: action, SkipCacheLookup: true})
	res := resp.GetResult()
	if len(res.GetOutputFiles()) != 1 || len(res.GetOutputDirectories()) != 1 || string(res.GetStderrRaw()) != "warning\n" {
		t.Fatalf("Execute: %v", resp)
	}
	sdkSymlinks(d, res)
	both := []repb.Compressor_Value{repb.Compressor_ZSTD}
	tree := &repb.Tree{}
	m := res.OutputDirectories[0].TreeDigest
	got := d.download(both, m, res.OutputFiles[0].Digest)
	if err := proto.Unmarshal(got[m.Hash], tree); err != nil || len(tree.Children) != 1 {
		t.Errorf("the Tree: %v, %v", tree, err)
	}
	// remotetool and the input checks of reproxy read input roots by GetTree.
	root := &repb.Action{}
	if err := proto.Unmarshal(b.data[len(b.data)-1], root); err != nil {
		t.Fatal(err)
	}
	stream, err := repb.NewContentAddressableStorageClient(conn).GetTree(d.ctx(), &repb.GetTreeRequest{InstanceName: d.instance, RootDigest: root.InputRootDigest})
	if err != nil {
		t.Fatal(err)
	}
	if page, err := stream.Recv(); err != nil || len(page.Directories) != 1 {
		t.Errorf("GetTree: %v, %v", page, err)
	}
}

// siso is reapi/{reapi,cas,exec}.go of Chromium's siso at 1dfb6d1, and what its option
// -reapi_keep_exec_stream is against: the first of the compressors, an instance that must
// have a name, a stream that it leaves after the first message to ask by GetOperation, and
// one status message by which it knows a timeout from a broken call.
func siso(t *testing.T, conn *grpc.ClientConn) {
	d := &dialect{t: t, conn: conn, instance: "default_instance", fn: digest.SHA256, tool: "siso", version: "1.4"}
	caps := d.capabilities(0)
	if c := caps.GetCacheCapabilities().GetSupportedCompressors(); len(c) == 0 || c[0] != repb.Compressor_ZSTD {
		t.Errorf("the first compressor of %v is not zstd, so it compresses nothing", c)
	}
	b := &blobs{d: d}
	command := &repb.Command{OutputFiles: []string{"out/obj"}, OutputDirectories: []string{"out/gen"}}
	action := d.script(b, command, &repb.Action{Timeout: durationpb.New(time.Hour)}, "cp in out/obj; mkdir -p out/gen; echo z > out/gen/z")
	sdkUpload(d, b, 1024)
	ctx, leave := context.WithCancel(d.ctx())
	stream, err := repb.NewExecutionClient(conn).Execute(ctx, &repb.ExecuteRequest{InstanceName: d.instance, ActionDigest: action})
	if err != nil {
		t.Fatal(err)
	}
	op, err := stream.Recv()
	leave()
	if err != nil {
		t.Fatal(err)
	}
	operations := longrunningpb.NewOperationsClient(conn)
	poll(t, "the operation to end", func() bool {
		op, err = operations.GetOperation(t.Context(), &longrunningpb.GetOperationRequest{Name: op.GetName()})
		if err != nil {
			t.Fatalf("GetOperation: %v", err)
		}
		return op.Done
	})
	resp := &repb.ExecuteResponse{}
	if err := op.GetResponse().UnmarshalTo(resp); err != nil {
		t.Fatal(err)
	}
	if len(resp.GetResult().GetOutputFiles()) != 1 || len(resp.Result.OutputDirectories) != 1 {
		t.Fatalf("Execute: %v", resp)
	}
	d.read(resp.Result.OutputFiles[0].Digest, true)

	late := &blobs{d: d}
	slow := d.script(late, &repb.Command{}, &repb.Action{Timeout: durationpb.New(200 * time.Millisecond)}, "echo so far; sleep 1000")
	sdkUpload(d, late, 1024)
	resp = d.execute(&repb.ExecuteRequest{ActionDigest: slow})
	if codes.Code(resp.Status.GetCode()) != codes.DeadlineExceeded || resp.Status.Message != "execution timeout exceeded" { //nolint:gosec // a status code
		t.Errorf("a timeout that it takes for a broken call, and executes again: %v", resp.Status)
	}
	if !strings.Contains(resp.Message, "longer than 200ms") {
		t.Errorf("the message for people: %q", resp.Message)
	}
}

// recc is recc and buildbox-common's buildboxcommon_{client,remoteexecutionclient}.cpp: an
// Action from a working directory deep in the tree, outputs below and beside it, a result
// that is looked for first, and symlinks and properties of nodes.
func recc(t *testing.T, conn *grpc.ClientConn) {
	d := &dialect{t: t, conn: conn, fn: digest.SHA256, tool: "recc", version: "1.3.0"}
	d.capabilities(0)
	b := &blobs{d: d}
	mode := &repb.NodeProperties{Properties: []*repb.NodeProperty{{Name: "SubtreeReadOnly", Value: "true"}}}
	build := &repb.Directory{NodeProperties: mode}
	root := &repb.Directory{
		Directories: []*repb.DirectoryNode{{Name: "build", Digest: b.addMessage(build)}},
		Files:       []*repb.FileNode{{Name: "hello.c", Digest: b.add([]byte("int main() {} // " + t.Name()))}},
		Symlinks:    []*repb.SymlinkNode{{Name: "link.c", Target: "hello.c"}},
	}
	command := &repb.Command{
		Arguments: []string{"/bin/sh", "-c", "cp ../link.c hello.o; cp hello.o ../beside.d"}, WorkingDirectory: "build",
		OutputFiles: []string{"../beside.d", "hello.o"}, OutputNodeProperties: []string{"mtime", "unix_mode"},
	}
	action := b.addMessage(&repb.Action{CommandDigest: b.addMessage(command), InputRootDigest: b.addMessage(root)})
	if res := d.result(&repb.GetActionResultRequest{ActionDigest: action}); res != nil {
		t.Fatalf("it is in the cache: %v", res)
	}
	d.batch(repb.Compressor_IDENTITY, d.missing(b)...)
	resp := d.execute(&repb.ExecuteRequest{ActionDigest: action})
	var paths []string
	for _, f := range resp.GetResult().GetOutputFiles() {
		paths = append(paths, f.Path)
		if f.NodeProperties.GetMtime() == nil || f.NodeProperties.GetUnixMode().GetValue() == 0 {
			t.Errorf("properties of %s: %v", f.Path, f.NodeProperties)
		}
	}
	slices.Sort(paths)
	if !slices.Equal(paths, []string{"../beside.d", "hello.o"}) {
		t.Errorf("Execute: %v", resp)
	}
}
