package api_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/api"
	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// The plain way: queued at once, executing with the worker's name, completed.
func TestExecute(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		start := time.Now()
		d := b.store.action("a", timeoutOf(time.Minute))
		md, err := proto.Marshal(&repb.RequestMetadata{ToolInvocationId: "invocation"})
		if err != nil {
			t.Fatal(err)
		}
		ctx := metadata.AppendToOutgoingContext(t.Context(),
			"build.bazel.remote.execution.v2.requestmetadata-bin", string(md),
			"traceparent", "00-1-2-01", "tracestate", "x=y")
		st, err := b.client.Execute(ctx, &repb.ExecuteRequest{
			InstanceName: "a/b", ActionDigest: d, DigestFunction: repb.DigestFunction_SHA256,
			ExecutionPolicy: &repb.ExecutionPolicy{Priority: -3},
		})
		if err != nil {
			t.Fatal(err)
		}
		w := &waiting{t: t, stream: st}
		_, got := w.next()
		want := &repb.ExecuteOperationMetadata{
			Stage: repb.ExecutionStage_QUEUED, ActionDigest: d, DigestFunction: repb.DigestFunction_SHA256,
			PartialExecutionMetadata: &repb.ExecutedActionMetadata{QueuedTimestamp: timestamppb.New(start)},
		}
		if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
			t.Errorf("first metadata (-want +got):\n%s", diff)
		}
		if took := time.Since(start); took > 10*time.Millisecond {
			t.Errorf("the first message took %v", took)
		}

		l := b.lease()
		job := l.Job()
		act, cmd := &repb.Action{}, &repb.Command{}
		if err := errors.Join(proto.Unmarshal(job.GetAction(), act), proto.Unmarshal(job.GetCommand(), cmd)); err != nil {
			t.Fatal(err)
		}
		if act.GetTimeout().AsDuration() != time.Minute || cmd.GetArguments()[1] != "a" {
			t.Errorf("the job has action %v and command %v", act, cmd)
		}
		wantJob := &queuepb.Job{
			Operation: w.name, ReplyTo: "api", InstanceName: "a/b", ActionDigest: parse(d).String(),
			Action: job.GetAction(), Command: job.GetCommand(), Priority: -3, Pool: queue.DefaultPool,
			Queued: timestamppb.New(start), RequestMetadata: md, Timeout: act.GetTimeout(),
			TraceContext: map[string]string{"traceparent": "00-1-2-01", "tracestate": "x=y"},
			Invocation:   "invocation",
		}
		if diff := cmp.Diff(wantJob, job, protocmp.Transform()); diff != "" {
			t.Errorf("job (-want +got):\n%s", diff)
		}

		b.executing(l, "worker-7")
		want.Stage, want.PartialExecutionMetadata.Worker = repb.ExecutionStage_EXECUTING, "worker-7"
		if _, got := w.next(); !proto.Equal(got, want) {
			t.Errorf("metadata while executing is %v, want %v", got, want)
		}
		partial := &repb.ExecutedActionMetadata{Worker: "worker-7", WorkerStartTimestamp: timestamppb.New(start.Add(time.Second))}
		data, err := proto.Marshal(partial)
		if err != nil {
			t.Fatal(err)
		}
		b.report(l, &queuepb.Update{Stage: queuepb.Update_EXECUTING, Worker: "worker-7", PartialMetadata: data})
		want.PartialExecutionMetadata.WorkerStartTimestamp = partial.GetWorkerStartTimestamp()
		if _, got := w.next(); !proto.Equal(got, want) {
			t.Errorf("metadata with the worker's own is %v, want %v", got, want)
		}
		b.complete(l, exit(3))
		if got := w.response(); !proto.Equal(got, exit(3)) {
			t.Errorf("response is %v, want %v", got, exit(3))
		}
	})
}

func TestExecute_cached(t *testing.T) {
	cached := &repb.ActionResult{StdoutRaw: []byte("out")}
	for name, tc := range map[string]struct {
		change []func(*repb.Action, *repb.Command)
		req    *repb.ExecuteRequest
		want   bool
	}{
		"hit":               {req: &repb.ExecuteRequest{}, want: true},
		"skip_cache_lookup": {req: &repb.ExecuteRequest{SkipCacheLookup: true}},
		"do_not_cache":      {req: &repb.ExecuteRequest{}, change: []func(*repb.Action, *repb.Command){doNotCache}},
		"another instance":  {req: &repb.ExecuteRequest{InstanceName: "other"}},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *bench) {
				tc.req.ActionDigest = b.store.action("a", tc.change...)
				b.store.cache(tc.req.ActionDigest, cached)
				for range 2 {
					w := b.execute(tc.req)
					if !tc.want {
						w.want(repb.ExecutionStage_QUEUED)
						b.complete(b.lease(), exit(0))
					}
					res := w.response()
					if res.GetCachedResult() != tc.want {
						t.Errorf("cached_result is %v, want %v", res.GetCachedResult(), tc.want)
					}
					if tc.want && !proto.Equal(res.GetResult(), cached) {
						t.Errorf("result is %v, want %v", res.GetResult(), cached)
					}
				}
				b.noLease()
			})
		})
	}
}

