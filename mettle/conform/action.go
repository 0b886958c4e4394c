package conform

import (
	"context"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// anAction stores an Action that nobody has, with its Command, and returns its
// digest.
func (t *T) anAction(ctx context.Context) *repb.Digest {
	cmd := t.putMessage(ctx, &repb.Command{Arguments: []string{"true", t.uuid()}})
	return t.putMessage(ctx, &repb.Action{CommandDigest: cmd, InputRootDigest: t.putMessage(ctx, &repb.Directory{})})
}

func (t *T) getResult(ctx context.Context, d *repb.Digest) (*repb.ActionResult, error) {
	return t.calls.actions.GetActionResult(ctx, &repb.GetActionResultRequest{InstanceName: t.o.Instance, ActionDigest: d, DigestFunction: t.function()})
}

func (t *T) setResult(ctx context.Context, d *repb.Digest, r *repb.ActionResult) error {
	_, err := t.calls.actions.UpdateActionResult(ctx, &repb.UpdateActionResultRequest{InstanceName: t.o.Instance, ActionDigest: d, ActionResult: r, DigestFunction: t.function()})
	return err
}

//nolint:revive // a table
func actionCases() []Case {
	const (
		available = "Implementations SHOULD ensure that any blobs referenced from the [ContentAddressableStorage][build.bazel.remote.execution.v2.ContentAddressableStorage] are available at the time of returning the [ActionResult][build.bazel.remote.execution.v2.ActionResult] and will be for some period of time afterwards."
		notThere  = "`NOT_FOUND`: The requested `ActionResult` is not in the cache."
		upload    = "Upload a new execution result."
		noInline  = "The server SHOULD NOT inline stdout unless requested by the client"
	)
	cas, update := []need{needsCache}, []need{needsCache, needsUpdate}
	return []Case{
		{Name: "action_cache/absent", Clause: notThere, Needs: cas, run: func(ctx context.Context, t *T) {
			_, err := t.getResult(ctx, t.fresh())
			t.want("GetActionResult of what is not there", err, codes.NotFound)
		}},
		{Name: "action_cache/round_trip", Clause: upload, Needs: update, run: func(ctx context.Context, t *T) {
			d := t.anAction(ctx)
			want := &repb.ActionResult{
				OutputFiles:       []*repb.OutputFile{{Path: "a/out", Digest: t.put(ctx, t.bytes(10)), IsExecutable: true}},
				OutputSymlinks:    []*repb.OutputSymlink{{Path: "link", Target: "a/out"}},
				StdoutDigest:      t.put(ctx, t.bytes(20)),
				ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "conform"},
			}
			t.ok("UpdateActionResult", t.setResult(ctx, d, want))
			got, err := t.getResult(ctx, d)
			t.ok("GetActionResult", err)
			if len(got.OutputFiles) != 1 || !proto.Equal(got.OutputFiles[0].Digest, want.OutputFiles[0].Digest) || !got.OutputFiles[0].IsExecutable || got.OutputFiles[0].Path != "a/out" {
				t.errorf("output_files are %v, want %v", got.OutputFiles, want.OutputFiles)
			}
			if len(got.OutputSymlinks) != 1 || got.OutputSymlinks[0].Target != "a/out" || !proto.Equal(got.StdoutDigest, want.StdoutDigest) || got.GetExecutionMetadata().GetWorker() != "conform" {
				t.errorf("the result is %v, want %v", got, want)
			}
		}},
		{Name: "action_cache/replace", Clause: upload, Needs: update, run: func(ctx context.Context, t *T) {
			d := t.anAction(ctx)
			for _, worker := range []string{"first", "second"} {
				t.ok("UpdateActionResult", t.setResult(ctx, d, &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: worker}}))
				got, err := t.getResult(ctx, d)
				t.ok("GetActionResult", err)
				if w := got.GetExecutionMetadata().GetWorker(); w != worker {
					t.errorf("the result is that of %q, want that of %q", w, worker)
				}
			}
		}},
		{Name: "action_cache/missing_output", Clause: available, Level: Should, Needs: update, run: func(ctx context.Context, t *T) {
			d := t.anAction(ctx)
			err := t.setResult(ctx, d, &repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: "out", Digest: t.fresh()}}})
			if err != nil {
				t.want("UpdateActionResult with an output that is not there", err, codes.FailedPrecondition, codes.InvalidArgument, codes.NotFound)
				return
			}
			if _, err := t.getResult(ctx, d); err == nil {
				t.errorf("a result is returned whose output is not there")
			}
		}},
		{Name: "action_cache/missing_tree", Clause: available, Level: Should, Needs: update, run: func(ctx context.Context, t *T) {
			d := t.anAction(ctx)
			tree := t.putMessage(ctx, &repb.Tree{Root: &repb.Directory{Files: []*repb.FileNode{{Name: "f", Digest: t.fresh()}}}})
			err := t.setResult(ctx, d, &repb.ActionResult{OutputDirectories: []*repb.OutputDirectory{{Path: "dir", TreeDigest: tree}}})
			if err != nil {
				return // as above
			}
			if _, err := t.getResult(ctx, d); err == nil {
				t.errorf("a result is returned with a directory whose file is not there")
			}
		}},
		{Name: "action_cache/missing_stdout", Clause: available, Level: Should, Needs: update, run: func(ctx context.Context, t *T) {
			d := t.anAction(ctx)
			if t.setResult(ctx, d, &repb.ActionResult{StdoutDigest: t.fresh()}) != nil {
				return // as above
			}
			if _, err := t.getResult(ctx, d); err == nil {
				t.errorf("a result is returned whose stdout is not there")
			}
		}},
		{Name: "action_cache/no_inlining_unasked", Clause: noInline, Level: Should, Needs: update, run: func(ctx context.Context, t *T) {
			d := t.anAction(ctx)
			t.ok("UpdateActionResult", t.setResult(ctx, d, &repb.ActionResult{StdoutDigest: t.put(ctx, t.bytes(10))}))
			got, err := t.getResult(ctx, d)
			t.ok("GetActionResult", err)
			if len(got.StdoutRaw) > 0 {
				t.errorf("stdout is inlined and nobody asked")
			}
		}},
		{Name: "action_cache/inlining", Clause: "A hint to the server to request inlining stdout in the", Needs: update, run: func(ctx context.Context, t *T) {
			d, out, file := t.anAction(ctx), t.bytes(10), t.bytes(30)
			t.ok("UpdateActionResult", t.setResult(ctx, d, &repb.ActionResult{StdoutDigest: t.put(ctx, out), OutputFiles: []*repb.OutputFile{{Path: "f", Digest: t.put(ctx, file)}}}))
			got, err := t.calls.actions.GetActionResult(ctx, &repb.GetActionResultRequest{InstanceName: t.o.Instance, ActionDigest: d, DigestFunction: t.function(), InlineStdout: true, InlineOutputFiles: []string{"f"}})
			t.ok("GetActionResult", err)
			if len(got.StdoutRaw) > 0 { // it is a hint
				t.same("stdout", got.StdoutRaw, out)
			}
			if len(got.OutputFiles) != 1 {
				t.fatalf("output_files are %v", got.OutputFiles)
			}
			if c := got.OutputFiles[0].Contents; len(c) > 0 {
				t.same("the file", c, file)
			}
		}},
		{Name: "action_cache/inlining_is_bounded", Clause: "The server MAY omit inlining, even if requested, and MUST do so if inlining would cause the response to exceed message size limits.", Needs: update, run: func(ctx context.Context, t *T) {
			d := t.anAction(ctx)
			t.ok("UpdateActionResult", t.setResult(ctx, d, &repb.ActionResult{StdoutDigest: t.put(ctx, t.bytes(3<<20)), StderrDigest: t.put(ctx, t.bytes(3<<20))}))
			_, err := t.calls.actions.GetActionResult(ctx, &repb.GetActionResultRequest{InstanceName: t.o.Instance, ActionDigest: d, DigestFunction: t.function(), InlineStdout: true, InlineStderr: true})
			t.ok("GetActionResult with 6 MiB to inline", err)
		}},
		{Name: "action_cache/malformed_digest", Clause: hashClause, Needs: cas, run: func(ctx context.Context, t *T) {
			_, err := t.getResult(ctx, &repb.Digest{Hash: "xyz", SizeBytes: 3})
			t.want("GetActionResult of hash xyz", err, codes.InvalidArgument)
		}},
		{Name: "action_cache/no_digest", Clause: "The digest of the [Action][build.bazel.remote.execution.v2.Action] whose result is requested.", Needs: cas, run: func(ctx context.Context, t *T) {
			_, err := t.getResult(ctx, nil)
			t.want("GetActionResult of nothing", err, codes.InvalidArgument)
		}},
		{Name: "action_cache/no_result", Clause: "`INVALID_ARGUMENT`: One or more arguments are invalid.", Needs: update, run: func(ctx context.Context, t *T) {
			t.want("UpdateActionResult without a result", t.setResult(ctx, t.anAction(ctx), nil), codes.InvalidArgument)
		}},
		{Name: "action_cache/size_is_part_of_the_key", Clause: sizeClause, Needs: update, run: func(ctx context.Context, t *T) {
			d := t.anAction(ctx)
			t.ok("UpdateActionResult", t.setResult(ctx, d, &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "w"}}))
			_, err := t.getResult(ctx, &repb.Digest{Hash: d.Hash, SizeBytes: d.SizeBytes + 1})
			t.want("GetActionResult of the same hash with another size", err, codes.NotFound, codes.InvalidArgument)
		}},
		{Name: "action_cache/not_for_another_action", Clause: notThere, Needs: update, run: func(ctx context.Context, t *T) {
			a, b := t.anAction(ctx), t.anAction(ctx)
			t.ok("UpdateActionResult", t.setResult(ctx, a, &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "w"}}))
			_, err := t.getResult(ctx, b)
			t.want("GetActionResult of another action", err, codes.NotFound)
		}},
		{Name: "action_cache/refused_where_not_announced", Clause: "Describes the server/instance capabilities for updating the action cache.", Needs: cas, run: func(ctx context.Context, t *T) {
			if needsUpdate(t.server) == "" {
				t.skipf("the server announces that it takes results")
			}
			if err := t.setResult(ctx, t.anAction(ctx), &repb.ActionResult{}); err == nil {
				t.errorf("update_enabled is false and UpdateActionResult succeeds")
			}
		}},
	}
}
