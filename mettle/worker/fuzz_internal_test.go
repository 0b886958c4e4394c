//go:build linux

package worker

import (
	"os"
	"path/filepath"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
	queuepb "github.com/mettle-build/mettle/proto/queue"
	workerpb "github.com/mettle-build/mettle/proto/worker"
)

// FuzzMemory: whatever the kernel's files hold, a number is one, and the worker
// neither stops nor thinks that it has more than there is.
func FuzzMemory(f *testing.F) {
	f.Add("MemTotal:  100 kB\nMemAvailable: 50 kB\n", "max\n")
	f.Add("MemTotal: 9223372036854775807 kB\nMemAvailable: -1 kB", "-5")
	f.Add("x", "")
	root := f.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "proc"), 0o700); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, meminfo, number string) {
		for name, text := range map[string]string{"proc/meminfo": meminfo, "number": number} {
			if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		m := &memory{root: root, limit: 1}
		if _, ok := m.number("number"); ok && number == "" {
			t.Error("a number is read of nothing")
		}
		_ = m.fields("number")
		_ = m.check()
	})
}

// FuzzMessage: a job brings the Action and the Command, or names them; both are read
// or the fault of who sent them.
func FuzzMessage(f *testing.F) {
	store, err := mem.New(mem.Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { store.Close() })
	f.Add([]byte("\x0a\x04true"), "x")
	f.Add([]byte("\xff"), "")
	f.Add([]byte{}, "y")
	f.Fuzz(func(t *testing.T, data []byte, text string) {
		d := digest.Of(digest.SHA256, []byte(text))
		r := &run{job: &queuepb.Job{}, at: &station{store: store}}
		c := &repb.Command{}
		err := r.message(t.Context(), data, d, c)
		if want := proto.Unmarshal(data, &repb.Command{}); len(data) > 0 && (err == nil) != (want == nil) {
			t.Errorf("%x: %v, want %v", data, err, want)
		}
		if s := statusOf(err); err != nil && s.GetCode() == 0 {
			t.Errorf("%v is no status", err)
		}
		resp := &repb.ExecuteResponse{Result: &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{
			AuxiliaryMetadata: []*anypb.Any{{TypeUrl: usageURL, Value: data}},
		}}}
		if u := usageIn(resp); (u == nil) != (proto.Unmarshal(data, &workerpb.ResourceUsage{}) != nil) {
			t.Errorf("%x is read as %v", data, u)
		}
		_ = outcome(resp)
	})
}
