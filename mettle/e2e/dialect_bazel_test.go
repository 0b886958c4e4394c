package e2e_test

import (
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/digest"
)

// What Bazel does, by src/main/java/com/google/devtools/build/lib/remote of the branches
// release-5.4.1 to release-9: RemoteExecutionService (which calls, in which order),
// GrpcCacheClient and ByteStreamUploader (blobs), GrpcRemoteExecutor (Execute). Versions
// 2 and 4 build for real in TestBazel_*.

// bazelChunk is what it sends in one message of a Write.
const bazelChunk = 16 << 10

// A bazelAction is an action of Bazel's, and what is uploaded for it.
type bazelAction struct {
	blobs  *blobs
	action *repb.Digest
	large  []byte
}

// bazelActionOf is a compilation, so to speak, of a large input into an object, a .d
// file, a directory and a symlink. With paths its outputs stand in output_paths, as from
// Bazel 7 on where the server speaks 2.1 or later.
func bazelActionOf(d *dialect, paths bool, more ...*repb.NodeProperty) bazelAction {
	b := &blobs{d: d}
	in := large(d.t.Name())
	tools := &repb.Directory{Files: []*repb.FileNode{{
		Name: "tool.sh", IsExecutable: true, NodeProperties: &repb.NodeProperties{Properties: more},
		Digest: b.add([]byte("#!/bin/sh\nset -e\ncp $1 $2; echo \"$2: $1\" > $3; mkdir -p $4/sub; echo in > $4/sub/file; ln -s sub/file $4/link; echo printed\n")),
	}}}
	root := &repb.Directory{
		Files:       []*repb.FileNode{{Name: "in", Digest: b.add(in)}},
		Directories: []*repb.DirectoryNode{{Name: "tools", Digest: b.addMessage(tools)}},
	}
	platform := &repb.Platform{Properties: []*repb.Platform_Property{{Name: "OSFamily", Value: "Linux"}}}
	command := &repb.Command{
		Arguments:            []string{"tools/tool.sh", "in", "bazel-out/k8/bin/o", "bazel-out/k8/bin/o.d", "bazel-out/k8/bin/tree"},
		EnvironmentVariables: []*repb.Command_EnvironmentVariable{{Name: "PATH", Value: "/bin:/usr/bin"}},
		Platform:             platform,
	}
	if files := []string{"bazel-out/k8/bin/o", "bazel-out/k8/bin/o.d"}; paths {
		command.OutputPaths = append(files, "bazel-out/k8/bin/tree")
	} else {
		command.OutputFiles, command.OutputDirectories = files, []string{"bazel-out/k8/bin/tree"}
	}
	action := &repb.Action{CommandDigest: b.addMessage(command), InputRootDigest: b.addMessage(root), Platform: platform}
	return bazelAction{b, b.addMessage(action), in}
}

// bazelBuild is the whole of an action that is not in the cache: a look there, a look for
// what is missing, uploads, Execute, the outputs, and a hit for whoever comes next.
func bazelBuild(d *dialect, a bazelAction, w written) {
	d.t.Helper()
	if res := d.result(&repb.GetActionResultRequest{ActionDigest: a.action, InlineOutputFiles: []string{"bazel-out/k8/bin/o.d"}}); res != nil {
		d.t.Fatalf("it is in the cache: %v", res)
	}
	for _, data := range d.missing(a.blobs) {
		// From 5.0 on it takes -1 for a compressed blob, too.
		if n := d.write(w, data); n != int64(len(data)) && (!w.zstd || n != -1 && n != int64(len(compress(d.t, data)))) {
			d.t.Errorf("Write of %d bytes: committed %d", len(data), n)
		}
	}
	if left := d.missing(a.blobs); len(left) != 0 {
		d.t.Errorf("%d blobs are missing after they were written", len(left))
	}
	// Another action uploads the same at the same time: the server may answer early.
	if n := d.write(w, a.large); n != int64(len(a.large)) && (!w.zstd || n != -1) {
		d.t.Errorf("Write of a blob that is there: committed %d of %d", n, len(a.large))
	}
	resp := d.execute(&repb.ExecuteRequest{ActionDigest: a.action, ResultsCachePolicy: &repb.ResultsCachePolicy{}, ExecutionPolicy: &repb.ExecutionPolicy{}})
	if resp.Status.GetCode() != 0 || resp.Result.GetExitCode() != 0 || resp.CachedResult {
		d.t.Fatalf("Execute: %v", resp)
	}
	bazelOutputs(d, a, resp.Result, w.zstd)
	hit := d.result(&repb.GetActionResultRequest{ActionDigest: a.action, InlineOutputFiles: []string{"bazel-out/k8/bin/o.d"}})
	if hit == nil {
		d.t.Fatal("it is not in the cache")
	}
	bazelOutputs(d, a, hit, w.zstd)
	if again := d.execute(&repb.ExecuteRequest{ActionDigest: a.action}); !again.CachedResult {
		d.t.Errorf("Execute again: %v", again)
	}
}

