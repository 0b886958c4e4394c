package e2e_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/elan/digest"
)

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
	platform := &repb.Platform{Properties: []*repb.Platform_Property{
		{Name: "InputRootAbsolutePath", Value: "/home/someone/src"}, {Name: "OSFamily", Value: "Linux"}, {Name: "label:action_default", Value: "1"},
	}}
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
