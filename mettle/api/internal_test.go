package api

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/operation"
	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/queue/mem"
)

// The metadata that are put together as bytes are those that the proto package
// would have made.
func TestMetadata_encoding(t *testing.T) {
	created := time.Unix(1_700_000_000, 123_000)
	for name, tc := range map[string]struct {
		action digest.Digest
		at     time.Time
		snap   operation.Snapshot
		want   *repb.ExecutedActionMetadata
	}{
		"queued":      {digest.Of(digest.SHA256, []byte("x")), created, operation.Snapshot{Stage: operation.Queued}, &repb.ExecutedActionMetadata{}},
		"empty blob":  {digest.Empty(digest.BLAKE3), created, operation.Snapshot{Stage: operation.CacheCheck}, &repb.ExecutedActionMetadata{}},
		"long hash":   {digest.Of(digest.SHA512, make([]byte, 300)), time.Unix(5, 0), operation.Snapshot{Stage: operation.Queued}, &repb.ExecutedActionMetadata{}},
		"before 1970": {digest.Of(digest.SHA1, []byte("x")), time.Unix(-5, 7000), operation.Snapshot{Stage: operation.Queued}, &repb.ExecutedActionMetadata{}},
		"worker":      {digest.Of(digest.SHA256, []byte("x")), created, operation.Snapshot{Stage: operation.Executing, Worker: "w"}, &repb.ExecutedActionMetadata{Worker: "w"}},
		"log streams": {
			digest.Of(digest.SHA256, []byte("x")), created,
			operation.Snapshot{Stage: operation.Executing, Worker: "w", StdoutStream: "logstreams/a", StderrStream: "logstreams/b"},
			&repb.ExecutedActionMetadata{Worker: "w"},
		},
		"its own": {
			digest.Of(digest.SHA256, []byte("x")), created,
			operation.Snapshot{Stage: operation.Completed, Worker: "w", Metadata: marshal(t, &repb.ExecutedActionMetadata{Worker: "v", WorkerStartTimestamp: timestamppb.New(created)})},
			&repb.ExecutedActionMetadata{Worker: "v", WorkerStartTimestamp: timestamppb.New(created)},
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := &call{}
			c.setName(operation.Name{Action: tc.action, Created: tc.at})
			got := &repb.ExecuteOperationMetadata{}
			if err := proto.Unmarshal(c.metadataOf(&tc.snap), got); err != nil {
				t.Fatal(err)
			}
			tc.want.QueuedTimestamp = timestamppb.New(tc.at)
			want := &repb.ExecuteOperationMetadata{
				Stage: repb.ExecutionStage_Value(tc.snap.Stage), ActionDigest: tc.action.Proto(),
				PartialExecutionMetadata: tc.want, DigestFunction: tc.action.Function().Proto(),
				StdoutStreamName: tc.snap.StdoutStream, StderrStreamName: tc.snap.StderrStream,
			}
			if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
				t.Errorf("metadata (-want +got):\n%s", diff)
			}
		})
	}
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestCodeOf(t *testing.T) {
	for name, tc := range map[string]struct {
		response []byte
		want     uint64
	}{
		"empty":   {nil, 0},
		"ok":      {marshal(t, &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 1}, Status: &spb.Status{}}), 0},
		"timeout": {marshal(t, &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 1}, Status: &spb.Status{Code: 4, Message: "m"}, Message: "m"}), 4},
		"junk":    {[]byte{0xff, 0xff, 0xff, 0xff}, 0},
	} {
		if got := codeOf(tc.response); got != tc.want {
			t.Errorf("%s: code is %d, want %d", name, got, tc.want)
		}
	}
}

func FuzzCodeOf(f *testing.F) {
	f.Add(marshal(f, &repb.ExecuteResponse{Status: &spb.Status{Code: 4, Message: "m"}}))
	f.Fuzz(func(t *testing.T, data []byte) {
		got := codeOf(data)
		res := &repb.ExecuteResponse{}
		if proto.Unmarshal(data, res) == nil && got <= 16 && int32(got) != res.GetStatus().GetCode() { //nolint:gosec // at most 16
			t.Errorf("code is %d, want %v", got, res.GetStatus())
		}
	})
}

// blobs is a CAS of a few blobs.
type blobs map[digest.Digest][]byte

func (b blobs) Open(_ context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	data, ok := b[d]
	if !ok {
		return nil, fmt.Errorf("open %s: %w", d, blob.ErrNotFound)
	}
	return io.NopCloser(bytes.NewReader(data[offset:])), nil
}

func (b blobs) Get(context.Context, blob.EntryKey) (*repb.ActionResult, error) {
	return nil, blob.ErrNotFound
}

func newServer(t testing.TB, store blobs, r prometheus.Registerer) *Server {
	t.Helper()
	q, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { q.Close() })
	platforms, err := platform.New(platform.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Options{ID: "api", Store: store, Actions: store, Jobs: q, Updates: q, Platforms: platforms, Registerer: r})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Whatever the bytes of an Action and a Command are: a job, or an error that
