package api_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/mettle/api"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func wantCode(t *testing.T, what string, err error, code codes.Code) {
	t.Helper()
	if got := status.Code(err); got != code {
		t.Errorf("%s: code is %v, want %v: %v", what, got, code, err)
	}
}

func withdrawal(name, server string) *queuepb.Notice {
	return &queuepb.Notice{About: &queuepb.Notice_Withdrawal{Withdrawal: &queuepb.Withdrawal{Operation: name, Server: server}}}
}

// get calls GetOperation, which is to succeed.
func (b *bench) get(name string) *longrunningpb.Operation {
	b.t.Helper()
	op, err := b.ops.GetOperation(b.t.Context(), &longrunningpb.GetOperationRequest{Name: name})
	if err != nil {
		b.t.Fatalf("get %s: %v", name, err)
	}
	if op.GetName() != name || op.GetError() != nil {
		b.t.Errorf("got %v by the name %s", op, name)
	}
	return op
}

func stageOf(t *testing.T, op *longrunningpb.Operation) repb.ExecutionStage_Value {
	t.Helper()
	md := &repb.ExecuteOperationMetadata{}
	if err := op.GetMetadata().UnmarshalTo(md); err != nil {
		t.Fatal(err)
	}
	if done := md.GetStage() == repb.ExecutionStage_COMPLETED; op.GetDone() != done {
		t.Errorf("done is %v in stage %v", op.GetDone(), md.GetStage())
	}
	return md.GetStage()
}

func (b *bench) wantStage(name string, want repb.ExecutionStage_Value) {
	b.t.Helper()
	t := b.t.(*testing.T) //nolint:forcetypeassert // benchmarks do not look
	if got := stageOf(t, b.get(name)); got != want {
		t.Errorf("%s is in %v, want %v", name, got, want)
	}
}

func TestGetOperation(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		other := b.another("another")
		d := b.store.action("a")
		w := b.executeAction(d)
		w.next()
		merged := b.executeAction(d)
		merged.next()
		both := []string{w.name, merged.name}
		for _, name := range both {
			b.wantStage(name, repb.ExecutionStage_QUEUED)
			other.wantStage(name, repb.ExecutionStage_UNKNOWN)
		}
		l := b.lease()
		b.executing(l, "w")
		w.want(repb.ExecutionStage_EXECUTING)
		for _, name := range both {
			b.wantStage(name, repb.ExecutionStage_EXECUTING)
		}
		b.complete(l, exit(7))
		w.response()
		for _, name := range both {
			op := b.get(name)
			res := &repb.ExecuteResponse{}
			if err := op.GetResponse().UnmarshalTo(res); err != nil || res.GetResult().GetExitCode() != 7 {
				t.Errorf("response is %v, %v", res, err)
			}
			other.wantStage(name, repb.ExecutionStage_UNKNOWN)
		}
		b.store.cache(d, &repb.ActionResult{})
		for _, name := range both {
			other.wantStage(name, repb.ExecutionStage_COMPLETED)
		}
		if n := b.jobs.published(); n != 1 {
			t.Errorf("%d jobs were published: to ask begins no work", n)
		}
		b.store.err = errors.New("odd")
		_, err := other.ops.GetOperation(t.Context(), &longrunningpb.GetOperationRequest{Name: w.name})
		wantCode(t, "broken store", err, codes.Internal)
	})
}

// Who asks for it waits for it.
func TestGetOperation_againstAbandonment(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		w := b.executeAction(b.store.action("a"))
		w.next()
		w.leave()
		for range 20 {
			time.Sleep(time.Minute)
			b.wantStage(w.name, repb.ExecutionStage_QUEUED)
		}
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		b.wantStage(w.name, repb.ExecutionStage_UNKNOWN)
		b.noLease()
	})
}