// bazelOutputs reads what a result names, as Bazel does: each file, and of a directory
// the Tree.
func bazelOutputs(d *dialect, a bazelAction, res *repb.ActionResult, compressed bool) {
	d.t.Helper()
	files := map[string]*repb.OutputFile{}
	for _, f := range res.OutputFiles {
		files[f.Path] = f
	}
	object, deps := files["bazel-out/k8/bin/o"], files["bazel-out/k8/bin/o.d"]
	if object == nil || deps == nil || len(res.OutputDirectories) != 1 {
		d.t.Fatalf("result %v", res)
	}
	if got := d.read(object.Digest, compressed); string(got) != string(a.large) {
		d.t.Errorf("the object has %d bytes", len(got))
	}
	if got := string(deps.Contents); got != "" && got != "bazel-out/k8/bin/o: in\n" {
		d.t.Errorf("the .d file, inline: %q", got)
	}
	tree := &repb.Tree{}
	if err := proto.Unmarshal(d.read(res.OutputDirectories[0].TreeDigest, compressed), tree); err != nil {
		d.t.Fatal(err)
	}
	if len(tree.GetRoot().GetSymlinks()) != 1 || len(tree.Children) != 1 || len(tree.Children[0].Files) != 1 {
		d.t.Errorf("the Tree: %v", tree)
	} else if got := string(d.read(tree.Children[0].Files[0].Digest, compressed)); got != "in\n" {
		d.t.Errorf("the file of the Tree: %q", got)
	}
	if d.t.Failed() {
		return
	}
	stdout := string(res.StdoutRaw)
	if res.StdoutDigest != nil && stdout == "" {
		stdout = string(d.read(res.StdoutDigest, compressed))
	}
	if stdout != "printed\n" {
		d.t.Errorf("stdout %q", stdout)
	}
}

// bazel5: --experimental_remote_cache_compression, and no digest_function anywhere.
func bazel5(t *testing.T, conn *grpc.ClientConn) {
	d := &dialect{t: t, conn: conn, fn: digest.SHA256, tool: "bazel", version: "5.4.1"}
	caps := d.capabilities(0).GetCacheCapabilities()
	if !strings.Contains(caps.String(), "ZSTD") || !caps.GetActionCacheUpdateCapabilities().GetUpdateEnabled() {
		t.Errorf("capabilities %v", caps)
	}
	bazelBuild(d, bazelActionOf(d, false), written{chunk: bazelChunk, zstd: true})
}

// bazel6: an instance of several parts, --experimental_remote_mark_tool_inputs, and
// --remote_header with what nobody asked for.
func bazel6(t *testing.T, conn *grpc.ClientConn) {
	d := &dialect{t: t, conn: conn, instance: "projects/p/instances/i", fn: digest.SHA256, tool: "bazel", version: "6.5.0"}
	d.headers = []string{"x-build-owner", "team", "authorization", "Basic dXNlcjpwYXNzd29yZA=="}
	d.capabilities(0)
	bazelBuild(d, bazelActionOf(d, false, &repb.NodeProperty{Name: "bazel_tool_input"}), written{chunk: bazelChunk})
}

// bazel7: --digest_function=blake3, and a build without the bytes: outputs are read long
// after, and looked for before.
func bazel7(t *testing.T, conn *grpc.ClientConn) {
	d := &dialect{t: t, conn: conn, fn: digest.BLAKE3, named: true, tool: "bazel", version: "7.4.1"}
	caps := d.capabilities(0)
	if !strings.Contains(caps.GetCacheCapabilities().String(), "BLAKE3") || !strings.Contains(caps.GetExecutionCapabilities().String(), "BLAKE3") {
		t.Errorf("capabilities %v", caps)
	}
	a := bazelActionOf(d, true)
	bazelBuild(d, a, written{chunk: bazelChunk, zstd: true})
	// The next action has an output of this one as its input, which was never downloaded.
	res := d.result(&repb.GetActionResultRequest{ActionDigest: a.action})
	if res == nil {
		t.Fatal("it is not in the cache")
	}
	b := &blobs{d: d}
	root := &repb.Directory{Files: []*repb.FileNode{{Name: "o", Digest: res.OutputFiles[0].Digest}}}
	command := &repb.Command{Arguments: []string{"/bin/sh", "-c", "wc -c < o > size"}, OutputPaths: []string{"size"}}
	next := b.addMessage(&repb.Action{CommandDigest: b.addMessage(command), InputRootDigest: b.addMessage(root)})
	for _, data := range d.missing(b) {
		d.write(written{chunk: bazelChunk}, data)
	}
	if resp := d.execute(&repb.ExecuteRequest{ActionDigest: next}); len(resp.GetResult().GetOutputFiles()) != 1 {
		t.Errorf("an action on an output: %v", resp)
	}
}