// blames them.
func FuzzPrepare(f *testing.F) {
	empty := digest.Empty(digest.SHA256).Proto()
	f.Add(marshal(f, &repb.Action{InputRootDigest: empty}), marshal(f, &repb.Command{Arguments: []string{"true"}}))
	f.Add(marshal(f, &repb.Action{InputRootDigest: empty, DoNotCache: true, Platform: &repb.Platform{Properties: []*repb.Platform_Property{{Name: "OSFamily", Value: "linux"}}}}),
		marshal(f, &repb.Command{Arguments: []string{"true"}, OutputPaths: []string{"a/b"}}))
	f.Add([]byte{0xff}, []byte{})
	store := blobs{}
	s := newServer(f, store, nil)
	f.Fuzz(func(t *testing.T, action, command []byte) {
		clear(store)
		cmd := digest.Of(digest.SHA256, command)
		store[cmd] = command
		// A digest that fits is put behind the fuzzed fields: the last one counts.
		action = append(action, marshal(t, &repb.Action{CommandDigest: cmd.Proto()})...)
		act := digest.Of(digest.SHA256, action)
		store[act] = action
		c := &call{s: s}
		c.setName(operation.NewName(operation.Name{Action: act}))
		job, _, err := s.prepare(t.Context(), c)
		if err == nil {
			if job.GetTimeout().AsDuration() <= 0 || job.GetPool() == "" {
				t.Errorf("the job is %v", job)
			}
			return
		}
		if c := status.Code(toStatus(err)); c != codes.InvalidArgument && c != codes.FailedPrecondition {
			t.Errorf("%v has code %v", err, c)
		}
	})
}

// A page token is one that this server made, or is refused.
func FuzzParseToken(f *testing.F) {
	s := newServer(f, blobs{}, nil)
	f.Add("", uint64(0))
	f.Add(s.token(7), uint64(7))
	f.Add("MTBAYW5vdGhlcg", uint64(1)<<63)
	f.Fuzz(func(t *testing.T, token string, place uint64) {
		if got, err := s.parseToken(token); err == nil && token != "" {
			if again, err := s.parseToken(s.token(got)); err != nil || again != got {
				t.Errorf("the token of %d is read as %d, %v", got, again, err)
			}
		}
		if got, err := s.parseToken(s.token(place)); err != nil || got != place {
			t.Errorf("the token of %d is read as %d, %v", place, got, err)
		}
	})
}

func TestRecent(t *testing.T) {
	r := newRecent()
	at := func(i int) digest.Digest { return digest.Of(digest.SHA256, fmt.Append(nil, i)) }
	if r.has(at(0)) {
		t.Error("the empty set has something")
	}
	r.add(at(0))
	for i := 1; i <= 3*maxRecent; i++ {
		r.add(at(i))
		if i%1000 == 0 && !r.has(at(0)) {
			t.Fatalf("what is asked for was forgotten after %d others", i)
		}
	}
	if r.has(at(1)) {
		t.Error("nothing is forgotten")
	}
	if n := len(r.new) + len(r.old); n > 2*maxRecent {
		t.Errorf("it holds %d digests", n)
	}
}

// What actions and their clients do is no failure of the fleet.
func TestOutcomeOf(t *testing.T) {
	for code, want := range map[codes.Code]outcome{
		codes.OK: outcomeExecuted, codes.Canceled: outcomeCancelled, codes.DeadlineExceeded: outcomeTimeout,
		codes.InvalidArgument: outcomeRefused, codes.FailedPrecondition: outcomeRefused,
		codes.Internal: outcomeFailed, codes.Unavailable: outcomeFailed, codes.ResourceExhausted: outcomeFailed, codes.Aborted: outcomeFailed,
	} {
		response, err := proto.Marshal(&repb.ExecuteResponse{Status: &spb.Status{Code: int32(code)}}) //nolint:gosec // a code
		if err != nil {
			t.Fatal(err)
		}
		if got := outcomeOf(response); got != want {
			t.Errorf("%v: got %v, want %v", code, got, want)
		}
	}
}

func TestMetrics_lint(t *testing.T) {
	r := prometheus.NewPedanticRegistry()
	s := newServer(t, blobs{}, r)
	s.metrics.ended(t.Context(), &call{outcome: outcomeCached}, nil, time.Now())
	s.metrics.ended(t.Context(), &call{}, status.Error(codes.Canceled, "x"), time.Now())
	s.metrics.ended(t.Context(), &call{}, status.Error(codes.NotFound, "x"), time.Now())
	s.metrics.ended(t.Context(), &call{}, status.Error(codes.Unavailable, "x"), time.Now())
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v, %v", problems, err)
	}
	got := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			if m.GetHistogram() == nil {
				got[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	for reason := range refusals {
		if name := "mettle_executes_refused_total " + reason.String(); got[name] != 0 {
			t.Errorf("%s is %v, and nothing was refused", name, got[name])
		} else {
			delete(got, name)
		}
	}
	want := map[string]float64{
		"mettle_executes_total cached": 1, "mettle_executes_total left": 1, "mettle_executes_total refused": 1,
		"mettle_executes_total timeout":     0,
		"mettle_executes_total unavailable": 1, "mettle_executes_total executed": 0, "mettle_executes_total failed": 0, "mettle_executes_total cancelled": 0,
		"mettle_operations queued": 0, "mettle_operations executing": 0, "mettle_executes_in_flight": 0,
		"mettle_pool_desired_workers default":       0,
		"mettle_pool_operations default executing":  0,
		"mettle_pool_operations default queued":     0,
		"mettle_pool_oldest_queued_seconds default": 0,
		"mettle_pool_slots default":                 0,
		"mettle_pool_slots_idle default":            0,
		"mettle_pool_slots_running default":         0,
		"mettle_pool_workers default draining":      0,
		"mettle_pool_workers default paused":        0,
		"mettle_pool_workers default taking":        0,
		"mettle_history_keys":                       0, "mettle_history_unknown_total": 0,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("metrics (-want +got):\n%s", diff)
	}
	if _, err := newMetrics(r, s.ops, s.opts.Platforms); err == nil {
		t.Error("metrics were registered twice")
	}
}
