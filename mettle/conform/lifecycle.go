package conform

import (
	"context"
	"errors"
	"io"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

//nolint:revive // a table
func cacheCases() []Case {
	exec := []need{needsExecution}
	return []Case{
		{Name: "execute/cached", Clause: "By default, future calls to [Execute][build.bazel.remote.execution.v2.Execution.Execute] the same `Action` will also serve their results from the cache.", Level: Should, Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("echo once")
			if t.run(ctx, k).CachedResult {
				t.errorf("the first execution has cached_result")
			}
			if r := t.run(ctx, k); !r.CachedResult || t.stdout(ctx, r.Result) != "once\n" {
				t.errorf("the second execution has cached_result %v", r.CachedResult)
			}
		}},
		{Name: "execute/result_is_in_the_action_cache", Clause: "once an `Action` has been executed, will be cached in the action cache.", Level: Should, Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("echo kept")
			t.run(ctx, k)
			r, err := t.getResult(ctx, k.request.ActionDigest)
			t.ok("GetActionResult of what was executed", err)
			if got := t.stdout(ctx, r); got != "kept\n" {
				t.errorf("stdout is %q", got)
			}
		}},
		{Name: "execute/do_not_cache", Clause: "If true, then the `Action`'s result cannot be cached, and in-flight requests for the same `Action` may not be merged.", Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("echo never")
			k.action.DoNotCache = true
			t.run(ctx, k)
			if t.run(ctx, k).CachedResult {
				t.errorf("the second execution has cached_result")
			}
			if _, err := t.getResult(ctx, k.request.ActionDigest); err == nil {
				t.errorf("the result is in the action cache")
			}
		}},
		{Name: "execute/skip_cache_lookup", Clause: "If true, the action will be executed even if its result is already present in the [ActionCache][build.bazel.remote.execution.v2.ActionCache].", Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("date +%s.%N")
			first := t.stdout(ctx, t.run(ctx, k).Result)
			k.request.SkipCacheLookup = true
			r := t.run(ctx, k)
			if second := t.stdout(ctx, r.Result); r.CachedResult || second == first {
				t.errorf("the second execution has cached_result %v, and printed %q after %q", r.CachedResult, second, first)
			}
		}},
		{Name: "execute/skip_cache_lookup_replaces", Clause: "services SHOULD overwrite any existing entries that may exist.", Level: Should, Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("date +%s.%N")
			t.run(ctx, k)
			k.request.SkipCacheLookup = true
			second := t.stdout(ctx, t.run(ctx, k).Result)
			r, err := t.getResult(ctx, k.request.ActionDigest)
			t.ok("GetActionResult", err)
			if got := t.stdout(ctx, r); got != second {
				t.errorf("the action cache has %q, want the later %q", got, second)
			}
		}},
		{Name: "execute/failure_is_not_cached", Clause: "If the status code is other than `OK`, then the result MUST NOT be cached.", Needs: exec, run: func(ctx context.Context, t *T) {
			k := shell("sleep 20")
			k.action.Timeout = durationpb.New(time.Second)
			t.execute(ctx, k)
			if _, err := t.getResult(ctx, k.request.ActionDigest); err == nil {
				t.errorf("the result of a timeout is in the action cache")
			}
		}},
		{Name: "execute/salt", Clause: "An optional additional salt value used to place this `Action` into a separate cache namespace from other instances having the same field contents.", Needs: exec, run: func(ctx context.Context, t *T) {
			a, b := shell("echo salted"), shell("echo salted")
			t.run(ctx, a)
			if t.run(ctx, b).CachedResult {
				t.errorf("an action with another salt has cached_result")
			}
		}},
		{Name: "wait_execution/running", Clause: "The server will leave the request stream open until the operation completes, and then respond with the completed operation.", Needs: exec, run: func(ctx context.Context, t *T) {
			left, cancel := context.WithCancel(ctx)
			s, err := t.calls.exec.Execute(left, t.store(ctx, shell("sleep 2; echo end")))
			t.ok("Execute", err)
			op, err := s.Recv()
			t.ok("Execute", err)
			cancel() // the connection broke
			w, err := t.calls.exec.WaitExecution(ctx, &repb.WaitExecutionRequest{Name: op.GetName()})
			t.ok("WaitExecution", err)
			e := follow(w.Recv)
			t.ok("WaitExecution", e.err)
			if got := t.stdout(ctx, e.response.GetResult()); got != "end\n" {
				t.errorf("stdout is %q", got)
			}
		}},
		{Name: "wait_execution/unknown", Clause: "an unknown operation name", Needs: exec, run: func(ctx context.Context, t *T) {
			w, err := t.calls.exec.WaitExecution(ctx, &repb.WaitExecutionRequest{Name: "operations/nobody-has-this-" + t.salt})
			if err == nil {
				_, err = w.Recv()
			}
			t.want("WaitExecution of an unknown name", err, codes.NotFound, codes.InvalidArgument)
		}},
		{Name: "wait_execution/twice", Clause: "When the client initially makes the request, the server immediately responds with the current status of the execution.", Needs: exec, run: func(ctx context.Context, t *T) {
			s, err := t.calls.exec.Execute(ctx, t.store(ctx, shell("sleep 1; echo end")))
			t.ok("Execute", err)
			op, err := s.Recv()
			t.ok("Execute", err)
			for range 2 {
				w, err := t.calls.exec.WaitExecution(ctx, &repb.WaitExecutionRequest{Name: op.GetName()})
				t.ok("WaitExecution", err)
				e := follow(w.Recv)
				t.ok("WaitExecution", e.err)
				if e.response == nil || len(e.operations) == 0 || e.operations[0].GetName() != op.GetName() {
					t.errorf("%d operations, response %v", len(e.operations), e.response)
				}
			}
			for {
				if _, err := s.Recv(); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.fatalf("Execute: %v", err)
				}
			}
		}},
	}
}

func operationCases() []Case {
	exec := []need{needsExecution}
	const optional = "The operation can also be queried using [Operations API][google.longrunning.Operations.GetOperation]."
	return []Case{
		{Name: "operations/get", Clause: optional, Level: Should, Needs: exec, run: func(ctx context.Context, t *T) {
			e := t.execute(ctx, shell("true"))
			t.ok("Execute", e.err)
			op, err := t.calls.ops.GetOperation(ctx, &longrunningpb.GetOperationRequest{Name: e.operations[0].GetName()})
			if status.Code(err) == codes.Unimplemented {
				t.skipf("the server does not implement the Operations API")
			}
			t.ok("GetOperation", err)
			if !op.GetDone() || op.GetName() != e.operations[0].GetName() {
				t.errorf("the operation that has ended is %q, done %v", op.GetName(), op.GetDone())
			}
		}},
		{Name: "operations/cancel", Clause: "`CANCELLED`: The operation was cancelled by the client.", Level: Should, Needs: exec, run: func(ctx context.Context, t *T) {
			s, err := t.calls.exec.Execute(ctx, t.store(ctx, shell("sleep 40")))
			t.ok("Execute", err)
			op, err := s.Recv()
			t.ok("Execute", err)
			_, err = t.calls.ops.CancelOperation(ctx, &longrunningpb.CancelOperationRequest{Name: op.GetName()})
			if status.Code(err) == codes.Unimplemented {
				t.skipf("the server does not implement CancelOperation")
			}
			t.ok("CancelOperation", err)
			t.want("the execution that was cancelled", follow(s.Recv).refused(), codes.Canceled)
		}},
	}
}
