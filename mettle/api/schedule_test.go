package api_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

// from executes as a client whose RequestMetadata is md.
func (b *bench) from(md *repb.RequestMetadata, req *repb.ExecuteRequest) *waiting {
	b.t.Helper()
	data, err := proto.Marshal(md)
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(b.t.Context(),
		"build.bazel.remote.execution.v2.requestmetadata-bin", string(data)))
	st, err := b.client.Execute(ctx, req)
	if err != nil {
		b.t.Fatal(err)
	}
	return &waiting{t: b.t, stream: st, leave: cancel}
}

func priority(d *repb.Digest, p int32) *repb.ExecuteRequest {
	return &repb.ExecuteRequest{ActionDigest: d, ExecutionPolicy: &repb.ExecutionPolicy{Priority: p}}
}

// took is a response of a command that ran for so long.
func took(d time.Duration, code int32) *repb.ExecuteResponse {
	return &repb.ExecuteResponse{Result: &repb.ActionResult{
		ExitCode: code, ExecutionMetadata: &repb.ExecutedActionMetadata{VirtualExecutionDuration: durationpb.New(d)},
	}}
}

// A client that joins an operation that waits makes it as urgent as it needs it.
func TestExecute_joinedByOneMoreUrgent(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		first, second := b.store.action("first"), b.store.action("second")
		one := b.execute(priority(first, 0))
		one.want(repb.ExecutionStage_QUEUED)
		other := b.execute(priority(second, 1))
		other.want(repb.ExecutionStage_QUEUED)
		urgent := b.execute(priority(second, -1))
		urgent.want(repb.ExecutionStage_QUEUED)
		if n := b.jobs.published(); n != 2 {
			t.Errorf("%d jobs were published, want 2", n)
		}
		for i, d := range []*repb.Digest{second, first} {
			l := b.lease()
			if got := l.Job().GetActionDigest(); got != parse(d).String() {
				t.Errorf("delivery %d is of %s, want %s", i+1, got, d.GetHash())
			}
			b.complete(l, exit(0))
		}
		for _, w := range []*waiting{one, other, urgent} {
			w.response()
		}
	})
}

// One that joins before the broker has the job does so too.
func TestExecute_joinedByOneMoreUrgentBeforePublished(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		first, second := b.store.action("first"), b.store.action("second")
		one := b.execute(priority(first, 0))
		one.want(repb.ExecutionStage_QUEUED)
		wait := make(chan struct{})
		b.jobs.hold(wait)
		other := b.execute(priority(second, 1))
		other.want(repb.ExecutionStage_CACHE_CHECK) // its job is on its way
		urgent := b.execute(priority(second, -1))
		urgent.want(repb.ExecutionStage_QUEUED)
		close(wait)
		other.want(repb.ExecutionStage_QUEUED)
		l := b.lease()
		if got := l.Job().GetActionDigest(); got != parse(second).String() {
			t.Errorf("the first delivery is of %s, want the urgent one", got)
		}
		b.complete(l, exit(0))
		b.complete(b.lease(), exit(0))
		for _, w := range []*waiting{one, other, urgent} {
			w.response()
		}
	})
}

// What a small build needs of what a large one has queued already comes in the
// small one's turn.
func TestExecute_joinedByAnotherInvocation(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		large, small := &repb.RequestMetadata{ToolInvocationId: "large"}, &repb.RequestMetadata{ToolInvocationId: "small"}
		var last *repb.Digest
		for _, word := range []string{"a", "b", "c", "d"} {
			last = b.store.action(word)
			b.from(large, &repb.ExecuteRequest{ActionDigest: last}).want(repb.ExecutionStage_QUEUED)
		}
		b.from(small, &repb.ExecuteRequest{ActionDigest: last}).want(repb.ExecutionStage_QUEUED)
		b.complete(b.lease(), exit(0))
		l := b.lease()
		if got := l.Job().GetActionDigest(); got != parse(last).String() {
			t.Errorf("the second delivery is of %s, want that which both want", got)
		}
		b.complete(l, exit(0))
		b.complete(b.lease(), exit(0))
		b.complete(b.lease(), exit(0))
	})
}

