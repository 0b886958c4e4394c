package bench

import (
	"math"
	"strings"
	"testing"

	longrunningpb "cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// FuzzAnswer holds that what is read of an operation field by field is what generated
// code reads.
func FuzzAnswer(f *testing.F) {
	for _, r := range []*repb.ExecuteResponse{
		{CachedResult: true, Result: &repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: "a"}}, ExecutionMetadata: &repb.ExecutedActionMetadata{WorkerStartTimestamp: &timestamppb.Timestamp{Seconds: 5, Nanos: 6}}}},
		{Result: &repb.ActionResult{ExitCode: 1}},
	} {
		value, err := anypb.New(r)
		if err != nil {
			f.Fatal(err)
		}
		data, err := proto.Marshal(&longrunningpb.Operation{Name: "n", Done: true, Result: &longrunningpb.Operation_Response{Response: value}})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("\x18\x01"))
	f.Add([]byte("\xff"))
	f.Fuzz(func(t *testing.T, data []byte) {
		o := &lastOperation{}
		err := o.take(mem.BufferSlice{mem.SliceBuffer(data)})
		op := &longrunningpb.Operation{}
		if proto.Unmarshal(data, op) != nil || err != nil || o.data == nil {
			return
		}
		e, err := o.read()
		resp, decodeErr := o.decode()
		if decodeErr == nil && err != nil {
			t.Errorf("%v is good, and by hand %v", op, err)
		}
		if decodeErr == nil && (e.failed || e.cached != resp.GetCachedResult() || e.outputFiles < len(resp.GetResult().GetOutputFiles())) {
			t.Errorf("%v is read by hand as %+v", resp, e)
		}
	})
}

// FuzzProbe: what a server's metrics page and /proc say of it.
func FuzzProbe(f *testing.F) {
	f.Add("# HELP a b\na 5\nb{c=\"d e\"} 7\nc NaN\n", "7 (a) b) R 1 1 1 1 1 1 1 1 1 1 5 6 7 8 1 1 1 1 1 1 9 1")
	f.Add("a", "")
	f.Add("a 1e400\n", ") ")
	f.Fuzz(func(t *testing.T, metrics, stat string) {
		values, err := parseMetrics(strings.NewReader(metrics))
		for name, v := range values {
			if err == nil && (name == "" || math.IsInf(v, 0) && !strings.Contains(strings.ToLower(metrics), "inf")) {
				t.Errorf("%q is %v", name, v)
			}
		}
		var s sample
		_ = s.addStat(stat)
	})
}