func TestWaitOperation(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		w := b.executeAction(b.store.action("a"))
		w.next()
		wait := func(s *bench, ctx context.Context, d *durationpb.Duration) (*longrunningpb.Operation, time.Duration) {
			t.Helper()
			start := time.Now()
			op, err := s.ops.WaitOperation(ctx, &longrunningpb.WaitOperationRequest{Name: w.name, Timeout: d})
			if err != nil {
				t.Fatal(err)
			}
			return op, time.Since(start)
		}
		for label, tc := range map[string]struct {
			timeout  *durationpb.Duration
			deadline time.Duration
			min, max time.Duration
		}{
			"none":       {nil, 0, 30 * time.Second, 30 * time.Second},
			"zero":       {durationpb.New(0), 0, 0, 0},
			"short":      {durationpb.New(time.Second), 0, time.Second, time.Second},
			"long":       {durationpb.New(time.Hour), 0, 30 * time.Second, 30 * time.Second},
			"a deadline": {durationpb.New(time.Hour), 10 * time.Second, 9 * time.Second, 10 * time.Second},
		} {
			ctx, cancel := context.WithCancel(t.Context())
			if tc.deadline > 0 {
				ctx, cancel = context.WithTimeout(t.Context(), tc.deadline)
			}
			op, took := wait(b, ctx, tc.timeout)
			cancel()
			if stageOf(t, op) != repb.ExecutionStage_QUEUED || took < tc.min || took > tc.max {
				t.Errorf("%s: %v after %v", label, stageOf(t, op), took)
			}
		}
		_, err := b.ops.WaitOperation(t.Context(), &longrunningpb.WaitOperationRequest{Name: w.name, Timeout: durationpb.New(-1)})
		wantCode(t, "negative", err, codes.InvalidArgument)

		// It takes up what the server does not know.
		b.stop()
		b.start(nil)
		if op, _ := wait(b, t.Context(), durationpb.New(time.Second)); stageOf(t, op) != repb.ExecutionStage_QUEUED {
			t.Errorf("after a restart: %v", op)
		}
		var worker sync.WaitGroup
		worker.Go(func() {
			time.Sleep(7 * time.Second)
			b.complete(b.lease(), exit(0))
		})
		defer worker.Wait()
		if op, took := wait(b, t.Context(), nil); !op.GetDone() || took != 7*time.Second {
			t.Errorf("%v after %v", op, took)
		}
		if op, took := wait(b, t.Context(), nil); !op.GetDone() || took != 0 {
			t.Errorf("%v after %v", op, took)
		}
	})
}

func (b *bench) list(req *longrunningpb.ListOperationsRequest) (names []string, next string) {
	b.t.Helper()
	res, err := b.ops.ListOperations(b.t.Context(), req)
	if err != nil {
		b.t.Fatalf("list %v: %v", req, err)
	}
	for _, op := range res.GetOperations() {
		names = append(names, op.GetName())
	}
	return names, res.GetNextPageToken()
}

func TestListOperations(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		d := b.store.action("a")
		queued, merged := b.executeAction(d), (*waiting)(nil)
		queued.next()
		merged = b.executeAction(d)
		merged.next()
		running := b.execute(&repb.ExecuteRequest{InstanceName: "x/y", ActionDigest: b.store.action("b"), ExecutionPolicy: &repb.ExecutionPolicy{Priority: -1}})
		running.next()
		l := b.lease()
		b.executing(l, "w")
		running.want(repb.ExecutionStage_EXECUTING)
		ended := b.execute(&repb.ExecuteRequest{InstanceName: "x/y", ActionDigest: b.store.action("c"), ExecutionPolicy: &repb.ExecutionPolicy{Priority: -1}})
		ended.next()
		b.complete(b.lease(), exit(0))
		ended.response()
		for label, tc := range map[string]struct {
			name, filter string
			want         []*waiting
		}{
			"all":            {"", "", []*waiting{queued, merged, running, ended}},
			"operations":     {"operations", "", []*waiting{queued, merged, running, ended}},
			"an instance":    {"x/y/operations", "", []*waiting{running, ended}},
			"no instance":    {"/operations", "", []*waiting{queued, merged}},
			"nobody's":       {"z/operations", "", nil},
			"queued":         {"", "stage=queued", []*waiting{queued, merged}},
			"executing":      {"", "stage=executing", []*waiting{running}},
			"completed":      {"", "stage=completed", []*waiting{ended}},
			"instance, both": {"x/y/operations", "stage=executing", []*waiting{running}},
		} {
			got, next := b.list(&longrunningpb.ListOperationsRequest{Name: tc.name, Filter: tc.filter})
			var want []string
			for _, w := range tc.want {
				want = append(want, w.name)
			}
			if !slices.Equal(got, want) || next != "" {
				t.Errorf("%s: %v and token %q, want %v", label, got, next, want)
			}
		}
		b.cancel(queued.name)
		if got, _ := b.list(&longrunningpb.ListOperationsRequest{Filter: "stage=queued"}); !slices.Equal(got, []string{merged.name}) {
			t.Errorf("after one was cancelled: %v, want %v", got, merged.name)
		}
	})
}

