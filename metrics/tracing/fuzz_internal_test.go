package tracing

import (
	"testing"
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"
)

// FuzzOrigin: whatever the headers are, a call belongs to one trace, which does not
// change, and what is told of its client can be sent.
func FuzzOrigin(f *testing.F) {
	md, err := proto.Marshal(&repb.RequestMetadata{ToolInvocationId: "2e62f5e0-2a3a-4a3d-9c3b-0d0d4f7d6a11", TargetId: "//a:b"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "v=1", string(md))
	f.Add("", "", string(md))
	f.Add("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-ff-x", "a=b,a=b", "\x1a\x01x")
	f.Add("00-00000000000000000000000000000000-0000000000000000-00", "", "\x1a\xff\xff\xff\xff\x0f")
	t := &Tracer{share: 0.5}
	f.Fuzz(func(tt *testing.T, parent, state, who string) {
		h := func(name string) string { return map[string]string{"traceparent": parent, "tracestate": state}[name] }
		o := t.originOf(h, who)
		if !o.id.IsValid() {
			tt.Error("no trace")
		}
		again := t.originOf(h, who)
		if named := o.parent.IsValid() || invocationOf(who) != ""; named && (again.id != o.id || again.recorded != o.recorded) {
			tt.Errorf("first %v, then %v", o, again)
		}
		var m repb.RequestMetadata
		if proto.Unmarshal([]byte(who), &m) == nil && len(who) <= maxMetadata && invocationOf(who) != m.GetToolInvocationId() {
			tt.Errorf("the invocation is %q, want %q", invocationOf(who), m.GetToolInvocationId())
		}
		for _, a := range ofClient(who) {
			if !utf8.ValidString(a.Value.AsString()) {
				tt.Errorf("%s is no UTF-8", a.Key)
			}
		}
	})
}
