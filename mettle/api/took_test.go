package api

import (
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

func ran(d time.Duration, exit, code int32) *repb.ExecuteResponse {
	return &repb.ExecuteResponse{
		Result: &repb.ActionResult{
			OutputFiles: []*repb.OutputFile{{Path: "a"}, {Path: "b"}}, ExitCode: exit,
			ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "w", VirtualExecutionDuration: durationpb.New(d)},
		},
		Status: &spb.Status{Code: code}, Message: "it ran",
	}
}

func TestTookOf(t *testing.T) {
	cached := ran(time.Second, 0, 0)
	cached.CachedResult = true
	for name, tc := range map[string]struct {
		res  *repb.ExecuteResponse
		want time.Duration
		ok   bool
	}{
		"it ran":          {ran(90*time.Second+7, 0, 0), 90*time.Second + 7, true},
		"it timed out":    {ran(time.Hour, 137, 4), time.Hour, true},
		"it failed":       {ran(time.Second, 1, 0), 0, false},
		"it had no input": {ran(time.Second, 0, 9), 0, false},
		"from the cache":  {cached, 0, false},
		"negative":        {ran(-time.Second, 0, 0), 0, false},
		"for ever":        {ran(1<<62, 0, 0), 0, false},
		"it says nothing": {&repb.ExecuteResponse{Result: &repb.ActionResult{}}, 0, false},
		"empty":           {&repb.ExecuteResponse{}, 0, false},
	} {
		data, err := proto.Marshal(tc.res)
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := tookOf(data); got != tc.want || ok != tc.ok {
			t.Errorf("%s: %v, %v, want %v, %v", name, got, ok, tc.want, tc.ok)
		}
	}
}

// Bytes of any kind are read without harm, and never as longer than actions take.
func FuzzTookOf(f *testing.F) {
	for _, res := range []*repb.ExecuteResponse{ran(time.Second, 0, 0), ran(-time.Second, 1, 4), {}} {
		data, err := proto.Marshal(res)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add(protowire.AppendVarint([]byte{responseResult<<3 | 2}, 1<<40))
	f.Fuzz(func(t *testing.T, data []byte) {
		if d, ok := tookOf(data); d < 0 || d > (maxTookSeconds+1)*time.Second || !ok && d != 0 {
			t.Errorf("%v, %v", d, ok)
		}
	})
}