// A cached result whose Action has gone from the CAS is as good as ever.
func TestExecute_cachedWithoutAction(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		d := digest.Of(digest.SHA256, []byte("gone")).Proto()
		b.store.cache(d, &repb.ActionResult{})
		if !b.executeAction(d).response().GetCachedResult() {
			t.Error("not cached")
		}
	})
}

func TestExecute_inlineHints(t *testing.T) {
	for name, run := range map[string]func(*bench, *waiting, *repb.Digest, *repb.ActionResult){
		"cached": func(*bench, *waiting, *repb.Digest, *repb.ActionResult) {},
		"executed": func(b *bench, _ *waiting, _ *repb.Digest, r *repb.ActionResult) {
			b.complete(b.lease(), &repb.ExecuteResponse{Result: r})
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *bench) {
				put := func(s string) *repb.Digest {
					return b.store.putBytes(digest.Of(digest.SHA256, []byte(s)), []byte(s))
				}
				r := &repb.ActionResult{
					StdoutDigest: put("out"), StderrDigest: digest.Of(digest.SHA256, []byte("gone")).Proto(),
					OutputFiles: []*repb.OutputFile{{Path: "a", Digest: put("A")}, {Path: "b", Digest: put("B")}, {Path: "c", Digest: put(strings.Repeat("c", 3<<20))}},
				}
				d := b.store.action("a")
				if name == "cached" {
					b.store.cache(d, proto.CloneOf(r))
				}
				w := b.execute(&repb.ExecuteRequest{
					ActionDigest: d, InlineStdout: true, InlineStderr: true, InlineOutputFiles: []string{"a", "c", "d"},
				})
				run(b, w, d, r)
				want := proto.CloneOf(r)
				want.StdoutRaw, want.OutputFiles[0].Contents = []byte("out"), []byte("A")
				if diff := cmp.Diff(want, w.response().GetResult(), protocmp.Transform()); diff != "" {
					t.Errorf("result (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// What is inlined leaves the message within what clients take by default.
func TestExecute_inlineHintsOfALargeResult(t *testing.T) {
	const limit = 4 << 20
	for _, name := range []string{"cached", "executed"} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *bench) {
				data := []byte(strings.Repeat("x", 1<<20))
				large := b.store.putBytes(digest.Of(digest.SHA256, data), data)
				r := &repb.ActionResult{StdoutDigest: large, StderrDigest: large}
				for i := range 20_000 {
					r.OutputFiles = append(r.OutputFiles, &repb.OutputFile{Path: fmt.Sprintf("a/rather/long/path/of/an/output/file/%060d", i), Digest: large})
				}
				d := b.store.action("a")
				if name == "cached" {
					b.store.cache(d, proto.CloneOf(r))
				}
				w := b.execute(&repb.ExecuteRequest{ActionDigest: d, InlineStdout: true, InlineStderr: true})
				if name == "executed" {
					b.complete(b.lease(), &repb.ExecuteResponse{Result: r})
				}
				if size := proto.Size(w.response()); size > limit-64<<10 {
					t.Errorf("a response of %d bytes, over the %d that a message may have", size, limit)
				}
			})
		})
	}
}

// However slow the storage is, the client hears something within milliseconds,
// and again and again; and what is wrong is then the operation's end.
func TestExecute_slowStorage(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		b.store.delay = time.Minute
		start := time.Now()
		w := b.executeAction(digest.Of(digest.SHA256, []byte("nothing")).Proto())
		messages := 0
		for {
			op, md := w.next()
			if op.GetDone() {
				res := &repb.ExecuteResponse{}
				if err := op.GetResponse().UnmarshalTo(res); err != nil {
					t.Fatal(err)
				}
				wantMissing(t, res.GetStatus(), digest.Of(digest.SHA256, []byte("nothing")))
				break
			}
			if messages++; messages == 1 && time.Since(start) > 20*time.Millisecond {
				t.Errorf("the first message came after %v", time.Since(start))
			}
			if md.GetStage() != repb.ExecutionStage_CACHE_CHECK {
				t.Errorf("stage is %v", md.GetStage())
			}
		}
		if messages < 4 {
			t.Errorf("%d messages in %v", messages, time.Since(start))
		}

		// Trouble that may pass ends only the stream; the operation can be resumed.
		b.store.err = fmt.Errorf("the bucket: %w", blob.ErrUnavailable)
		w = b.executeAction(b.store.action("a"))
		w.next()
		w.err(codes.Unavailable)
		b.store.err, b.store.delay = nil, 0
		again := b.resume(w.name)
		again.want(repb.ExecutionStage_QUEUED)
		b.complete(b.lease(), exit(0))
		again.response()
	})
}