// Pages hold what was there all the time, once, whatever goes and comes in between.
func TestListOperations_pages(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		var want []string
		var all []*waiting
		for i := range 25 {
			w := b.executeAction(b.store.action(fmt.Sprint(i)))
			w.next()
			all = append(all, w)
			if i%3 > 0 {
				want = append(want, w.name)
			}
		}
		var got []string
		token, pages := "", 0
		for token != "" || pages == 0 {
			var names []string
			names, token = b.list(&longrunningpb.ListOperationsRequest{PageSize: 4, PageToken: token})
			got = append(got, names...)
			if pages++; len(names) > 4 {
				t.Errorf("%d operations in a page", len(names))
			}
			for i := (pages - 1) * 6; i < min(pages*6, 25); i += 3 {
				b.cancel(all[i].name)
			}
			b.executeAction(b.store.action(fmt.Sprint("new", pages))).next()
			if pages > 20 {
				t.Fatal("there is no last page")
			}
		}
		for _, name := range want {
			if i := slices.Index(got, name); i < 0 || slices.Contains(got[i+1:], name) {
				t.Errorf("%s is in the pages at %d, or twice", name, i)
			}
		}
	})
}

// Large results make short pages.
func TestListOperations_bytes(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		for i := range 6 {
			w := b.executeAction(b.store.action(fmt.Sprint(i)))
			w.next()
			b.complete(b.lease(), &repb.ExecuteResponse{Message: strings.Repeat("x", 1<<20)})
			w.response()
		}
		n, token := 0, ""
		for {
			names, next := b.list(&longrunningpb.ListOperationsRequest{PageToken: token})
			if n += len(names); next == "" {
				break
			}
			token = next
		}
		if n != 6 {
			t.Errorf("%d operations in all", n)
		}
	})
}

func TestListOperations_refuses(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		for label, tc := range map[string]struct {
			req  *longrunningpb.ListOperationsRequest
			code codes.Code
		}{
			"name":    {&longrunningpb.ListOperationsRequest{Name: "x"}, codes.InvalidArgument},
			"filter":  {&longrunningpb.ListOperationsRequest{Filter: "done=true"}, codes.InvalidArgument},
			"size":    {&longrunningpb.ListOperationsRequest{PageSize: -1}, codes.InvalidArgument},
			"token":   {&longrunningpb.ListOperationsRequest{PageToken: "!"}, codes.InvalidArgument},
			"foreign": {&longrunningpb.ListOperationsRequest{PageToken: "MUBhbm90aGVy"}, codes.InvalidArgument},
			"partial": {&longrunningpb.ListOperationsRequest{ReturnPartialSuccess: true}, codes.Unimplemented},
		} {
			_, err := b.ops.ListOperations(t.Context(), tc.req)
			wantCode(t, label, err, tc.code)
		}
		b.stop()
		b.start(func(o *api.Options) { o.List = false })
		_, err := b.ops.ListOperations(t.Context(), &longrunningpb.ListOperationsRequest{})
		wantCode(t, "not an operator", err, codes.PermissionDenied)
	})
}

// Of a name with skip_cache_lookup, an older result tells nothing.
func TestGetOperation_skipCacheLookup(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		other := b.another("another")
		d := b.store.action("a")
		start := time.Now()
		w := b.execute(&repb.ExecuteRequest{ActionDigest: d, SkipCacheLookup: true})
		w.next()
		result := func(queued time.Time) *repb.ActionResult {
			return &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{QueuedTimestamp: timestamppb.New(queued)}}
		}
		b.store.cache(d, result(start.Add(-time.Second)))
		other.wantStage(w.name, repb.ExecutionStage_UNKNOWN)
		b.store.cache(d, result(start))
		other.wantStage(w.name, repb.ExecutionStage_COMPLETED)
	})
}
