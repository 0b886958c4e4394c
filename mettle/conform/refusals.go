package conform

import (
	"context"
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

//nolint:revive // a table
func refusalCases() []Case {
	exec := []need{needsExecution}
	const (
		invalid = "`INVALID_ARGUMENT`: One or more arguments are invalid."
		missing = "where, for each requested blob not present in the CAS, there is a `Violation` with a `type` of `MISSING` and a `subject` of `\"blobs/{digest_function/}{hash}/{size}\"` indicating the digest of the missing blob."
	)
	violates := func(t *T, err error, d *repb.Digest) {
		t.want("Execute", err, codes.FailedPrecondition)
		subject := fmt.Sprintf("blobs/%s%s/%d", t.named(), d.Hash, d.SizeBytes)
		for _, detail := range status.Convert(err).Details() {
			f, ok := detail.(*errdetails.PreconditionFailure)
			for _, v := range f.GetViolations() {
				if ok && v.Type == "MISSING" && v.Subject == subject {
					return
				}
			}
		}
		t.errorf("there is no violation MISSING of %s in %v", subject, status.Convert(err).Details())
	}
	lacks := func(name string, prepare func(ctx context.Context, t *T, k *task) *repb.Digest) Case {
		return Case{Name: "execute/missing_" + name, Clause: missing, Level: Should, Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("true")
			d := prepare(ctx, t, k)
			violates(t, t.execute(ctx, k).refused(), d)
		}}
	}
	refuses := func(name, clause string, want []codes.Code, prepare func(ctx context.Context, t *T, k *task)) Case {
		return Case{Name: "execute/refuses_" + name, Clause: clause, Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("true")
			prepare(ctx, t, k)
			t.want("Execute", t.execute(ctx, k).refused(), want...)
		}}
	}
	bad := []codes.Code{codes.InvalidArgument}
	badOrFailed := []codes.Code{codes.InvalidArgument, codes.FailedPrecondition}
	return []Case{
		{Name: "execute/missing_action", Clause: missing, Level: Should, Needs: exec, run: func(ctx context.Context, t *T) {
			d := t.fresh()
			s, err := t.calls.exec.Execute(ctx, &repb.ExecuteRequest{InstanceName: t.o.Instance, ActionDigest: d, DigestFunction: t.function()})
			t.ok("Execute", err)
			violates(t, follow(s.Recv).refused(), d)
		}},
		lacks("command", func(_ context.Context, t *T, k *task) *repb.Digest {
			k.action.CommandDigest = t.fresh()
			return k.action.CommandDigest
		}),
		lacks("input_root", func(_ context.Context, t *T, k *task) *repb.Digest {
			k.action.InputRootDigest = t.fresh()
			return k.action.InputRootDigest
		}),
		lacks("directory", func(_ context.Context, t *T, k *task) *repb.Digest {
			d := t.fresh()
			k.root = &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "d", Digest: d}}}
			return d
		}),
		lacks("file", func(_ context.Context, t *T, k *task) *repb.Digest {
			d := t.fresh()
			k.root = &repb.Directory{Files: []*repb.FileNode{{Name: "f", Digest: d}}}
			return d
		}),
		{Name: "execute/refuses_no_digest", Clause: invalid, Needs: exec, run: func(ctx context.Context, t *T) {
			s, err := t.calls.exec.Execute(ctx, &repb.ExecuteRequest{InstanceName: t.o.Instance})
			t.ok("Execute", err)
			t.want("Execute of nothing", follow(s.Recv).refused(), codes.InvalidArgument)
		}},
		refuses("no_arguments", invalid, bad, func(_ context.Context, _ *T, k *task) { k.script = "" }),
		refuses("absolute_output", "The path MUST NOT include a trailing slash, nor a leading slash, being a relative path.", bad, func(_ context.Context, _ *T, k *task) { k.command.OutputPaths = []string{"/etc/passwd"} }),
		refuses("output_with_a_trailing_slash", "The path MUST NOT include a trailing slash, nor a leading slash, being a relative path.", bad, func(_ context.Context, _ *T, k *task) { k.command.OutputPaths = []string{"a/"} }),
		refuses("output_above_the_root", "The paths are relative to the working directory of the action execution.", badOrFailed, func(_ context.Context, _ *T, k *task) { k.command.OutputPaths = []string{"../../etc/passwd"} }),
		refuses("working_directory_above_the_root", "It must be a directory which exists in the input tree.", badOrFailed, func(_ context.Context, _ *T, k *task) { k.command.WorkingDirectory = "../.." }),
		refuses("absolute_working_directory", "The working directory, relative to the input root, for the command to run in.", badOrFailed, func(_ context.Context, _ *T, k *task) { k.command.WorkingDirectory = "/tmp" }),
		refuses("file_name_with_a_slash", "Every child in the directory must have a path of exactly one segment.", badOrFailed, func(ctx context.Context, t *T, k *task) {
			k.root = &repb.Directory{Files: []*repb.FileNode{{Name: "a/b", Digest: t.put(ctx, t.bytes(3))}}}
		}),
		refuses("dot_dot", "Every child in the directory must have a path of exactly one segment.", badOrFailed, func(ctx context.Context, t *T, k *task) {
			k.root = &repb.Directory{Files: []*repb.FileNode{{Name: "..", Digest: t.put(ctx, t.bytes(3))}}}
		}),
		refuses("same_name_twice", "Each child in the directory must have a unique path segment (file name).", badOrFailed, func(ctx context.Context, t *T, k *task) {
			k.root = &repb.Directory{
				Files:    []*repb.FileNode{{Name: "a", Digest: t.put(ctx, t.bytes(3))}},
				Symlinks: []*repb.SymlinkNode{{Name: "a", Target: "b"}},
			}
		}),
		refuses("unknown_property", "If an unknown `name` is provided in the requirements for an [Action][build.bazel.remote.execution.v2.Action], the server SHOULD reject the execution request.", []codes.Code{codes.FailedPrecondition, codes.InvalidArgument}, func(_ context.Context, t *T, k *task) {
			k.action.Platform = &repb.Platform{Properties: append([]*repb.Platform_Property{{Name: "conform-nobody-has-this", Value: t.salt}}, t.o.Platform...)}
		}),
		refuses("unknown_node_property", "If a property is not recognized by the server, the server will return an `INVALID_ARGUMENT`.", bad, func(_ context.Context, _ *T, k *task) {
			k.command.OutputNodeProperties = []string{"conform-nobody-knows-this"}
		}),
		{Name: "execute/refuses_wrong_size", Clause: sizeClause, Needs: exec, run: func(ctx context.Context, t *T) {
			r := t.store(ctx, shell("true"))
			r.ActionDigest = &repb.Digest{Hash: r.ActionDigest.Hash, SizeBytes: r.ActionDigest.SizeBytes + 1}
			s, err := t.calls.exec.Execute(ctx, r)
			t.ok("Execute", err)
			t.want("Execute of the hash of an action with another size", follow(s.Recv).refused(), codes.FailedPrecondition, codes.InvalidArgument, codes.NotFound)
		}},
		{Name: "execute/program_not_found", Clause: "The first argument specifies the command to run", Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("")
			k.command.Arguments = []string{"/nobody/has/this/program"}
			e := t.execute(ctx, k)
			if e.refused() == nil && e.response.GetResult().GetExitCode() == 0 {
				t.errorf("a program that is not there ends with 0")
			}
		}},
	}
}