// A job says how long actions like it took, as far as they tell.
func TestExecute_expects(t *testing.T) {
	for label, tc := range map[string]struct {
		earlier *repb.ExecuteResponse
		md      *repb.RequestMetadata
		want    time.Duration
	}{
		"the same target":        {took(time.Minute, 0), &repb.RequestMetadata{ActionMnemonic: "Test", TargetId: "//a"}, time.Minute},
		"another of its kind":    {took(time.Minute, 0), &repb.RequestMetadata{ActionMnemonic: "Test", TargetId: "//b"}, time.Minute},
		"another kind":           {took(time.Minute, 0), &repb.RequestMetadata{ActionMnemonic: "Link", TargetId: "//a"}, 0},
		"the earlier one failed": {took(time.Second, 1), &repb.RequestMetadata{ActionMnemonic: "Test", TargetId: "//a"}, 0},
		"it said nothing":        {exit(0), &repb.RequestMetadata{ActionMnemonic: "Test", TargetId: "//a"}, 0},
		"it came from the cache": {
			&repb.ExecuteResponse{CachedResult: true, Result: took(time.Second, 0).GetResult()},
			&repb.RequestMetadata{ActionMnemonic: "Test", TargetId: "//a"}, 0,
		},
	} {
		t.Run(label, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *bench) {
				w := b.from(&repb.RequestMetadata{ActionMnemonic: "Test", TargetId: "//a"}, &repb.ExecuteRequest{ActionDigest: b.store.action("a")})
				b.complete(b.lease(), tc.earlier)
				w.response()
				w = b.from(tc.md, &repb.ExecuteRequest{ActionDigest: b.store.action("b")})
				l := b.lease()
				if got := l.Job().GetExpected(); got.AsDuration() != tc.want || (got == nil) != (tc.want == 0) {
					t.Errorf("%v is expected, want %v", got.AsDuration(), tc.want)
				}
				b.complete(l, exit(0))
				w.response()
			})
		})
	}
}

// Clients that name no invocation are told apart by where they call from, and
// headers that are no message count for none.
func TestExecute_invocation(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		long := make([]byte, 1000)
		for i := range long {
			long[i] = 'a'
		}
		for want, md := range map[string]*repb.RequestMetadata{
			"tool":             {ToolInvocationId: "tool", CorrelatedInvocationsId: "build"},
			"build":            {CorrelatedInvocationsId: "build"},
			"bufconn":          {},
			string(long[:128]): {ToolInvocationId: string(long)},
		} {
			w := b.from(md, &repb.ExecuteRequest{ActionDigest: b.store.action(want)})
			l := b.lease()
			if got := l.Job().GetInvocation(); got != want {
				t.Errorf("invocation is %q, want %q", got, want)
			}
			b.complete(l, exit(0))
			w.response()
		}
	})
}

// What clients say of themselves is cut and passed on, and never keeps a job from
// being a message.
func TestExecute_oddHeaders(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		data, err := proto.Marshal(&repb.RequestMetadata{ToolInvocationId: "x" + strings.Repeat(string(rune(0xe4)), 100)})
		if err != nil {
			t.Fatal(err)
		}
		ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs(
			"build.bazel.remote.execution.v2.requestmetadata-bin", string(data), "traceparent", string([]byte{255}), "tracestate", string([]byte{255})))
		st := &incoming{ctx: ctx, sent: make(chan *longrunningpb.Operation, 10)}
		ended := make(chan error, 1)
		go func() { ended <- b.server.Execute(&repb.ExecuteRequest{ActionDigest: b.store.action("a")}, st) }()
		l := b.lease()
		if _, err := proto.Marshal(l.Job()); err != nil {
			t.Errorf("the job: %v", err)
		}
		b.complete(l, exit(0))
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// incoming is a stream whose headers no client of this language would send.
type incoming struct {
	grpc.ServerStream
	ctx  context.Context //nolint:containedctx // as gRPC's own streams
	sent chan *longrunningpb.Operation
}

func (i *incoming) Context() context.Context { return i.ctx }

func (i *incoming) Send(op *longrunningpb.Operation) error {
	i.sent <- op
	return nil
}