// wantMissing checks that a status says that d is missing, as the spec has it.
func wantMissing(t *testing.T, s *spb.Status, d digest.Digest) {
	t.Helper()
	if codes.Code(s.GetCode()) != codes.FailedPrecondition { //nolint:gosec // a status code
		t.Fatalf("status is %v, want FAILED_PRECONDITION", s)
	}
	if len(s.GetDetails()) != 1 {
		t.Fatalf("status is %v, want one detail", s)
	}
	f := &errdetails.PreconditionFailure{}
	if err := s.GetDetails()[0].UnmarshalTo(f); err != nil {
		t.Fatal(err)
	}
	want := &errdetails.PreconditionFailure{Violations: []*errdetails.PreconditionFailure_Violation{{Type: "MISSING", Subject: "blobs/" + d.String()}}}
	if diff := cmp.Diff(want, f, protocmp.Transform()); diff != "" {
		t.Errorf("details (-want +got):\n%s", diff)
	}
}

func TestExecute_missing(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		gone := digest.Of(digest.SHA256, []byte("gone"))
		s := b.executeAction(gone.Proto()).err(codes.FailedPrecondition)
		wantMissing(t, s.Proto(), gone)
		d := b.store.action("a", func(a *repb.Action, _ *repb.Command) { a.CommandDigest = gone.Proto() })
		s = b.executeAction(d).err(codes.FailedPrecondition)
		wantMissing(t, s.Proto(), gone)
		b.noLease()

		// Inputs that the worker finds missing are the operation's end.
		w := b.executeAction(b.store.action("b"))
		b.complete(b.lease(), &repb.ExecuteResponse{Status: s.Proto()})
		wantMissing(t, w.response().GetStatus(), gone)
	})
}

func TestExecute_largeCommandStaysInCAS(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		w := b.executeAction(b.store.action(strings.Repeat("x", 300<<10)))
		l := b.lease()
		if len(l.Job().GetCommand()) != 0 || len(l.Job().GetAction()) == 0 {
			t.Errorf("the job carries %d bytes of Action and %d of Command", len(l.Job().GetAction()), len(l.Job().GetCommand()))
		}
		b.complete(l, exit(0))
		w.response()
	})
}

func TestExecute_brokenStore(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		b.store.err = errors.New("odd")
		b.executeAction(b.store.action("a")).err(codes.Internal)
		b.store.explode = true
		b.executeAction(b.store.action("a")).err(codes.Internal)
		b.store.explode, b.store.err = false, nil
		w := b.executeAction(b.store.action("a"))
		b.complete(b.lease(), exit(0))
		w.response()
	})
}

func TestExecute_manyClients(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		const clients, actions = 1000, 100
		digests := make([]*repb.Digest, actions)
		for i := range digests {
			digests[i] = b.store.action(fmt.Sprint(i))
		}
		var wg sync.WaitGroup
		for i := range clients {
			w := b.executeAction(digests[i%actions])
			wg.Go(func() {
				if got := w.response().GetResult().GetExitCode(); got != 0 {
					t.Errorf("exit code %d", got)
				}
			})
		}
		synctest.Wait()
		if n := b.jobs.published(); n != actions {
			t.Errorf("%d jobs were published for %d actions", n, actions)
		}
		for range actions {
			l := b.lease()
			b.executing(l, "w")
			b.complete(l, exit(0))
		}
		wg.Wait()
		b.noLease()
	})
}

// TestExecute_large: a result that clients don't take by default is not lost without
// a word.
func TestExecute_large(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log syncBuffer
		b := newBench(t, func(o *api.Options) { o.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
		path := strings.Repeat("x", 1<<10)
		res := &repb.ActionResult{}
		for range 5 << 10 {
			res.OutputFiles = append(res.OutputFiles, &repb.OutputFile{Path: path})
		}
		w := b.executeAction(b.store.action("a"))
		b.complete(b.lease(), &repb.ExecuteResponse{Result: res})
		if s := w.err(codes.ResourceExhausted); !strings.Contains(s.Message(), "larger than max") {
			t.Errorf("the client is told %q", s.Message())
		}
		synctest.Wait()
		if got := log.String(); !strings.Contains(got, "larger than clients take by default") || !strings.Contains(got, "limit_bytes=4194304") {
			t.Errorf("the log says %q", got)
		}
	})
}

// syncBuffer is a buffer that is read while it is written to.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}