// bazel8: a local build that caches; results and their blobs are uploaded in the
// background, in any order, after the action.
func bazel8(t *testing.T, conn *grpc.ClientConn) {
	d := &dialect{t: t, conn: conn, fn: digest.SHA256, named: true, tool: "bazel", version: "8.2.1"}
	d.capabilities(0)
	a := bazelActionOf(d, true)
	if d.result(&repb.GetActionResultRequest{ActionDigest: a.action, InlineStdout: true, InlineStderr: true}) != nil {
		t.Fatal("it is in the cache")
	}
	outputs := &blobs{d: d}
	res := &repb.ActionResult{
		OutputFiles:  []*repb.OutputFile{{Path: "bazel-out/k8/bin/o", Digest: outputs.add(a.large), IsExecutable: true}},
		StdoutDigest: outputs.add([]byte(t.Name())),
	}
	// Action and Command are for whoever looks; the input root stays here.
	outputs.data = append(outputs.data, a.blobs.data[len(a.blobs.data)-1])
	for _, data := range d.missing(outputs) {
		d.write(written{chunk: bazelChunk}, data)
	}
	if _, err := repb.NewActionCacheClient(conn).UpdateActionResult(d.ctx(), &repb.UpdateActionResultRequest{
		ActionDigest: a.action, ActionResult: res, DigestFunction: d.function(),
	}); err != nil {
		t.Fatalf("UpdateActionResult: %v", err)
	}
	got := d.result(&repb.GetActionResultRequest{ActionDigest: a.action, InlineStdout: true, InlineStderr: true})
	if len(got.GetOutputFiles()) != 1 || string(got.GetStdoutRaw()) != t.Name() && got.GetStdoutDigest() == nil {
		t.Errorf("the result: %v", got)
	}
}

// bazel9: an input that it took for uploaded is gone (--rewind_lost_inputs): the digest
// is read from the violations, the action that makes it runs again without the cache, and
// what failed is executed again.
func bazel9(t *testing.T, conn *grpc.ClientConn) {
	d := &dialect{t: t, conn: conn, fn: digest.BLAKE3, named: true, tool: "bazel", version: "9.0.0"}
	if caps := d.capabilities(0); !caps.GetExecutionCapabilities().GetExecEnabled() {
		t.Errorf("capabilities %v", caps)
	}
	a := bazelActionOf(d, true)
	lost := d.digest(a.large)
	for _, data := range d.missing(a.blobs) {
		if string(data) != string(a.large) {
			d.write(written{chunk: bazelChunk}, data)
		}
	}
	resp := d.execute(&repb.ExecuteRequest{ActionDigest: a.action})
	if codes.Code(resp.Status.GetCode()) != codes.FailedPrecondition { //nolint:gosec // a status code
		t.Fatalf("Execute without an input: %v", resp)
	}
	for _, detail := range gstatus.FromProto(resp.Status).Details() {
		failure, ok := detail.(*errdetails.PreconditionFailure)
		if !ok {
			t.Fatalf("a detail that Bazel does not know: %v", detail)
		}
		for _, v := range failure.Violations {
			// It takes the hash and the size from the end.
			parts := strings.Split(v.Subject, "/")
			if v.Type != "MISSING" || len(parts) < 3 || parts[0] != "blobs" || parts[len(parts)-2] != lost.Hash {
				t.Errorf("violation %v, want %s missing", v, lost.Hash)
			}
		}
	}
	// A download of what is gone is NOT_FOUND, which it takes for lost, and nothing else.
	if _, err := d.open(lost); gstatus.Code(err) != codes.NotFound {
		t.Errorf("Read of what is gone: %v", err)
	}
	d.write(written{chunk: bazelChunk, zstd: true}, a.large)
	resp = d.execute(&repb.ExecuteRequest{ActionDigest: a.action, SkipCacheLookup: true})
	if resp.Status.GetCode() != 0 || resp.CachedResult {
		t.Errorf("Execute with all inputs: %v", resp)
	}
}
